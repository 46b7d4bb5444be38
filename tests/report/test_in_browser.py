"""The report as people open it: no error, nothing from outside, every figure drawn, all of it by keyboard."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fedpt_secure.report import compose_report, write_report

_SPEC = importlib.util.spec_from_file_location("browser", Path(__file__).parent.parent / "browser.py")
browser = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(browser)


@pytest.fixture(scope="module")
def page_file(finished_runs, tmp_path_factory):
    report = compose_report(list(finished_runs.values()))
    return write_report(report, tmp_path_factory.mktemp("page"))[0], report


@pytest.fixture(scope="module")
def page(page_file, tmp_path_factory):
    with browser.chromium(tmp_path_factory.mktemp("profile")) as driver:
        driver.get(page_file[0].as_uri())
        yield driver


def test_the_console_holds_no_error_and_nothing_was_asked_from_outside(page, page_file):
    assert [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    urls = browser.requested_urls(page)
    assert page_file[0].as_uri() in urls
    own = (page_file[0].as_uri(), "data:", "chrome:")  # the browser's own start page is not ours
    assert [url for url in urls if not url.startswith(own)] == []


def test_every_figure_is_drawn_with_its_values(page, page_file):
    figures = page.find_elements("css selector", "figure")
    assert len(figures) == len(page_file[1].figures) >= 5
    for figure in figures:
        chart = figure.find_element("css selector", "svg")
        assert chart.size["height"] > 100
        assert figure.find_elements("css selector", "svg .mark, svg .line")
        assert figure.find_elements("css selector", "table tbody tr")


def test_arrow_keys_step_through_the_values_of_a_figure(page):
    chart = page.find_element("css selector", "figure svg")
    page.execute_script("arguments[0].focus()", chart)
    assert page.execute_script("return document.activeElement === arguments[0]", chart)
    chart.send_keys("\ue014")  # arrow right
    reading = page.find_element("css selector", "figure .reading")
    first = reading.text
    assert first == page.find_element("css selector", "figure .mark").get_attribute("data-text")
    chart.send_keys("\ue014")
    assert reading.text != first
    chart.send_keys("\ue00c")  # escape
    assert reading.text == ""


def test_figures_can_be_saved(page):
    saved = page.execute_script(
        """
        const kept = [];
        HTMLAnchorElement.prototype.click = function () { kept.push([this.download, this.href.slice(0, 5)]); };
        const figure = document.querySelector("figure");
        for (const kind of ["svg", "csv"]) figure.querySelector(`[data-save=${kind}]`).click();
        return [kept, standalone(figure)];
        """
    )
    key = page.find_element("css selector", "figure svg").get_attribute("data-key")
    assert saved[0] == [[f"{key}.svg", "blob:"], [f"{key}.csv", "blob:"]]
    assert "stroke: rgb(" in saved[1]
    assert "var(--" not in saved[1]


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_the_first_screen_without_sideways_scrolling(page_file, tmp_path, dark):
    with browser.chromium(tmp_path / "profile", width=400, height=850, dark=dark) as driver:
        driver.set_window_size(400, 850)
        driver.get(page_file[0].as_uri())
        wide, seen = driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= seen
        ground = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
