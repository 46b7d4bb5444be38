"""A report as Markdown, for a pull request or a terminal: figures become tables of their values."""

from __future__ import annotations

from collections.abc import Iterable

from fedpt_secure.report.document import Report, Table
from fedpt_secure.report.html import data_table

_MOST_ROWS = 40
"""Of a figure's values; the rest is in the JSON."""


def render_markdown(report: Report) -> str:
    """The report as GitHub-flavoured Markdown. Text is escaped, so that no cell or name becomes markup."""
    head = report.headline
    lines = [
        f"# {_plain(report.title)}",
        "",
        f"Subject: {_plain(report.subject)}. Runs: {_plain(', '.join(report.runs))}.",
    ]
    lines += ["", f"- **Privacy.** {_plain(head.claim)}", f"- **Utility.** {_plain(head.utility)}"]
    lines += [f"- **Audit: {head.verdict_kind}.** {_plain(head.verdict)}", ""]
    if head.assumptions:
        lines += ["This holds if:", "", *(f"- {_plain(item)}" for item in head.assumptions), ""]
    for section in report.sections:
        lines += [f"## {_plain(section.title)}", ""]
        for text in section.text:
            lines += [_plain(text), ""]
        for item in section.items:
            lines += [f"### {_plain(item.title)}", ""]
            if isinstance(item, Table):
                lines += _rows(item.header, item.rows)
            else:
                header, rows = data_table(item)
                lines += _rows(header, rows[:_MOST_ROWS])
                if len(rows) > _MOST_ROWS:
                    lines += ["", f"{len(rows) - _MOST_ROWS} more values are in the JSON report."]
            lines += ["", f"{_plain(item.caption)} From {_plain(', '.join(item.sources))}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _rows(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    heads = [_plain(cell) for cell in header]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return lines + ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows]


def _plain(text: str) -> str:
    flat = " ".join(text.split())
    for character in "\\`*_{}[]<>#|":
        flat = flat.replace(character, "\\" + character)
    return flat
