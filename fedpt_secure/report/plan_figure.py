"""A plan as a picture: epsilon against noise, and against rounds."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path

from fedpt_secure import files
from fedpt_secure.errors import ConfigError
from fedpt_secure.report.plan import Plan, curves

_FORMATS = (".svg", ".png")


def check_figure_path(path: Path) -> None:
    """Refuse a file whose name says no format, before anything is computed.

    Raises:
        ConfigError: the name ends in neither .svg nor .png.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"the plot {str(path)!r} must end in .svg or .png", hint="--plot epsilon.svg")


def write_figure(answer: Plan, path: Path) -> None:
    """Draw epsilon (log scale) against the noise multiplier and against rounds, with the promise underneath.

    Raises:
        ConfigError: an unknown format.
        PrivacyError: the plan promises nothing that could be drawn.
    """
    check_figure_path(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    points = curves(answer)
    asked = next(row for row in answer.rows if row.asked)
    # Text stays text, and ids depend on the content only: the same plan gives the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedpt-secure", "font.size": 9}):
        figure = Figure(figsize=(8.0, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.plot(*zip(*points.by_noise, strict=True), marker=".", color="tab:blue")
        left.set_xlabel(f"noise multiplier (at {answer.config.rounds} rounds)")
        left.set_ylabel("epsilon, upper bound")
        right.plot(*zip(*points.by_rounds, strict=True), marker=".", color="tab:blue")
        right.set_xlabel(f"rounds (at noise multiplier {asked.noise_multiplier:.3f})")
        for axes, place in ((left, asked.noise_multiplier), (right, answer.config.rounds)):
            axes.plot([place], [asked.epsilon], marker="o", color="tab:red", label="asked")
            axes.set_yscale("log")
            axes.grid(visible=True, which="both", alpha=0.3)
        left.legend()
        promise = f"{answer.statement.claim()} Accountant: {answer.statement.accountant}."
        figure.supxlabel("\n".join(textwrap.wrap(promise, 150)), fontsize=6)
        content = io.BytesIO()
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(content, format=path.suffix.lower()[1:], dpi=150, metadata=metadata)
    files.write_bytes(path, content.getvalue())
