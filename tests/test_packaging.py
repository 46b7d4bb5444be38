"""What is installed is one package, `fedpt_secure`, whole."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_package_list_is_the_tree():
    """`packages` is kept by hand; a folder with Python files that is not listed would be left out of the wheel."""
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = set()
    for top in ("fedpt_secure", "crypto", "attacks", "cli"):
        for path in (ROOT / top).rglob("*.py"):
            if any(part.is_symlink() for part in (path, *path.parents) if part != ROOT and ROOT in part.parents):
                continue
            name = ".".join(path.parent.relative_to(ROOT).parts)
            found.add(name if top == "fedpt_secure" else f"fedpt_secure.{name}")
    assert found == listed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    # The build backend is asked directly, so that nothing is downloaded.
    script = (
        f"import os, sys; from setuptools import build_meta as backend; print(backend.build_wheel({str(directory)!r}))"
    )
    source = tmp_path_factory.mktemp("source") / "project"
    subprocess.run(
        ["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(source)], check=True, capture_output=True
    )
    subprocess.run([sys.executable, "-c", script], cwd=source, check=True, capture_output=True)
    return zipfile.ZipFile(next(directory.glob("*.whl")))


def test_the_wheel_holds_only_the_package(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fedpt_secure"}


def test_the_wheel_holds_code_types_weights_and_licence(wheel):
    names = set(wheel.namelist())
    for expected in (
        "fedpt_secure/py.typed",
        "fedpt_secure/crypto/client.py",
        "fedpt_secure/cli/app.py",
        "fedpt_secure/lm/builtin/model.safetensors",
        "fedpt_secure/lm/builtin/tokenizer.json",
        "fedpt_secure/lm/builtin/public_text.txt",
    ):
        assert expected in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_built_in_proxy_is_under_thirty_megabytes(wheel):
    weights = wheel.getinfo("fedpt_secure/lm/builtin/model.safetensors")
    assert weights.file_size < 30e6


def test_the_trusted_core_imports_neither_torch_nor_the_rest():
    script = (
        "import sys, fedpt_secure.crypto; "
        "bad = [name for name in sys.modules if name.split('.')[0] in ('torch', 'transformers') "
        "or (name.startswith('fedpt_secure.') and not name.startswith(('fedpt_secure.crypto', 'fedpt_secure.err')))]; "
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_flowers_pins_and_ours_intersect():
    """pip would otherwise go back to releases that are years old, without a word. CI installs both jointly."""
    pytest.importorskip("flwr")
    from importlib import metadata

    from packaging.requirements import Requirement
    from packaging.version import Version

    extras = PROJECT["project"]["optional-dependencies"]
    assert any(entry.startswith("fedpt-secure[") and "flower" in entry for entry in extras["test"])
    flower = next(entry for entry in map(Requirement, extras["flower"]) if entry.name == "flwr")
    assert Version(metadata.version("flwr")) in flower.specifier
    assert Version("1.39") not in flower.specifier
    theirs = {
        requirement.name.lower(): requirement
        for requirement in map(Requirement, metadata.requires("flwr") or [])
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }
    ours = [Requirement(entry) for entry in (*PROJECT["project"]["dependencies"], *extras["serve"])]
    shared = [requirement for requirement in ours if requirement.name.lower() in theirs]
    assert {"typer", "rich", "cryptography"} <= {requirement.name for requirement in shared}
    for requirement in shared:
        installed = Version(metadata.version(requirement.name))
        both = requirement.specifier & theirs[requirement.name.lower()].specifier
        assert installed in both, f"{requirement.name} {installed} is not in {both}"
