"""`tools/mutate_crypto.py` finds what it is meant to take out. It runs for half an hour; here it only plans."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _tool():
    spec = importlib.util.spec_from_file_location("mutate_crypto", ROOT / "tools" / "mutate_crypto.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where `dataclasses` looks for it
    spec.loader.exec_module(module)
    return module


TOOL = _tool()


@pytest.mark.parametrize("name", TOOL.MODULES)
def test_every_mutant_is_a_program_and_another_one(name):
    source = (ROOT / "crypto" / f"{name}.py").read_text()
    mutants = list(TOOL.mutants_of(ROOT, name))
    assert mutants
    for mutant in mutants:
        changed = source[: mutant.start] + mutant.replacement + source[mutant.stop :]
        assert changed != source
        ast.parse(changed)


@pytest.mark.parametrize("name", TOOL.MODULES)
def test_every_raise_under_a_condition_is_among_the_mutants(name):
    lines = (ROOT / "crypto" / f"{name}.py").read_text().splitlines()
    taken_out = {mutant.line for mutant in TOOL.mutants_of(ROOT, name) if mutant.kind in ("check", "handler")}
    for number, line in enumerate(lines, start=1):
        if re.match(r"\s+(if|elif) .*:$", line) and re.match(r"\s+raise\b", lines[number]):
            assert number in taken_out, f"{name}.py:{number}"


def test_what_is_excused_is_there_to_be_excused():
    keys = {mutant.key for name in TOOL.MODULES for mutant in TOOL.mutants_of(ROOT, name)}
    assert set(TOOL.EQUIVALENT) <= keys
    assert all(len(reason) > 20 for reason in TOOL.EQUIVALENT.values())
