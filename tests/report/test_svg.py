"""Figures as SVG: well-formed, every value reachable, ticks where the data is."""

from __future__ import annotations

from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from fedpt_secure.report.document import Axis, Figure, Series
from fedpt_secure.report.svg import HEIGHT, WIDTH, figure_svg, ticks

finite = st.floats(-1e6, 1e6).map(lambda value: round(value, 6))
positive = st.floats(1e-6, 1e6)


def drawn(figure):
    return ElementTree.fromstring(figure_svg(figure))  # noqa: S314  # our own output


def figure(series, x=None, y=None):
    return Figure("key", "A <title> & more", x or Axis("x"), y or Axis("y"), series, "caption", ("f",))


@given(
    st.lists(st.tuples(finite, finite), min_size=1, max_size=20), st.sampled_from(["line", "points", "step", "bars"])
)
def test_every_value_has_a_mark_inside_the_picture(points, mark):
    points = sorted(dict(points).items())
    series = Series("s", mark, tuple(x for x, _ in points), tuple(y for _, y in points))
    root = drawn(figure((series,)))
    marks = [element for element in root.iter() if element.get("class") == "mark"]
    assert len(marks) == len(points)
    for element in marks:
        for child in element:
            for name, limit in (("cx", WIDTH), ("cy", HEIGHT)):
                if child.get(name) is not None:
                    assert 0 <= float(child.get(name)) <= limit


@given(st.lists(positive, min_size=1, max_size=10, unique=True))
def test_log_axes_take_all_positive_values(values):
    series = Series("s", "points", tuple(values), tuple(values))
    drawn(figure((series,), Axis("x", "log"), Axis("y", "log")))


@given(finite, st.floats(1e-3, 1e6))
def test_linear_ticks_lie_on_the_axis_and_are_neither_too_few_nor_too_many(low, span):
    places = [place for place, _ in ticks(Axis("x"), low, low + span)]
    assert 2 <= len(places) <= 8
    assert all(low - 1e-6 * span <= place <= low + span * (1 + 1e-6) for place in places)


def test_text_is_escaped_and_values_are_told_with_their_intervals():
    series = Series('"a" <b>', "points", (0.0,), (2.5,), (2.0,), (3.0,))
    text = figure_svg(figure((series,), x=Axis("x", "categories", ("<one>",))))
    assert "<b>" not in text
    mark = next(element for element in ElementTree.fromstring(text).iter() if element.get("class") == "mark")  # noqa: S314
    assert mark.get("data-text") == '"a" <b>: <one>, 2.5 [2, 3]'


def test_long_lines_have_no_markers_but_still_a_path():
    places = tuple(map(float, range(500)))
    root = drawn(figure((Series("s", "line", places, places),)))
    assert [element for element in root.iter() if element.get("class") == "line"]
    assert not [element for element in root.iter() if element.get("class") == "mark"]


def test_bars_that_are_all_zero_are_drawn_on_an_axis_of_their_own():
    root = drawn(figure((Series("s", "bars", (0.0, 1.0), (0.0, 0.0)),)))
    assert len([element for element in root.iter() if element.get("class") == "mark"]) == 2
