"""All that is used of Flower is there, and what is missing has a name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fedpt_secure.flower
from fedpt_secure.errors import ConfigError
from fedpt_secure.flower import compatibility

pytest.importorskip("flwr")


def test_the_installed_flower_has_all_that_is_used():
    compatibility.require_compatible()


def test_what_is_missing_is_named_with_the_release(monkeypatch):
    monkeypatch.setattr(compatibility, "REQUIRED", {"flwr.app": ("Message", "NoSuchName"), "flwr.no_such": ("x",)})
    with pytest.raises(ConfigError, match=r"Flower 1\.\d+.*NoSuchName.*flwr\.no_such"):
        compatibility.require_compatible()


def test_no_flower_is_an_error_with_the_command(monkeypatch):
    monkeypatch.setattr(compatibility.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        compatibility.require_installed()
    assert caught.value.hint == 'pip install "fedpt-secure[flower]"'


def test_every_name_that_is_imported_is_in_the_list():
    used = set()
    for path in Path(fedpt_secure.flower.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
                used |= {(node.module, alias.name) for alias in node.names}
    types_only = {("flwr.app", "Context"), ("flwr.serverapp", "Grid")}
    modules = {("flwr.superlink", "extensions"), ("flwr.supernode", "start_client_internal")}
    listed = {(module, name) for module, names in compatibility.REQUIRED.items() for name in names}
    assert used - types_only - modules <= listed
    assert {f"{module}.{name}" for module, name in modules} <= set(compatibility.REQUIRED)
