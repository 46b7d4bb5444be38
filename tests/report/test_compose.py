"""From run directories to a report in three formats, and what is refused on the way."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from fedpt_secure.errors import ConfigError, RunDirectoryError
from fedpt_secure.report import compose_report, render_html, render_markdown, write_report


class Page(HTMLParser):
    """Tags and attributes of a page, and its text."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def report(runs):
    return compose_report([runs["bare"], runs["private"]])


def test_the_private_run_is_the_subject_and_its_claim_comes_first(report, runs):
    privacy = json.loads((runs["private"] / "privacy.json").read_text())
    assert report.subject == "private"
    assert report.runs == ("private", "bare")
    assert report.headline.claim == privacy["claim"]
    assert report.headline.assumptions == tuple(privacy["assumptions"])
    assert report.headline.verdict_kind == "not audited"


def test_a_run_without_privacy_is_never_shown_as_private(runs):
    report = compose_report([runs["bare"]])
    assert report.headline.private is False
    assert report.headline.claim.startswith("NOT PRIVATE")
    assert 'class="card bad"><strong>Privacy' in render_html(report)


def test_every_number_of_the_summary_arms_is_in_the_page(report, runs):
    text = "".join(Page(render_html(report)).words)
    summary = json.loads((runs["private"] / "summary.json").read_text())
    for arm in summary["arms"].values():
        assert f"{arm['loss']:.4f}" in text


def test_every_item_names_the_files_it_comes_from(report, runs):
    for section in report.sections:
        for item in section.items:
            assert item.sources
            for source in item.sources:
                name, _, file = source.partition("/")
                assert (runs[name] / file).exists(), source


def test_the_page_asks_for_nothing_from_outside(report):
    page = Page(render_html(report))
    for tag, attributes in page.tags:
        for key in ("src", "href", "action", "data"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    assert "default-src 'none'" in next(a["content"] for t, a in page.tags if a.get("http-equiv"))


def test_names_from_outside_cannot_become_markup(runs, change_json):
    hostile = "<script>alert(1)</script>|`*"
    summary = json.loads((runs["private"] / "summary.json").read_text())
    summary["data"]["name"] = hostile
    (runs["private"] / "summary.json").write_text(json.dumps(summary))
    report = compose_report([runs["private"]])
    assert render_html(report).count("<script>") == 1
    assert "<script>alert" not in render_html(report)
    assert "<script>" not in render_markdown(report)


def test_the_three_files_hold_the_same_report(report, tmp_path):
    html, markdown, data = write_report(report, tmp_path / "out")
    parsed = json.loads(data.read_text())
    assert parsed["schema"] == "fedpt-secure/report/1"
    assert parsed["headline"]["claim"] in "".join(Page(html.read_text()).words)
    plain = re.sub(r"\\(.)", r"\1", markdown.read_text())
    assert parsed["headline"]["claim"] in plain
    titles = [item["title"] for section in parsed["sections"] for item in section["items"]]
    assert titles
    assert all(title in plain for title in titles)


def test_every_figure_has_data_and_a_table_of_its_values(report):
    assert len(report.figures) >= 5
    page = render_html(report)
    assert page.count("<figure ") == len(report.figures) == page.count("<summary>Values")
    assert all(len(series.y) for figure in report.figures for series in figure.series)


def test_an_unfinished_run_is_refused(runs):
    (runs["private"] / "summary.json").unlink()
    with pytest.raises(RunDirectoryError, match="has not finished"):
        compose_report([runs["private"]])


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema": "fedpt-secure/summary/9"}', "\ud800".encode("utf-8", "surrogatepass")]
)
def test_a_damaged_summary_is_refused(runs, content):
    path = runs["private"] / "summary.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunDirectoryError, match=r"summary\.json"):
        compose_report([runs["private"]])


def test_a_summary_with_a_figure_that_is_no_number_is_refused(runs):
    path = runs["private"] / "summary.json"
    summary = json.loads(path.read_text())
    summary["arms"]["proxy_tuned"]["loss"] = "3.9"
    path.write_text(json.dumps(summary))
    with pytest.raises(RunDirectoryError, match="no number"):
        compose_report([runs["private"]])


def test_a_directory_that_holds_runs_stands_for_them_and_an_empty_one_is_refused(runs, tmp_path):
    assert set(compose_report([tmp_path]).runs) == {"private", "bare"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunDirectoryError, match="no finished one"):
        compose_report([tmp_path / "empty"])


def test_a_subject_that_is_not_there_is_refused_with_the_names_that_are(runs):
    with pytest.raises(ConfigError, match="nobody") as caught:
        compose_report([runs["private"]], subject="nobody")
    assert "private" in caught.value.hint


def test_a_cell_without_a_result_is_left_out_by_name_and_a_named_one_is_an_error(runs, tmp_path):
    (runs["bare"] / "summary.json").unlink()
    report = compose_report([tmp_path])
    assert report.runs == ("private",)
    assert any("not finished: bare" in line for line in report.sections[0].text)
    with pytest.raises(RunDirectoryError, match="has not finished"):
        compose_report([runs["private"], runs["bare"]])
