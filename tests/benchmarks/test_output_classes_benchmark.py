"""The benchmark of sampled classes in miniature: the whole head is its own reference, and more classes come nearer."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WITH = ("output_classes", "utility_data", "utility_recipe")


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("output_classes")
    for name in WITH:
        sys.modules.pop(name, None)


def test_it_compares_every_way_with_the_whole_head(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "COUNTS", {"frequency": (64, 2048), "record": (384,)})
    assert benchmark.main(["--records", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["by"], row["classes"]) for row in rows] == [
        ("", "all"),
        ("frequency", 64),
        ("frequency", 2048),
        ("record", 384),
    ]
    whole, few, many, own = rows
    assert whole["record"] == pytest.approx(1.0)
    assert (whole["sum"], whole["length"]) == pytest.approx((1.0, 1.0))
    assert few["record"] < many["record"] < 1
    assert few["record"] < own["record"] < 1
    assert all(row["ms"] > 0 and row["adapter"] == "untrained" for row in rows)


def test_a_sum_that_is_wrong_in_one_way_is_told_from_records_that_are_wrong_in_many(benchmark):
    """Two ways of equal error per record: independent errors leave the sum's direction, a common one does not."""
    rng, wholes = np.random.default_rng(0), np.tile(np.eye(200)[0], (100, 1))
    many, one = benchmark.Kept(), benchmark.Kept()
    for whole in wholes:
        error = rng.standard_normal(200)
        many.add(whole + error / np.linalg.norm(error), whole)
        one.add(whole + np.eye(200)[1], whole)
    reference = benchmark.Kept()
    for whole in wholes:
        reference.add(whole, whole)
    rows = [benchmark._row("record", 9, kept, reference, 100) for kept in (many, one)]
    assert rows[0]["record"] == pytest.approx(rows[1]["record"], abs=0.05)
    assert rows[0]["sum"] > 0.95
    assert rows[1]["sum"] == pytest.approx(np.sqrt(0.5))


def test_more_records_than_there_are_are_refused(benchmark, capsys):
    assert benchmark.main(["--records", "1000000"]) != 0
    assert "have 6184 to train on" in " ".join(capsys.readouterr().err.split())


def test_a_run_without_a_checkpoint_is_refused(benchmark, tmp_path, capsys):
    assert benchmark.main(["--records", "1", "--run", str(tmp_path)]) != 0
    assert "is not a run directory" in " ".join(capsys.readouterr().err.split())
