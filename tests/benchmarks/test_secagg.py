"""The benchmark in miniature: it runs, its JSON has the promised shape, and it does not time wrong sums."""

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fedpt_secure.crypto import SecAggClient

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--clients", "3,5", "--elements", "1000", "--limit-elements", "20000", "--rounds", "1", "--threads", "2"]
NAMES = ["secagg", *(path.stem for path in BENCHMARKS.glob("secagg_*.py"))]


@pytest.fixture(scope="module")
def benchmark():
    """Its modules by name, imported as its script does, and forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def saved(benchmark, tmp_path_factory):
    """A file with the JSON of one tiny run."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert benchmark["secagg"].main([*TINY, "--no-flower", "--json"]) == 0
    path = tmp_path_factory.mktemp("secagg") / "results.json"
    path.write_text(output.getvalue())
    return path


def test_the_json_has_what_it_promises(saved):
    results = json.loads(saved.read_text())
    assert results["fraction_of_aes_limit"] > 0
    assert [limits["threads"] for limits in results["limits"]] == [1, 2]
    assert [cost["n"] for cost in results["protocol"]] == [3, 5]
    for cost in results["protocol"]:
        assert cost["elements"] == 1000
        assert cost["client_seconds"] > 0
        assert cost["server_seconds"] > 0
        # 32 bits an element, and the keys, shares and signatures of few clients.
        assert 4000 < cost["client_bytes"] < 6000
        assert cost["server_peak_mb"] is None or cost["server_peak_mb"] >= 0
        assert set(cost["phase_seconds"]) == {"advertise", "share", "encode", "mask", "confirm", "unmask"}


def test_a_part_that_is_left_out_is_named(benchmark, capsys, monkeypatch):
    """Without flwr, whether it is installed here or not."""
    monkeypatch.setattr(benchmark["secagg"], "flower_is_missing", lambda: "flwr is not installed")
    monkeypatch.setattr(benchmark["secagg"], "flower_version", lambda: None)
    assert benchmark["secagg"].main([*TINY, "--clients", "3", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["vs_flower"] == []
    assert results["vs_flower_left_out"] == "flwr is not installed"
    assert "left out: flwr is not installed" in benchmark["secagg_report"].markdown(results)


def test_a_wrong_sum_ends_the_benchmark(benchmark, capsys, monkeypatch):
    """One client masks another vector than the one that is counted."""
    honest = SecAggClient.mask

    def dishonest(self, inbox, vector):
        return honest(self, inbox, vector + (np.arange(vector.size) == 7).astype(vector.dtype))

    monkeypatch.setattr(SecAggClient, "mask", dishonest)
    assert benchmark["secagg"].main([*TINY, "--no-flower"]) == 1
    output = capsys.readouterr()
    assert "is not the sum" in output.err
    assert not output.out


@pytest.mark.parametrize("spoil", [lambda total: total + np.uint32(1), lambda total: total[:-1], np.int64])
def test_the_check_compares_value_shape_and_type(benchmark, spoil):
    total = np.arange(10, dtype=np.uint32)
    benchmark["secagg_timing"].check_sum(total, total.copy(), "the same")
    with pytest.raises(benchmark["secagg_timing"].WrongSum):
        benchmark["secagg_timing"].check_sum(spoil(total), total, "another")


def test_results_can_be_shown_again_as_markdown(benchmark, saved, capsys):
    assert benchmark["secagg"].main(["--from", str(saved), "--markdown"]) == 0
    table = capsys.readouterr().out
    assert "a client's round, n = 5 (complete, t = " in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_the_figures_are_drawn(benchmark, saved, tmp_path):
    pytest.importorskip("matplotlib")
    results = json.loads(saved.read_text())
    for path in benchmark["secagg_report"].plot(results, tmp_path / "figures"):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_flower_beside_ours_computes_what_it_should(benchmark):
    """Runs where flwr is installed. The ratios are of toy sizes and mean nothing."""
    pytest.importorskip("flwr")
    flower = benchmark["secagg_flower"]
    flower.check_flower()
    cohort = flower.FlowerCohort(5, 3, lambda: None)
    compared = flower.compare_with_flower(cohort, 1000, threads=2, rounds=1, advance=lambda: None)
    assert min(compared.client_ratio, compared.client_step_ratio, compared.server_ratio) > 0
