"""What a report is made of, before anybody decides how it looks: claims, tables, figures, and the files behind them.

HTML, Markdown and JSON are three renderings of one `Report`; none of them computes anything. Every table and figure
names the files of the run directory that its numbers come from (`sources`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fedpt_secure.errors import ConfigError

SCHEMA = "fedpt-secure/report/1"

Scale = Literal["linear", "log", "categories"]
Mark = Literal["line", "points", "bars", "step"]


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a figure.

    Attributes:
        label: what it measures, with the unit.
        scale: `categories` places `categories` side by side, evenly; positions are then 0, 1, ...
        categories: their names; empty for the other scales.
        low, high: ends of the axis, where they matter (a probability's 0 and 1); otherwise they follow from the data.
    """

    label: str
    scale: Scale = "linear"
    categories: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """One set of marks.

    Attributes:
        name: as the legend has it.
        mark: how it is drawn.
        x, y: positions, same length, finite.
        low, high: ends of each value's interval, same length as `y`; empty where there is none.
        colour: index into the palette; series that mean the same thing in two figures share it.
    """

    name: str
    mark: Mark
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    colour: int = 0

    def __post_init__(self) -> None:
        lengths = {len(self.x), len(self.y)} | ({len(self.low), len(self.high)} if self.low or self.high else set())
        if len(lengths) != 1 or not self.x:
            raise ConfigError(
                f"series {self.name!r} has {len(self.x)} x, {len(self.y)} y and {len(self.low)} intervals"
            )
        if not all(map(math.isfinite, (*self.x, *self.y, *self.low, *self.high))):
            raise ConfigError(f"series {self.name!r} holds a value that is not finite")


@dataclass(frozen=True, slots=True)
class Figure:
    """One plot, as data.

    Attributes:
        key: unique in the report; names exported files.
        caption: what to see in it, and what not to conclude.
    """

    key: str
    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    caption: str
    sources: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.series:
            raise ConfigError(f"figure {self.key!r} has nothing to draw")
        for axis, values in ((self.x, [v for s in self.series for v in s.x]), (self.y, self._heights())):
            if axis.scale == "log" and min(values) <= 0:
                raise ConfigError(f"figure {self.key!r}: {min(values)} has no place on the log axis {axis.label!r}")

    def _heights(self) -> list[float]:
        return [value for series in self.series for value in (*series.y, *series.low, *series.high)]


@dataclass(frozen=True, slots=True)
class Table:
    """One table; cells are text already."""

    key: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str
    sources: tuple[str, ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ConfigError(f"table {self.key!r}: a row of {len(row)} cells under {len(self.header)} headings")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report under a heading."""

    key: str
    title: str
    text: tuple[str, ...] = ()
    items: tuple[Figure | Table, ...] = ()


@dataclass(frozen=True, slots=True)
class Headline:
    """The first screen: what somebody who reads nothing else must know.

    Attributes:
        claim: the privacy claim, one sentence.
        private: whether anything is promised at all.
        utility: what tuning gained, with its interval.
        verdict: the audit's, or that there was none.
        verdict_kind: for how it is marked.
        assumptions: what must be true for the claim to hold.
    """

    claim: str
    private: bool
    utility: str
    verdict: str
    verdict_kind: Literal["no violation detected", "violation", "not audited"]
    assumptions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """A report.

    Attributes:
        subject: name of the run that the headline speaks of.
        runs: names of all runs in it, the subject first.
        versions: of the software that made the report.
    """

    title: str
    subject: str
    runs: tuple[str, ...]
    headline: Headline
    sections: tuple[Section, ...]
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = [item.key for section in self.sections for item in section.items]
        keys += [section.key for section in self.sections]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ConfigError(f"the report has {', '.join(sorted(twice))} twice")

    @property
    def figures(self) -> list[Figure]:
        """All figures, in reading order."""
        return [item for section in self.sections for item in section.items if isinstance(item, Figure)]

    def to_json(self) -> dict[str, Any]:
        """The report for programs; schema `fedpt-secure/report/1` (docs/reports.md)."""
        return {
            "schema": SCHEMA,
            "title": self.title,
            "subject": self.subject,
            "runs": list(self.runs),
            "headline": {
                "claim": self.headline.claim,
                "private": self.headline.private,
                "utility": self.headline.utility,
                "verdict": self.headline.verdict,
                "verdict_kind": self.headline.verdict_kind,
                "assumptions": list(self.headline.assumptions),
            },
            "sections": [
                {
                    "key": section.key,
                    "title": section.title,
                    "text": list(section.text),
                    "items": [_figure(item) if isinstance(item, Figure) else _table(item) for item in section.items],
                }
                for section in self.sections
            ],
            "versions": self.versions,
        }


def _figure(figure: Figure) -> dict[str, Any]:
    return {
        "kind": "figure",
        "key": figure.key,
        "title": figure.title,
        "caption": figure.caption,
        "sources": list(figure.sources),
        "x": _axis(figure.x),
        "y": _axis(figure.y),
        "series": [
            {
                "name": series.name,
                "mark": series.mark,
                "x": list(series.x),
                "y": list(series.y),
                "low": list(series.low),
                "high": list(series.high),
            }
            for series in figure.series
        ],
    }


def _axis(axis: Axis) -> dict[str, Any]:
    return {"label": axis.label, "scale": axis.scale, "categories": list(axis.categories)}


def _table(table: Table) -> dict[str, Any]:
    return {
        "kind": "table",
        "key": table.key,
        "title": table.title,
        "caption": table.caption,
        "sources": list(table.sources),
        "header": list(table.header),
        "rows": [list(row) for row in table.rows],
    }
