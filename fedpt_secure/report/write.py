"""A report's three files, from one object."""

from __future__ import annotations

import json
from pathlib import Path

from fedpt_secure import files
from fedpt_secure.report.document import Report
from fedpt_secure.report.html import render_html
from fedpt_secure.report.markdown import render_markdown


def write_report(report: Report, directory: Path) -> tuple[Path, Path, Path]:
    """Write `report.html`, `report.md` and `report.json`, each replaced atomically.

    Raises:
        OSError: the disk is full or the place not writable.
    """
    html, markdown, data = (directory / f"report.{suffix}" for suffix in ("html", "md", "json"))
    files.write_text(html, render_html(report))
    files.write_text(markdown, render_markdown(report))
    files.write_text(data, json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n")
    return html, markdown, data
