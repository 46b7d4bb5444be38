"""The section on what tuning gained: the four arms, by epsilon where the runs have several, and the ceiling."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from fedpt_secure.report.document import Axis, Figure, Section, Series, Table
from fedpt_secure.report.run_record import ARMS, RunRecord, epsilon_name

ARM_NAMES = {
    "large_base": "large LM alone",
    "small_base": "small LM, pretrained",
    "small_tuned": "small LM, tuned",
    "proxy_tuned": "large LM, proxy-tuned",
    "large_tuned": "large LM tuned directly (ceiling)",
}
_ARM_COLOURS = {"large_base": 6, "small_base": 3, "small_tuned": 1, "proxy_tuned": 0}


def utility_section(subject: RunRecord, runs: Sequence[RunRecord], *, left_out: Sequence[str] = ()) -> Section:
    """What tuning gained: the four arms, by epsilon where the runs have several; runs without a result by name."""
    items: list[Figure | Table] = [_arms_table(subject)]
    if subject.evaluation is not None:
        items += _ceiling(subject) + _responses(subject)
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
            *((f"Without a result, refused or not finished: {', '.join(left_out)}.",) if left_out else ()),
        ),
        tuple(items),
    )


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
            ARM_NAMES.get(name, name),
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


def _responses(run: RunRecord) -> list[Table]:
    """ROUGE-L and matches of `fedpt-secure evaluate`, where the data has prompts."""
    responses = (run.evaluation or {}).get("responses")
    if not isinstance(responses, Mapping):
        return []
    rows = [
        (ARM_NAMES.get(name, name), metric.replace("_", " "), f"{found['value']:.4f}", _interval(found["ci"]))
        for name, metrics in responses["arms"].items()
        for metric, found in metrics.items()
    ]
    return [
        Table(
            "responses",
            "Responses to held-out prompts",
            ("model", "metric", "mean", "95 % interval"),
            tuple(rows),
            f"{responses['records']} prompts, {responses['decoding']} decoding, at most {responses['max_new_tokens']} "
            "tokens; higher is better.",
            run.source("evaluation.json"),
        )
    ]


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


def _interval(bounds: Sequence[float]) -> str:
    return f"[{bounds[0]:.4f}, {bounds[1]:.4f}]"
