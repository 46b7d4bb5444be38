"""The journal holds what was written, also after a crash in the middle of a write, and notices damage."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpt_secure.errors import RunDirectoryError
from fedpt_secure.network.journal import Accepted, Began, Closed, Lost, RoundJournal

ANNOUNCEMENT = b"round 3"
PHASES = ("advertise", "share_keys", "mask", "confirm", "unmask")
ENTRIES = st.lists(
    st.one_of(
        st.builds(Accepted, st.sampled_from(PHASES), st.text(max_size=8), st.binary(max_size=50)),
        st.builds(Lost, st.sampled_from(PHASES), st.text(max_size=8), st.text(max_size=8)),
        st.builds(Closed, st.sampled_from(PHASES), st.floats(0, 100)),
    ),
    max_size=8,
)


def write(path, entries):
    path.unlink(missing_ok=True)
    journal = RoundJournal(path)
    journal.open(3, 1, ANNOUNCEMENT)
    for entry in entries:
        journal.write(entry)


@settings(deadline=None, max_examples=50)
@given(entries=ENTRIES)
def test_what_was_written_is_read_back(entries, tmp_path_factory):
    path = tmp_path_factory.mktemp("journal") / "journal"
    write(path, entries)
    assert RoundJournal(path).begun() == Began(3, 1)
    assert RoundJournal(path).open(3, 1, ANNOUNCEMENT) == [Began(3, 1), *entries]


@settings(deadline=None, max_examples=50)
@given(entries=ENTRIES, data=st.data())
def test_a_write_that_a_crash_cut_off_is_dropped_and_the_journal_goes_on(entries, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("journal") / "journal"
    write(path, entries)
    before = path.stat().st_size
    last = Accepted("mask", "client", b"x" * 40)
    write(path, [*entries, last])
    whole = path.read_bytes()
    cut = data.draw(st.integers(before, len(whole) - 1))
    path.write_bytes(whole[:cut])
    journal = RoundJournal(path)
    assert journal.open(3, 1, ANNOUNCEMENT) == [Began(3, 1), *entries]
    journal.write(last)
    assert path.read_bytes() == whole


def test_a_last_record_whose_content_the_disk_lost_is_dropped(tmp_path):
    path = tmp_path / "journal"
    write(path, [Closed("mask", 1.0), Accepted("confirm", "client", b"x" * 40)])
    content = path.read_bytes()
    path.write_bytes(content[:-10] + bytes(10))
    assert RoundJournal(path).open(3, 1, ANNOUNCEMENT) == [Began(3, 1), Closed("mask", 1.0)]


def test_damage_before_the_end_is_an_error(tmp_path):
    path = tmp_path / "journal"
    write(path, [Accepted("mask", "client", b"x" * 40), Closed("mask", 1.0)])
    content = bytearray(path.read_bytes())
    content[content.index(b"xxxx")] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match="checksum"):
        RoundJournal(path).open(3, 1, ANNOUNCEMENT)


@pytest.mark.parametrize("content", [b"", b"something else entirely, and long enough to hold a header" * 3])
def test_another_file_is_no_journal(content, tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match="not a journal"):
        RoundJournal(path).begun()


def test_a_journal_of_another_announcement_is_refused(tmp_path):
    path = tmp_path / "journal"
    write(path, [])
    with pytest.raises(RunDirectoryError, match="another announcement"):
        RoundJournal(path).open(3, 1, b"round 3, another adapter")


def test_a_removed_journal_is_gone_and_cannot_be_written(tmp_path):
    path = tmp_path / "journal"
    journal = RoundJournal(path)
    assert journal.begun() is None
    journal.open(0, 0, ANNOUNCEMENT)
    journal.remove()
    assert not path.exists()
    with pytest.raises(RunDirectoryError, match="not open"):
        journal.write(Closed("mask", 1.0))
    journal.remove()


@pytest.mark.parametrize("zeros", [1, 7, 12, 13, 4096])
def test_zeros_that_a_power_cut_left_are_dropped(zeros, tmp_path):
    path = tmp_path / "journal"
    write(path, [Closed("mask", 1.0)])
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(zeros))
    assert RoundJournal(path).open(3, 1, ANNOUNCEMENT) == [Began(3, 1), Closed("mask", 1.0)]
    assert path.read_bytes() == whole


def test_an_empty_record_with_more_behind_it_is_damage(tmp_path):
    path = tmp_path / "journal"
    write(path, [])
    path.write_bytes(path.read_bytes() + bytes(12) + b"something")
    with pytest.raises(RunDirectoryError, match="empty record") as caught:
        RoundJournal(path).entries()
    assert "counts as lost" in caught.value.hint
