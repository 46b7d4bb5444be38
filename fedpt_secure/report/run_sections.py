"""The sections on what a run promises and was: privacy, cost, participation, configuration, limits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedpt_secure.report.document import Axis, Figure, Section, Series, Table
from fedpt_secure.report.run_record import RunRecord
from fedpt_secure.report.summary import phase_seconds

_MOST_LEDGERS = 400


def privacy_section(subject: RunRecord, runs: Sequence[RunRecord]) -> Section:
    """The full statement, one epsilon per adversary."""
    statement = subject.privacy
    rows = [
        (key.replace("_", " "), str(statement[key]))
        for key in ("claim", "unit", "neighbouring", "adversary", "mechanism", "accountant", "delta")
        if key in statement
    ]
    aggregation = statement.get("aggregation", {})
    rows += [(f"aggregation: {key}", str(value)) for key, value in aggregation.items()]
    guarantees = tuple(
        (
            str(item["adversary"]).replace("_", " "),
            str(item["sees"]),
            str(item["colluding_clients"]),
            "nothing is promised" if item["epsilon"] is None else f"<= {item['epsilon']:g}",
        )
        for item in statement["guarantees"]
    )
    limits = [(text,) for text in statement["assumptions"]]
    sources = subject.source("privacy.json")
    items: list[Figure | Table] = [
        Table(
            "statement",
            "Privacy statement",
            ("what", "statement"),
            tuple(rows),
            "In full, as the run wrote it.",
            sources,
        ),
        Table(
            "guarantees",
            "Against whom",
            ("adversary", "sees", "colluding clients", "epsilon"),
            guarantees,
            f"At delta = {statement['delta']:g}. An upper bound each, rounded up.",
            sources,
        ),
        Table(
            "assumptions", "Assumptions", ("must be true",), tuple(limits), "If one fails, so does the claim.", sources
        ),
    ]
    if len(runs) > 1:
        items.append(
            Table(
                "claims",
                "Claims of all runs",
                ("run", "claim"),
                tuple((run.name, str(run.privacy["claim"])) for run in runs),
                "Every run's own promise. Runs on the same records add up: a client's ledger holds the sum.",
                tuple(source for run in runs for source in run.source("privacy.json")),
            )
        )
    return Section("privacy", "Privacy", (), tuple(items))


def cost_section(subject: RunRecord) -> Section:
    """Bytes by round and seconds by phase."""
    lines = subject.transcripts
    rounds = tuple(float(line["round"]) for line in lines)
    traffic = tuple(
        Series(
            f"{direction}, mean per client",
            "line",
            rounds,
            tuple(fmean(line[key].values()) / 1e3 if line[key] else 0.0 for line in lines),
            colour=colour,
        )
        for direction, key, colour in (("up", "bytes_up", 0), ("down", "bytes_down", 1))
    )
    seconds = phase_seconds(lines)
    total = subject.summary["bytes"]
    return Section(
        "cost",
        "Cost",
        (
            f"{subject.summary['training']['trained_parameters']:,} trained parameters; over the run "
            f"{total['up_total'] / 1e6:.2f} MB went up and {total['down_total'] / 1e6:.2f} MB down, all clients "
            "together.",
        ),
        (
            Figure(
                "bytes",
                "Bytes per client by round",
                Axis("round"),
                Axis("kB", low=0),
                traffic,
                "Counts of the serialised messages of secure aggregation, keys, shares and masked update included.",
                subject.source("transcript.jsonl"),
            ),
            Figure(
                "seconds",
                "Time by phase of the protocol",
                Axis("phase", "categories", tuple(name.replace("_", " ") for name in seconds)),
                Axis("seconds, all rounds"),
                (Series("seconds", "bars", tuple(map(float, range(len(seconds)))), tuple(seconds.values())),),
                "Simulated clients run one after the other, so this is the sum over clients; training is in `mask`.",
                subject.source("transcript.jsonl"),
            ),
        ),
    )


def participation_section(subject: RunRecord) -> Section:
    """Who took part how often, and what the ledgers say."""
    summed: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for line in subject.transcripts:
        asked.update(line["cohort"])
        summed.update(line["survivors"] if not line["aborted"] else ())
    times = Counter(summed[client] for client in asked)
    places = tuple(sorted(times))
    items: list[Figure | Table] = [
        Figure(
            "participation-counts",
            "How often clients took part",
            Axis("rounds whose sum holds the client's update", "categories", tuple(map(str, places))),
            Axis("clients"),
            (Series("clients", "bars", tuple(map(float, range(len(places)))), tuple(float(times[p]) for p in places)),),
            f"Of {len(asked)} clients that were asked at least once. Clients are not named here.",
            subject.source("transcript.jsonl"),
        )
    ]
    rows = tuple(
        (
            str(index + 1),
            str(sum(run.releases for run in ledger.runs)),
            "nothing is promised" if ledger.epsilon is None else f"<= {ledger.epsilon:g}",
            "no limit" if math.isinf(ledger.budget.epsilon) else f"{ledger.budget.epsilon:g}",
            "" if ledger.left is None else f"{ledger.left:g}",
            f"{ledger.budget.delta:g}",
            ledger.budget.unit,
        )
        for index, ledger in enumerate(subject.ledgers[:_MOST_LEDGERS])
    )
    cut = len(subject.ledgers) - len(rows)
    items.append(
        Table(
            "ledgers",
            "What each client's ledger counts",
            ("client", "releases", "epsilon spent", "budget", "left", "delta", "unit"),
            rows,
            "Over all runs that a ledger has seen."
            + (f" {cut} more clients are not shown." if cut else "")
            + " Simulated clients keep theirs beside the run; a real client's never leaves it.",
            subject.source("clients/"),
        )
    )
    return Section("participation", "Participation and ledgers", (), tuple(items))


def configuration_section(subject: RunRecord) -> Section:
    """All settings and versions."""
    settings = tuple(flat_settings(subject.config.model_dump()))
    versions = tuple((name, str(value)) for name, value in subject.summary["versions"].items())
    return Section(
        "configuration",
        "Configuration and versions",
        (),
        (
            Table(
                "settings",
                "Settings",
                ("setting", "value"),
                settings,
                "Defaults included.",
                subject.source("config.toml"),
            ),
            Table(
                "versions",
                "Versions",
                ("package", "version"),
                versions,
                "That trained.",
                subject.source("summary.json"),
            ),
        ),
    )


def limits_section(subject: RunRecord) -> Section:
    """What none of this says."""
    rows = [(str(text),) for text in subject.privacy.get("not_covered", ())]
    evaluation = subject.summary["evaluation"]
    rows += [
        (
            f"Utility is loss on {evaluation['records']} held-out records of the clients that took part; intervals are "
            "over records, from one training run each: other noise, other cohorts and new clients vary more.",
        ),
        ("Held-out figures are averages over private records. They chose nothing, and epsilon does not cover them.",),
        ("An audit that finds nothing proves nothing beyond the epsilon it could have detected.",),
        ("A client that lies about its own data (poisoning) is not detected.",),
    ]
    return Section(
        "limits",
        "Limits",
        (),
        (
            Table(
                "not-covered",
                "Not covered",
                ("what",),
                tuple(rows),
                "Read before signing.",
                subject.source("privacy.json"),
            ),
        ),
    )


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and their values as text."""
    rows = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += flat_settings(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", "" if value is None else str(value)))
    return rows
