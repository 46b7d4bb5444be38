"""Settings side by side: runs that are there are not repeated, and differences are paired over records."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fedpt_secure.errors import DataError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = [path.stem for path in BENCHMARKS.glob("utility*.py")]


@pytest.fixture(scope="module")
def screen():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("utility_screen")
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def command(screen, tiny_run, chat_file, tmp_path_factory):
    """Run a setting on tiny models and text; returns the exit code."""
    root = tmp_path_factory.mktemp("screen")

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDPT_CACHE", str(root / "cache"))
            source = {"source": str(chat_file), "client_column": "who", "text_column": "said"}
            patch.setattr(screen.utility, "data_settings", lambda name, folder: source)
            words = ["run", "--results", str(root / "results.jsonl"), "--data", "chat", *tiny_run, *arguments]
            return screen.main(words)

    return run, root / "results.jsonl"


def test_a_setting_is_run_once_and_compared_with_the_first(command, screen, capsys):
    run, results = command
    assert run("--name", "recipe", "--epsilon", "inf") == 0
    assert run("--name", "rank 1", "--epsilon", "inf", "--set", "lora.rank=1") == 0
    before = results.read_text()
    assert run("--name", "rank 1", "--epsilon", "inf", "--set", "lora.rank=1") == 0
    assert results.read_text() == before
    first, second = map(json.loads, before.splitlines())
    assert first["trained_parameters"] == 2 * second["trained_parameters"]
    assert first["digest"] == second["digest"]

    assert screen.main(["table", "--results", str(results)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].endswith("|  |")  # nothing to compare the first with
    after, reference = (np.sum(line["losses"]["proxy_tuned"]) for line in (second, first))
    assert f"{(after - reference) / np.sum(first['tokens']):+.4f} [" in rows[3]


def test_a_setting_that_cannot_be_leaves_no_line(command):
    run, results = command
    before = results.read_text() if results.exists() else ""
    assert run("--name", "nonsense", "--set", "lora.rank=0") != 0
    assert (results.read_text() if results.exists() else "") == before


def test_differences_are_paired_over_records(screen):
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 100, 200).astype(float)
    reference = tokens * rng.uniform(2, 6, 200)
    value, low, high = screen.difference(reference - 0.02 * tokens, reference, tokens)
    assert value == pytest.approx(-0.02)
    assert (low, high) == pytest.approx((-0.02, -0.02))  # however much records differ from each other
    value, low, high = screen.difference(reference + rng.normal(0, 5, 200), reference, tokens)
    assert low < 0 < high


def test_runs_on_other_records_are_not_compared(screen):
    line = {
        "data": "chat", "epsilon": "inf", "seed": 0, "digest": "a", "name": "one", "trained_parameters": 4,
        "minutes": 1.0, "tokens": [2, 3],
        "losses": {"large_base": [8.0, 9.0], "small_tuned": [9.0, 9.0], "proxy_tuned": [7.0, 8.0]},
    }  # fmt: skip
    rows = screen.table([line, line | {"name": "two", "digest": "b"}]).splitlines()
    assert all(row.endswith("|  |") for row in rows[2:])
    rows = screen.table([line, line | {"name": "two"}]).splitlines()
    assert rows[3].endswith("+0.0000 [+0.0000, +0.0000] |")
    with pytest.raises(DataError, match="no results"):
        screen.table([])
