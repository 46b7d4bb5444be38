"""A report as one HTML file: no network, readable without scripts, on a phone, in print, in light and dark."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from importlib import resources

from fedpt_secure.report.document import Figure, Headline, Report, Section, Table
from fedpt_secure.report.svg import figure_svg, legend, value_text

_VERDICT_CLASS = {"no violation detected": "good", "violation": "bad", "not audited": ""}


def render_html(report: Report) -> str:
    """The page. All text of the report is escaped; scripts run only by the hash of the one that ships."""
    style, script = (_asset(name) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    sections = "\n".join(_section(section) for section in report.sections)
    links = "".join(f'<li><a href="#{escape(s.key)}">{escape(s.title)}</a></li>' for s in report.sections)
    versions = ", ".join(f"{name} {value}" for name, value in report.versions.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<title>{escape(report.title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(report.title)}</h1>
<p class="soft">Subject: {escape(report.subject)}. Runs: {escape(", ".join(report.runs))}.</p>
{_headline(report.headline)}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{sections}
</main>
<footer class="soft"><p>Made by {escape(versions)}.</p></footer>
<script>{script}</script>
</body>
</html>
"""


def _headline(headline: Headline) -> str:
    cards = [
        ("good" if headline.private else "bad", "Privacy", headline.claim),
        ("", "Utility", headline.utility),
        (_VERDICT_CLASS[headline.verdict_kind], f"Audit: {headline.verdict_kind}", headline.verdict),
    ]
    shown = "".join(
        f'<div class="card {kind}"><strong>{escape(title)}</strong><p>{escape(text)}</p></div>'
        for kind, title, text in cards
    )
    assumptions = "".join(f"<li>{escape(item)}</li>" for item in headline.assumptions)
    listed = f"<h3>This holds if</h3><ul>{assumptions}</ul>" if assumptions else ""
    return f'<div class="cards">{shown}</div>{listed}'


def _section(section: Section) -> str:
    text = "".join(f"<p>{escape(line)}</p>" for line in section.text)
    items = "\n".join(_shown(item) for item in section.items)
    return f'<section id="{escape(section.key)}"><h2>{escape(section.title)}</h2>{text}\n{items}</section>'


def _shown(item: Figure | Table) -> str:
    if isinstance(item, Table):
        return (
            f'<div class="table" id="{escape(item.key)}"><h3>{escape(item.title)}</h3><div class="scroll">'
            f"{_table(item.header, item.rows, item.caption)}</div>{_sources(item.sources)}</div>"
        )
    keys = "".join(f'<li class="c{colour}"><i></i>{escape(name)}</li>' for name, colour in legend(item))
    listed = f'<ul class="legend">{keys}</ul>' if keys else ""
    buttons = "".join(
        f'<button type="button" data-save="{kind}">Save {kind.upper()}</button>' for kind in ("svg", "png", "csv")
    )
    header, rows = data_table(item)
    return (
        f'<figure id="{escape(item.key)}"><h3>{escape(item.title)}</h3>{listed}\n{figure_svg(item)}\n'
        f'<p class="reading" aria-live="polite"></p><figcaption>{escape(item.caption)}</figcaption>'
        f'<div class="actions" hidden>{buttons}</div>'
        f'<details><summary>Values</summary><div class="scroll">{_table(header, rows, item.title)}</div></details>'
        f"{_sources(item.sources)}</figure>"
    )


def data_table(figure: Figure) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A figure's values as a table: heading and rows."""
    intervals = any(series.low for series in figure.series)
    header = ("series", figure.x.label, figure.y.label, *(("interval from", "to") if intervals else ()))
    rows = []
    for series in figure.series:
        for number, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
            row = [series.name, value_text(figure.x, x), value_text(figure.y, y)]
            if intervals:
                ends = (series.low[number], series.high[number]) if series.low else ()
                row += [value_text(figure.y, end) for end in ends] or ["", ""]
            rows.append(tuple(row))
    return header, rows


def _table(header: Iterable[str], rows: Iterable[Iterable[str]], caption: str) -> str:
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _sources(sources: tuple[str, ...]) -> str:
    return f'<p class="sources">From {escape(", ".join(sources))}.</p>'


def _asset(name: str) -> str:
    return (resources.files("fedpt_secure.report") / name).read_text(encoding="utf-8")
