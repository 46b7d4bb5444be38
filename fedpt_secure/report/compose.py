"""From finished runs to one `Report`: which run is the subject, what the first screen says, which sections follow."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from fedpt_secure import __version__
from fedpt_secure.errors import ConfigError
from fedpt_secure.report.audit_sections import audit_sections, audit_verdict
from fedpt_secure.report.document import Headline, Report
from fedpt_secure.report.run_record import RunRecord, find_runs, load_run, unfinished_runs
from fedpt_secure.report.run_sections import (
    configuration_section,
    cost_section,
    limits_section,
    participation_section,
    privacy_section,
)
from fedpt_secure.report.utility_sections import utility_section


def compose_report(paths: Sequence[Path], *, subject: str | None = None, title: str | None = None) -> Report:
    """Read runs (or directories that hold runs) and write the report of them.

    Args:
        paths: run directories, sweeps, or a mix.
        subject: name of the run that the headline speaks of; default: the first private one with an audit, else the
            first private one, else the first.
        title: heading; default names the data.

    Raises:
        RunDirectoryError: a directory is no finished run, or damaged.
        ConfigError: no run has the subject's name.
    """
    runs = [load_run(path, name) for name, path in find_runs(list(paths))]
    chosen = _subject(runs, subject)
    ordered = [chosen, *(run for run in runs if run is not chosen)]
    return Report(
        title=title or f"Federated proxy-tuning on {chosen.summary['data']['name']}",
        subject=chosen.name,
        runs=tuple(run.name for run in ordered),
        headline=_headline(chosen),
        sections=(
            utility_section(chosen, ordered, left_out=unfinished_runs(list(paths))),
            *audit_sections(chosen, ordered),
            privacy_section(chosen, ordered),
            cost_section(chosen),
            participation_section(chosen),
            configuration_section(chosen),
            limits_section(chosen),
        ),
        versions={"fedpt-secure": __version__, "python": platform.python_version()},
    )


def _subject(runs: Sequence[RunRecord], name: str | None) -> RunRecord:
    if name is not None:
        for run in runs:
            if run.name == name:
                return run
        raise ConfigError(f"no run is named {name!r}", hint=f"one of {', '.join(run.name for run in runs)}")
    private = [run for run in runs if run.summary["private"]]
    audited = [run for run in private if run.audit is not None]
    return (audited or private or list(runs))[0]


def _headline(run: RunRecord) -> Headline:
    gain = run.summary["improvement"]
    low, high = gain["ci"]
    judged = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
    arms = run.summary["arms"]
    alone = (
        " The tuned small LM alone is better still."
        if arms["small_tuned"]["loss"] < arms["proxy_tuned"]["loss"]
        else ""
    )
    kind, verdict = audit_verdict(run)
    return Headline(
        claim=str(run.privacy["claim"]),
        private=bool(run.summary["private"]),
        utility=(
            f"The proxy-tuned large LM has {arms['proxy_tuned']['loss']:.4f} nats per token on held-out text, the "
            f"large LM alone {arms['large_base']['loss']:.4f}: {gain['loss']:+.4f} gained "
            f"[{low:.4f}, {high:.4f}], {judged}; "
            f"{gain['fraction_improved']:.1%} of {run.summary['evaluation']['records']} records improved.{alone}"
        ),
        verdict=verdict,
        verdict_kind=kind,
        assumptions=tuple(map(str, run.privacy["assumptions"])) if run.summary["private"] else (),
    )
