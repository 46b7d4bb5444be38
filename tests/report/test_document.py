"""A report refuses what could not be drawn or read."""

from __future__ import annotations

import math

import pytest

from fedpt_secure.errors import ConfigError
from fedpt_secure.report.document import Axis, Figure, Headline, Report, Section, Series, Table


def figure(key="f", **changes):
    given = {
        "key": key,
        "title": "t",
        "x": Axis("x"),
        "y": Axis("y"),
        "series": (Series("s", "line", (1.0, 2.0), (3.0, 4.0)),),
        "caption": "c",
        "sources": ("run/file.json",),
    }
    return Figure(**{**given, **changes})


def test_a_series_needs_as_many_heights_as_places_and_both_ends_of_intervals():
    with pytest.raises(ConfigError, match="2 x, 1 y"):
        Series("s", "line", (1.0, 2.0), (3.0,))
    with pytest.raises(ConfigError, match="intervals"):
        Series("s", "line", (1.0,), (3.0,), low=(2.0,))
    with pytest.raises(ConfigError):
        Series("s", "line", (), ())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(value):
    with pytest.raises(ConfigError, match="not finite"):
        Series("s", "line", (1.0,), (value,))


def test_a_log_axis_refuses_zero():
    with pytest.raises(ConfigError, match="log axis"):
        figure(x=Axis("x", "log"), series=(Series("s", "line", (0.0, 1.0), (1.0, 2.0)),))


def test_a_figure_without_series_is_refused():
    with pytest.raises(ConfigError, match="nothing to draw"):
        figure(series=())


def test_a_table_needs_cells_for_all_headings():
    with pytest.raises(ConfigError, match="1 cells under 2"):
        Table("t", "t", ("a", "b"), (("1",),), "c", ())


def test_two_items_of_one_key_are_refused():
    headline = Headline("claim", True, "utility", "verdict", "not audited", ())
    with pytest.raises(ConfigError, match="twice"):
        Report("t", "s", ("s",), headline, (Section("one", "One", (), (figure("f"), figure("f"))),))
