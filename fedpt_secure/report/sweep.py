"""A grid of runs: the same data under several epsilons, modes, seeds, cohorts; one table of results.

    sweeps/NAME/sweep.toml        the grid and the settings all cells share
    sweeps/NAME/cells/CELL/       a run directory each
    sweeps/NAME/results.parquet   one line per cell that is finished or was refused

A finished cell is never run again; an interrupted one goes on from its checkpoint. Every cell is a run of its own with
its own promise: the same records in several cells cost their owners the *sum*, which is why a sweep is for data whose
owners agreed to that, or for public stand-ins. The report says so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, field_validator

from fedpt_secure import files
from fedpt_secure.config import Count, RunConfig, Settings, build, overlay, read_settings
from fedpt_secure.data import Cache
from fedpt_secure.errors import ConfigError, PrivacyError, RoundError, RunDirectoryError
from fedpt_secure.federation import RunDirectory, aggregation_of, run_training
from fedpt_secure.progress import Progress
from fedpt_secure.report.summary import summarise

Mode = Literal["local", "distributed", "client"]
Epsilon = Annotated[float, Field(gt=0)]
Listed = Annotated[tuple[Epsilon, ...], Field(min_length=1, strict=False)]


class SweepGrid(Settings):
    """What varies; the cells are all combinations.

    Epsilons are promises per cell; the other axes take the shared settings' value where they are empty.
    """

    epsilons: Listed
    modes: Annotated[tuple[Mode, ...], Field(strict=False)] = ()
    seeds: Annotated[int, Field(ge=1, le=1000)] = 1
    """Cells per combination, with the seeds s, s + 1, ... from the shared settings' seed s on."""
    cohorts: Annotated[tuple[Annotated[int, Field(ge=3)], ...], Field(strict=False)] = ()
    clients: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    """To how many clients the records are dealt, where the data has no client column."""
    alphas: Annotated[tuple[Annotated[float, Field(ge=0, le=10)], ...], Field(strict=False)] = ()

    @field_validator("epsilons", "modes", "cohorts", "clients", "alphas")
    @classmethod
    def _each_once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if any(isinstance(value, float) and math.isnan(value) for value in values):
            raise ValueError("nan is no value of a grid")
        if len(set(values)) != len(values):
            raise ValueError("a value is there twice; every cell is run once")
        return values


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a sweep."""

    name: str
    config: RunConfig


@dataclass(frozen=True, slots=True)
class SweepResult:
    """Attributes:
    finished: names of the cells with a result.
    refused: cell -> why it cannot be run.
    """

    finished: tuple[str, ...]
    refused: Mapping[str, str]
    table: Path


def cells_of(grid: SweepGrid, shared: Mapping[str, Any]) -> tuple[Cell, ...]:
    """All combinations, as validated run configurations, in the order of the grid.

    Raises:
        ConfigError: a combination is not acceptable; all are checked before the first is run.
    """
    base = build(RunConfig, shared)
    made = []
    for mode, cohort, clients, alpha, epsilon, offset in itertools.product(
        grid.modes or (base.privacy.mode,),
        grid.cohorts or (base.federation.cohort,),
        grid.clients or (base.data.clients,),
        grid.alphas or (base.proxy.alpha,),
        grid.epsilons,
        range(grid.seeds),
    ):
        changes: dict[str, Any] = {
            "seed": base.seed + offset,
            "privacy": {"epsilon": epsilon, "mode": mode},
            "proxy": {"alpha": alpha},
        }
        if cohort is not None:
            changes["federation"] = {"cohort": cohort}
        if clients is not None:
            changes["data"] = {"clients": clients}
        name = f"e{epsilon:g}-{mode}"
        name += f"-c{cohort}" if grid.cohorts else ""
        name += f"-n{clients}" if grid.clients else ""
        name += f"-a{alpha:g}" if grid.alphas else ""
        made.append(Cell(f"{name}-s{base.seed + offset}", build(RunConfig, overlay(dict(shared), changes))))
    return tuple(made)


def run_sweep(
    grid: SweepGrid, shared: Mapping[str, Any], directory: Path, *, cache: Cache, progress: Progress
) -> SweepResult:
    """Run what is not finished, and write the table after every cell.

    A cell whose privacy or rounds are refused gets a line that says why, and the sweep goes on; any other error ends
    it, with everything finished so far kept.

    Raises:
        ConfigError: a combination is not acceptable, or the directory holds a sweep of other settings.
        FedptError: what ended a cell (`errors.py`).
    """
    cells = cells_of(grid, shared)
    _claim(directory, grid, shared)
    refused: dict[str, str] = {}
    with progress.task("cells", len(cells), unit="cells") as bar:
        for cell in cells:
            path = directory / "cells" / cell.name
            if not (path / "summary.json").exists():
                try:
                    _run_cell(cell, path, cache, progress)
                except (PrivacyError, RoundError) as error:
                    refused[cell.name] = error.message
                    progress.note(f"{cell.name} is refused: {error.message}")
            _write_table(directory, cells, refused)
            bar.describe(cell.name)
            bar.advance()
    return SweepResult(
        finished=tuple(c.name for c in cells if (directory / "cells" / c.name / "summary.json").exists()),
        refused=refused,
        table=directory / "results.parquet",
    )


def _run_cell(cell: Cell, path: Path, cache: Cache, progress: Progress) -> None:
    aggregation_of(cell.config)
    if (path / "checkpoint" / "state.safetensors").exists():
        run = RunDirectory.open(path)
        run.require_settings(_given(cell.config))
        config = run.config()
    else:
        config = cell.config
        run = RunDirectory.create(path, config)
    result = run_training(config, run, cache=cache, progress=progress)
    files.write_json(path / "summary.json", summarise(result))


def _given(config: RunConfig) -> dict[str, Any]:
    """The cell's settings less those that are only settled once the clients are counted."""
    settings = config.model_dump()
    if settings["federation"]["cohort"] is None:
        del settings["federation"]["cohort"]
    return settings


def _claim(directory: Path, grid: SweepGrid, shared: Mapping[str, Any]) -> None:
    """Begin a sweep in the directory, or make sure that the one in it is this one.

    Raises:
        ConfigError: it is another.
        RunDirectoryError: the directory holds something that is no sweep.
    """
    wanted = tomli_w.dumps({"grid": _plain(grid.model_dump()), "shared": _plain(dict(shared))})
    path = directory / "sweep.toml"
    if path.exists():
        if path.read_text(encoding="utf-8") != wanted:
            raise ConfigError(
                f"{directory} holds a sweep of other settings",
                hint="another --out; or the same options as before, which are in its sweep.toml",
            )
        return
    if directory.exists() and any(directory.iterdir()):
        raise RunDirectoryError(f"{directory} holds something that is no sweep", hint="an empty or new --out")
    files.write_text(path, wanted)


def read_sweep(directory: Path) -> tuple[SweepGrid, dict[str, Any]]:
    """The grid and the shared settings of a sweep that was begun.

    Raises:
        ConfigError: `sweep.toml` is missing or damaged.
    """
    settings = read_settings(directory / "sweep.toml")
    shared = settings.get("shared", {})
    if not isinstance(shared, dict):
        raise ConfigError(f"{directory / 'sweep.toml'} is damaged: shared is no table")
    return build(SweepGrid, settings.get("grid", {}), command="sweep"), shared


def _plain(settings: Any) -> Any:
    """Without what TOML cannot hold (None), tuples as lists."""
    if isinstance(settings, Mapping):
        return {key: _plain(value) for key, value in settings.items() if value is not None}
    return [_plain(value) for value in settings] if isinstance(settings, list | tuple) else settings


def _write_table(directory: Path, cells: tuple[Cell, ...], refused: Mapping[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = [_row(directory, cell, refused) for cell in cells]
    rows = [row for row in rows if row is not None]
    if not rows:
        return
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows, schema=_schema(pa)), sink)
    files.write_bytes(directory / "results.parquet", sink.getvalue().to_pybytes())


_NUMBERS = (
    *(
        f"{arm}_{part}"
        for arm in ("large_base", "small_base", "small_tuned", "proxy_tuned")
        for part in ("loss", "low", "high")
    ),
    "gain",
    "gain_low",
    "gain_high",
    "fraction_improved",
    "epsilon_stated",
    "seconds",
)
_COUNTS = ("records", "tokens", "rounds", "rounds_aborted", "trained_parameters", "bytes_up", "bytes_down")


def _schema(pa: Any) -> Any:
    """One schema whatever the cells hold, so that tables of several sweeps can be joined."""
    return pa.schema(
        [
            ("cell", pa.string()),
            ("status", pa.string()),
            ("refused", pa.string()),
            ("data", pa.string()),
            ("mode", pa.string()),
            ("epsilon", pa.float64()),
            ("delta", pa.float64()),
            ("seed", pa.int64()),
            ("cohort", pa.int64()),
            ("alpha", pa.float64()),
            ("private", pa.bool_()),
            *((name, pa.float64()) for name in _NUMBERS),
            *((name, pa.int64()) for name in _COUNTS),
        ]
    )


def _row(directory: Path, cell: Cell, refused: Mapping[str, str]) -> dict[str, Any] | None:
    from fedpt_secure.report.run_record import load_run

    config = cell.config
    row: dict[str, Any] = {
        "cell": cell.name,
        "status": "refused",
        "refused": refused.get(cell.name),
        "data": config.data.source,
        "mode": config.privacy.mode,
        "epsilon": config.privacy.epsilon,
        "delta": config.privacy.delta,
        "seed": config.seed,
        "cohort": config.federation.cohort,
        "alpha": config.proxy.alpha,
        "private": False,
    }
    path = directory / "cells" / cell.name
    if not (path / "summary.json").exists():
        return row if cell.name in refused else None
    summary = load_run(path, cell.name).summary
    row |= {"status": "finished", "refused": None, "private": summary["private"]}
    row["cohort"] = summary["training"]["cohort"]
    for arm, found in summary["arms"].items():
        row |= {f"{arm}_loss": found["loss"], f"{arm}_low": found["ci"][0], f"{arm}_high": found["ci"][1]}
    gain = summary["improvement"]
    row |= {"gain": gain["loss"], "gain_low": gain["ci"][0], "gain_high": gain["ci"][1]}
    row["fraction_improved"] = gain["fraction_improved"]
    row["epsilon_stated"] = summary["privacy"]["epsilon"]
    row["seconds"] = sum(value for name, value in summary["seconds"].items() if "." not in name)
    row |= {name: summary["evaluation"][name] for name in ("records", "tokens")}
    row |= {name: summary["training"][name] for name in ("rounds", "rounds_aborted", "trained_parameters")}
    row |= {"bytes_up": summary["bytes"]["up_total"], "bytes_down": summary["bytes"]["down_total"]}
    return row
