"""A sweep runs every cell once, goes on after a stop, and writes one table."""

from __future__ import annotations

import math

import pyarrow.parquet as parquet
import pytest

from fedpt_secure.config import build
from fedpt_secure.data import Cache
from fedpt_secure.errors import ConfigError, RunDirectoryError
from fedpt_secure.progress import SILENT
from fedpt_secure.report import SweepGrid, cells_of, read_sweep, run_sweep
from fedpt_secure.report import sweep as sweep_module


def grid(**changes):
    return build(SweepGrid, {"epsilons": (4.0, math.inf), **changes}, command="sweep")


@pytest.fixture
def go(tiny_run_settings, tmp_path):
    def run(chosen, **groups):
        shared = {**tiny_run_settings, **groups}
        return run_sweep(chosen, shared, tmp_path / "sweep", cache=Cache(tmp_path / "cache"), progress=SILENT)

    return run


def test_the_cells_are_all_combinations_with_names_of_their_own(tiny_run_settings):
    cells = cells_of(grid(modes=("local", "distributed"), seeds=3, alphas=(0.5, 1.0)), tiny_run_settings)
    assert len(cells) == len({cell.name for cell in cells}) == 2 * 2 * 3 * 2
    assert {cell.config.seed for cell in cells} == {0, 1, 2}
    assert {(c.config.privacy.epsilon, c.config.privacy.mode, c.config.proxy.alpha) for c in cells} == {
        (e, m, a) for e in (4.0, math.inf) for m in ("local", "distributed") for a in (0.5, 1.0)
    }


def test_a_combination_that_is_not_acceptable_is_refused_before_anything_runs(tiny_run_settings):
    settings = {**tiny_run_settings, "training": {"local_steps": 2}}
    with pytest.raises(ConfigError, match="local_steps"):
        cells_of(grid(modes=("local", "distributed")), settings)


@pytest.mark.parametrize("bad", [{"epsilons": (4.0, 4.0)}, {"epsilons": ()}, {"epsilons": (math.nan,)}, {"seeds": 0}])
def test_a_bad_grid_is_refused(bad):
    with pytest.raises(ConfigError):
        grid(**bad)


def test_finished_cells_are_never_run_again_and_an_interrupted_sweep_goes_on(go, monkeypatch, tmp_path):
    real, calls = sweep_module.run_training, []

    def counted(config, directory, **options):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(directory.path.name)
        return real(config, directory, **options)

    monkeypatch.setattr(sweep_module, "run_training", counted)
    with pytest.raises(KeyboardInterrupt):
        go(grid())
    monkeypatch.setattr(sweep_module, "run_training", lambda c, d, **o: calls.append(d.path.name) or real(c, d, **o))
    result = go(grid())
    assert calls == ["e4-local-s0", "einf-local-s0"]
    assert result.finished == ("e4-local-s0", "einf-local-s0")
    rows = parquet.read_table(result.table).to_pylist()
    assert [row["status"] for row in rows] == ["finished", "finished"]
    assert [row["private"] for row in rows] == [True, False]
    assert rows[0]["epsilon_stated"] <= 4.0
    assert rows[1]["epsilon_stated"] is None
    assert rows[1]["epsilon"] == math.inf
    chosen, shared = read_sweep(tmp_path / "sweep")
    assert chosen == grid()
    assert shared["federation"] == {"rounds": 2, "cohort": 5}


def test_a_cell_whose_privacy_cannot_be_given_is_a_line_in_the_table_and_not_the_end(go):
    result = go(grid(epsilons=(1e-4, math.inf)))
    assert result.finished == ("einf-local-s0",)
    assert "epsilon" in result.refused["e0.0001-local-s0"]
    rows = {row["cell"]: row for row in parquet.read_table(result.table).to_pylist()}
    assert rows["e0.0001-local-s0"]["status"] == "refused"
    assert rows["e0.0001-local-s0"]["gain"] is None


def test_another_sweep_or_another_thing_in_the_directory_is_refused(go, tmp_path):
    place = tmp_path / "sweep"
    place.mkdir()
    (place / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirectoryError, match="no sweep"):
        go(grid())
    (place / "thesis.tex").unlink()
    sweep_module._claim(place, grid(), {})
    with pytest.raises(ConfigError, match="other settings"):
        go(grid())
