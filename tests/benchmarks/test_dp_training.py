"""The benchmark in miniature: it runs, its JSON has the promised shape, and wrong norms and extra memory are seen."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ["dp_training", *(path.stem for path in BENCHMARKS.glob("dp_training_*.py"))]
TINY = ["--cases", "default", "--examples", "2", "--longest", "16", "--batch", "2", "--repetitions", "1"]


@pytest.fixture(scope="module")
def benchmark():
    """Its modules by name, imported as its script does, and forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tiny(benchmark):
    """The default case in miniature, its model and its examples."""
    cases = benchmark["dp_training_cases"]
    case = replace(cases.CASES[0], examples=2, longest=16)
    small = cases.build(case)
    return case, small, cases.make_examples(case, small)


@pytest.fixture(scope="module")
def saved(benchmark, tiny, tmp_path_factory):
    """A file with the JSON of one tiny run; in this process and with one model, as loading more takes seconds."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        for module in ("dp_training", "dp_training_measure"):
            patch.setattr(benchmark[module], "build", lambda case: tiny[1])
        patch.setattr(benchmark["dp_training"], "memory_in_a_fresh_process", benchmark["dp_training"].peak_memory)
        assert benchmark["dp_training"].main([*TINY, "--device", "cpu", "--json"]) == 0
    path = tmp_path_factory.mktemp("dp_training") / "results.json"
    path.write_text(output.getvalue())
    return path


def test_the_json_has_the_three_figures_with_bars(saved):
    default = json.loads(saved.read_text())["default"]
    assert default["throughput_ratio"] > 0
    assert default["memory_ratio"] is None or default["memory_ratio"] > 0
    assert 0 <= default["max_norm_error"] <= 1e-5
    assert default["trained_parameters"] == 18_432


def test_every_method_is_measured_alone_and_in_shared_passes(saved):
    default = json.loads(saved.read_text())["default"]
    rows = {(row["method"], row["examples_per_pass"]): row for row in default["variants"]}
    assert set(rows) == {(m, size) for m in ("non-private", "bookkeeping", "hooks", "ghost") for size in (1, 2)}
    assert all(row["max_norm_error"] <= 1e-5 for (method, _), row in rows.items() if method != "non-private")
    # The floor: one forward pass and one backward pass down to the lowest trained layer, and nothing else.
    assert rows["bookkeeping", 1]["flops_ratio"] == 1
    assert rows["ghost", 1]["flops_ratio"] > 1.1
    assert set(default["rounding"]) == {"float32", "bfloat16"}


@pytest.mark.parametrize("form", [[], ["--markdown"], ["--json"]])
def test_saved_results_are_shown_again(benchmark, saved, form, capsys):
    assert benchmark["dp_training"].main(["--from", str(saved), *form]) == 0
    shown = capsys.readouterr().out
    assert "bookkeeping x1" in shown
    assert all(key in shown for key in (["throughput_ratio"] if form == ["--json"] else ["Default", "18,432"]))


def test_a_wrong_norm_is_seen(benchmark, tiny, monkeypatch):
    measure, cases = benchmark["dp_training_measure"], benchmark["dp_training_cases"]
    _, small, examples = tiny
    right = cases.sum_with
    monkeypatch.setattr(measure, "sum_with", lambda *args: replace(right(*args), norms=right(*args).norms * 1.0001))
    errors = measure.norm_errors(small, examples, [cases.DEFAULT])
    assert errors[cases.DEFAULT.name] > 1e-5


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
def test_a_short_peak_of_memory_is_seen(benchmark, tiny, monkeypatch):
    measure, cases = benchmark["dp_training_measure"], benchmark["dp_training_cases"]
    extra = 200 << 20

    def wasteful(small, examples, variant):
        if variant.method == "hooks" and len(examples) > 1:
            np.ones(extra, dtype=np.uint8)

    monkeypatch.setattr(measure, "run", wasteful)
    monkeypatch.setattr(measure, "build", lambda case: tiny[1])
    chosen = [cases.DEFAULT, cases.Variant("hooks", 1)]
    memory = measure.peak_memory(tiny[0], chosen)
    assert memory["hooks x1"]["working"] > 0.95 * extra
    assert memory[cases.DEFAULT.name]["working"] < 0.1 * extra


def test_memory_comes_back_from_the_command(benchmark, tiny, monkeypatch, capsys):
    """What the fresh process is started with."""
    main = benchmark["dp_training"]
    monkeypatch.setattr(main, "peak_memory", lambda case, chosen: {chosen[0].name: asdict(case)})
    main.main(["--memory-of", json.dumps([asdict(tiny[0]), [asdict(benchmark["dp_training_cases"].DEFAULT)]])])
    assert json.loads(capsys.readouterr().out)["bookkeeping x1"]["examples"] == 2


def test_an_unknown_device_is_an_error_not_a_guess(benchmark, capsys):
    assert benchmark["dp_training"].main([*TINY, "--device", "abacus"]) == 1
    assert "abacus" in capsys.readouterr().err
