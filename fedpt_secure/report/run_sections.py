"""The sections of a report that need no audit: utility, privacy, cost, participation, configuration, limits."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedpt_secure.report.document import Axis, Figure, Section, Series, Table
from fedpt_secure.report.run_record import ARMS, RunRecord
from fedpt_secure.report.summary import phase_seconds

ARM_NAMES = {
    "large_base": "large LM alone",
    "small_base": "small LM, pretrained",
    "small_tuned": "small LM, tuned",
    "proxy_tuned": "large LM, proxy-tuned",
}
_ARM_COLOURS = {"large_base": 6, "small_base": 3, "small_tuned": 1, "proxy_tuned": 0}
_MOST_LEDGERS = 400


def utility_section(subject: RunRecord, runs: Sequence[RunRecord]) -> Section:
    """What tuning gained: the four arms, by epsilon where the runs have several."""
    items: list[Figure | Table] = [_arms_table(subject)]
    if subject.evaluation is not None:
        items += _ceiling(subject)
    comparable = [run for run in runs if run.summary["data"]["name"] == subject.summary["data"]["name"]]
    items += [_losses_by_epsilon(comparable), _gain_by_epsilon(comparable)]
    if len(runs) > 1:
        items.append(_runs_table(runs))
    return Section(
        "utility",
        "Utility",
        (
            "Held-out loss in nats per token of the large vocabulary; lower is better. The large LM alone is what there"
            " was before. The tuned small LM alone is always shown: where it is better, nobody needs the large one.",
        ),
        tuple(items),
    )


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


def epsilon_name(epsilon: float) -> str:
    """An epsilon as an axis has it."""
    return "inf" if math.isinf(epsilon) else f"{epsilon:g}"


def _arms_table(run: RunRecord) -> Table:
    rows = []
    for arm in ARMS:
        found = run.summary["arms"][arm]
        perplexity = "" if found["perplexity"] is None else f"{found['perplexity']:.2f}"
        rows.append((ARM_NAMES[arm], f"{found['loss']:.4f}", _interval(found["ci"]), perplexity))
    evaluation = run.summary["evaluation"]
    return Table(
        "arms",
        "Held-out loss of the subject",
        ("model", "loss, nats/token", "95 % interval", "perplexity"),
        tuple(rows),
        f"{evaluation['records']:,} held-out records, {evaluation['tokens']:,} tokens; bootstrap over records.",
        run.source("summary.json"),
    )


def _ceiling(run: RunRecord) -> list[Table]:
    """The arms of `fedpt-secure evaluate`, among them the large LM tuned directly."""
    evaluation = run.evaluation or {}
    arms = evaluation.get("arms", {})
    rows = [
        (
            ARM_NAMES.get(name, "large LM tuned directly (ceiling)" if name == "large_tuned" else name),
            f"{arm['loss']:.4f}",
            _interval(arm["ci"]),
        )
        for name, arm in arms.items()
        if isinstance(arm, Mapping) and "loss" in arm and "ci" in arm
    ]
    gap = evaluation.get("gap_closed")
    told = (
        f"Fraction of the gap to the large LM tuned directly that is closed: {gap['value']:.3f} {_interval(gap['ci'])}."
        if isinstance(gap, Mapping)
        else "No ceiling was trained."
    )
    return (
        [
            Table(
                "ceiling",
                "Against tuning the large LM directly",
                ("model", "loss, nats/token", "95 % interval"),
                tuple(rows),
                told,
                run.source("evaluation.json"),
            )
        ]
        if rows
        else []
    )


def _by_epsilon(runs: Sequence[RunRecord]) -> tuple[tuple[str, ...], dict[float, list[RunRecord]]]:
    groups: dict[float, list[RunRecord]] = defaultdict(list)
    for run in runs:
        groups[run.epsilon].append(run)
    ordered = {epsilon: groups[epsilon] for epsilon in sorted(groups)}
    return tuple(map(epsilon_name, ordered)), ordered


def _losses_by_epsilon(runs: Sequence[RunRecord]) -> Figure:
    names, groups = _by_epsilon(runs)
    series = []
    for arm in ARMS:
        found = [[run.summary["arms"][arm] for run in group] for group in groups.values()]
        series.append(
            _series(ARM_NAMES[arm], [[(a["loss"], *a["ci"]) for a in group] for group in found], _ARM_COLOURS[arm])
        )
    return Figure(
        "loss-by-epsilon",
        "Held-out loss by epsilon",
        Axis("epsilon asked for", "categories", names),
        Axis("nats per token"),
        tuple(series),
        "Mean over the runs of an epsilon; the bar spans their 95 % intervals. Lower is better.",
        _sources(runs, "summary.json"),
    )


def _gain_by_epsilon(runs: Sequence[RunRecord]) -> Figure:
    names, groups = _by_epsilon(runs)
    series = []
    for colour, mode in enumerate(sorted({run.config.privacy.mode for run in runs})):
        found = [[run for run in group if run.config.privacy.mode == mode] for group in groups.values()]
        places = [index for index, group in enumerate(found) if group]
        gains = [[_gain(run) for run in found[index]] for index in places]
        series.append(_series(f"mode {mode}", gains, colour, places))
    return Figure(
        "gain-by-epsilon",
        "What proxy tuning gained over the large LM alone",
        Axis("epsilon asked for", "categories", names),
        Axis("nats per token gained"),
        tuple(series),
        "Paired by record; mean over the runs of an epsilon, the bar spans their 95 % intervals. Above 0 is better.",
        _sources(runs, "summary.json"),
    )


def _gain(run: RunRecord) -> tuple[float, float, float]:
    improvement = run.summary["improvement"]
    return improvement["loss"], improvement["ci"][0], improvement["ci"][1]


def _series(
    name: str, groups: Sequence[Sequence[tuple[float, float, float]]], colour: int, places: Sequence[int] = ()
) -> Series:
    return Series(
        name,
        "line",
        tuple(map(float, places or range(len(groups)))),
        tuple(fmean(value for value, _, _ in group) for group in groups),
        tuple(min(low for _, low, _ in group) for group in groups),
        tuple(max(high for _, _, high in group) for group in groups),
        colour,
    )


def _runs_table(runs: Sequence[RunRecord]) -> Table:
    rows = []
    for run in runs:
        gain, low, high = _gain(run)
        rows.append(
            (
                run.name,
                run.config.privacy.mode,
                epsilon_name(run.epsilon),
                str(run.config.seed),
                str(run.summary["data"]["name"]),
                f"{run.summary['arms']['proxy_tuned']['loss']:.4f}",
                f"{gain:+.4f} {_interval([low, high])}",
                f"{run.summary['improvement']['fraction_improved']:.1%}",
            )
        )
    return Table(
        "runs",
        "All runs",
        ("run", "mode", "epsilon", "seed", "data", "proxied loss", "gain", "records improved"),
        tuple(rows),
        "The first is the subject of this report.",
        _sources(runs, "summary.json"),
    )


def _sources(runs: Sequence[RunRecord], name: str) -> tuple[str, ...]:
    return tuple(source for run in runs for source in run.source(name))


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and their values as text."""
    rows = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += flat_settings(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", "" if value is None else str(value)))
    return rows


def _interval(bounds: Sequence[float]) -> str:
    return f"[{bounds[0]:.4f}, {bounds[1]:.4f}]"
