"""The parts of an audit, one section each (docs/audits.md has the fields)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from fedpt_secure.report.document import Axis, Figure, Section, Series, Table
from fedpt_secure.report.run_record import AUDIT_FILE, RunRecord

_SMALLEST_RATE = 1e-3
_VIEW_NAMES = {
    "released_adapter": "the released adapter",
    "endpoint": "the served endpoint",
    "releases": "the statement's adversary",
}
_FORM_NAMES = {"full": "full answers", "top_k": "top-k answers", "token": "tokens only"}
_WHAT_NAMES = {"bare": "bare update", "masked": "masked update", "sum": "sum", "noised_sum": "noised sum"}


def membership_section(subject: RunRecord, part: Mapping[str, Any]) -> Section:
    source = subject.source(AUDIT_FILE)
    views = part["views"]
    headlines = [(_view_name(view), _headline(view)) for view in views]
    curves = [_curve(name, attack["roc"], colour) for colour, (name, attack) in enumerate(headlines)]
    curves.append(_curve("most that the claim allows", views[0]["ceiling"], 6))
    shown: list[Figure | Table] = [
        Figure(
            "roc",
            "True against false positives, both on a log scale",
            Axis("false-positive rate", "log", low=_SMALLEST_RATE, high=1),
            Axis("true-positive rate", "log", low=_SMALLEST_RATE, high=1),
            tuple(curves),
            f"The headline score ({views[0]['headline']}) at each view. Left is where an attack hurts: few false "
            f"alarms. Rates below {_SMALLEST_RATE:g} are drawn at {_SMALLEST_RATE:g}. A curve above the ceiling is a "
            "hint, no proof: the records share one split and one training.",
            source,
        ),
        _histogram("scores", f"Scores of members and others, {headlines[0][0]}", headlines[0][1]["histogram"], source),
        Table(
            "membership",
            "Membership inference",
            ("view", "score", "AUC", "balanced accuracy", "TPR at 1 % FPR", "TPR at 0.1 % FPR"),
            tuple(_attack_row(_view_name(view), attack) for view in views for attack in view["attacks"]),
            f"{views[0]['members']} members and {views[0]['non_members']} held-out records at the first view; "
            "thresholds chosen on one half, judged on the other; Clopper-Pearson intervals, 95 %.",
            source,
        ),
    ]
    gate = part["gate"]
    text = (
        f"Gate: {gate['sentence']} (AUC of a bag-of-words classifier {_estimate(gate['auc'])}).",
        "An adversary who holds the adapter, or asks the endpoint, guesses whether a record was trained on.",
    )
    return Section("membership-inference", "Membership inference", text, tuple(shown))


def _curve(name: str, rates: Mapping[str, Sequence[float]], colour: int) -> Series:
    """A ROC curve within the figure: what lies below the smallest rate lies on its edge."""
    points = [
        (max(x, _SMALLEST_RATE), max(y, _SMALLEST_RATE))
        for x, y in zip(rates["fpr"], rates["tpr"], strict=True)
        if x >= _SMALLEST_RATE or y >= _SMALLEST_RATE
    ]
    return Series(name, "line", tuple(x for x, _ in points), tuple(y for _, y in points), colour=colour)


def _attack_row(view: str, attack: Mapping[str, Any]) -> tuple[str, ...]:
    cells = [view, str(attack["score"]), _estimate(attack["auc"]), _estimate(attack["balanced_accuracy"])]
    for level in attack["at_fpr"]:
        cells.append(_estimate(level["tpr"]) if level["resolvable"] else "too few records")
    return tuple(cells)


def _view_name(view: Mapping[str, Any]) -> str:
    name = _VIEW_NAMES.get(view["view"], str(view["view"]))
    return name if view["answers"] is None else f"{name}, {_FORM_NAMES.get(view['answers'], view['answers'])}"


def _headline(view: Mapping[str, Any]) -> Mapping[str, Any]:
    for attack in view["attacks"]:
        if attack["score"] == view["headline"]:
            found: Mapping[str, Any] = attack
            return found
    raise ValueError(f"view {view['view']!r} lacks its headline score")


def _estimate(found: Mapping[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def canary_section(subject: RunRecord, part: Mapping[str, Any]) -> Section:
    """The one-run audit: how many of the planted records' coins were guessed."""
    key, title = "canaries", "Canaries: epsilon measured on this run"
    if "skipped" in part:
        return Section(key, title, (f"{part['skipped']}.",))
    source = subject.source(AUDIT_FILE)
    rows = []
    items: list[Figure | Table] = []
    for view in part["views"]:
        name = _VIEW_NAMES.get(view["view"], str(view["view"]))
        for guess in view["guesses"]:
            rows.append(
                (
                    name,
                    "yes" if view["decisive"] else "no",
                    str(guess["guesses"]),
                    str(guess["correct"]),
                    f"{guess['epsilon_lower_bound']:.3f}",
                    "" if guess["p_at_claim"] is None else f"{guess['p_at_claim']:.3g}",
                )
            )
        items.append(_histogram(f"canary-scores-{view['view']}", f"Canary scores, {name}", view["histogram"], source))
    items.append(
        Table(
            "canary-guesses",
            "Guesses",
            ("view", "decides", "guesses", "correct", "epsilon at least", "p at the claim"),
            tuple(rows),
            f"Numbers of guesses fixed beforehand; each bound holds at alpha {part['alpha']:g} / {part['correction']} "
            "(Steinke, Nasr and Jagielski 2023).",
            source,
        )
    )
    text = (
        f"{part['planted']:,} records of random words were planted, each by its own fair coin; {part['used']:,} could "
        f"be used, {part['included']:,} of them were in. Adjacency: {part['adjacency']}; delta {part['delta']:g}.",
    )
    return Section(key, title, text, tuple(items))


def mechanism_section(subject: RunRecord, part: Mapping[str, Any]) -> Section:
    """Noise scale, two worlds, public constants."""
    if "skipped" in part:  # nothing is claimed that noise could be held to
        return Section("mechanism", "The mechanism as installed", (f"{part['skipped']}.",))
    noise, worlds, constants = part["noise_scale"], part["two_worlds"], part["public_constants"]
    rows = [
        ("noise, claimed deviation", f"{noise['claimed_deviation']:.6g}"),
        ("noise, measured deviation", f"{noise['measured_deviation']:.6g}"),
        ("a correct build lies within", f"[{noise['interval'][0]:.6g}, {noise['interval'][1]:.6g}]"),
        ("two worlds, mu claimed", f"{worlds['mu_claimed']:.4g}"),
        ("two worlds, mu at least", f"{worlds['mu_lower_bound']:.4g}"),
        ("two worlds, trials each", f"{worlds['trials']:,}"),
        ("public constants compared", ", ".join(map(str, constants["compared"]))),
        ("differences", "; ".join(map(str, constants["differences"])) or "none"),
    ]
    source = subject.source(AUDIT_FILE)
    items: list[Figure | Table] = [
        Table(
            "mechanism",
            "The mechanism as installed",
            ("what", "value"),
            tuple(rows),
            "From the engine's own hooks.",
            source,
        )
    ]
    if worlds.get("histogram"):
        items.append(_histogram("two-worlds", "Two worlds: with the record and without", worlds["histogram"], source))
    return Section("mechanism-checks", "Mechanism", (), tuple(items))


def protocol_section(subject: RunRecord, part: Mapping[str, Any]) -> Section:
    """Every attack of a malicious server, and how it ended."""
    rows = tuple(
        (
            str(item["name"]),
            str(item["description"]),
            str(item["outcome"]),
            str(item["error"] or ""),
            str(item["message"] or ""),
        )
        for item in part["attacks"]
    )
    honest = "A round without an attack gives the exact sum." if part["honest_round"] else "AN HONEST ROUND FAILED."
    return Section(
        "protocol",
        "Protocol attacks",
        (honest,),
        (
            Table(
                "protocol-attacks",
                "What a malicious server tried",
                ("attack", "what it does", "outcome", "error", "message"),
                rows,
                "Run against the installed build; every one must be aborted by the clients.",
                subject.source(AUDIT_FILE),
            ),
        ),
    )


def server_section(subject: RunRecord, part: Mapping[str, Any]) -> Section:
    """Bits that a server gets out of what it sees."""
    source = subject.source(AUDIT_FILE)
    items: list[Figure | Table] = []
    matching = part["matching"]
    most = max((item["most_bits"] for item in matching), default=0.0)
    unnoised = [item for item in matching if not item["sigma"]]
    noised = [item for item in matching if item["sigma"]]
    groups = {what: [item for item in unnoised if item["what"] == what] for what in _WHAT_NAMES}
    series = tuple(
        _bits(_WHAT_NAMES[what], found, "clients", colour)
        for colour, (what, found) in enumerate(groups.items())
        if found
    )
    if series:
        items.append(
            Figure(
                "bits",
                "Bits of a secret that the server recovers, by clients in the sum",
                Axis("clients in the sum", "log"),
                Axis(f"bits, of {most:.2f}"),
                series,
                "By matching candidates against what it sees, without noise. A bare update gives everything away; a "
                "sum alone still gives away a lot: secure aggregation without noise is not privacy.",
                source,
            )
        )
    if noised:
        sizes = sorted({item["clients"] for item in noised})
        items.append(
            Figure(
                "bits-by-noise",
                "Bits of a secret that the server recovers, by noise in the sum",
                Axis("standard deviation of the sum's noise, in clip norms", "log"),
                Axis(f"bits, of {most:.2f}"),
                tuple(
                    _bits(f"sum of {n} clients", [item for item in noised if item["clients"] == n], "sigma", colour)
                    for colour, n in enumerate(sizes)
                ),
                "The same attack on sums with noise. Guessing finds 1.44 bits on average.",
                source,
            )
        )
    if part.get("span"):
        rows = tuple(
            tuple(str(item[key]) for key in ("unique_tokens", "rank", "found", "false")) for item in part["span"]
        )
        items.append(
            Table(
                "span",
                "Tokens read off a bare gradient of LoRA's A",
                ("unique tokens", "rank", "found", "false"),
                rows,
                "An exhibit of why A is frozen here: B's gradient does not span the inputs.",
                source,
            )
        )
    transcript = part["transcript"]
    if "skipped" in transcript:
        text = f"{transcript['skipped']}."
    else:
        alarms = ", ".join(map(str, transcript["alarms"])) or "none"
        text = f"{transcript['vectors']} masked vectors were recorded; tests that raise an alarm: {alarms}."
        rows = tuple((str(t["sample"]), str(t["name"]), f"{t['p']:.4g}") for t in transcript["tests"])
        items.append(
            Table(
                "uniformity",
                "Do masked vectors look uniform?",
                ("sample", "test", "p"),
                rows,
                "Looking uniform proves no security; looking otherwise would disprove it.",
                source,
            )
        )
    return Section("server-view", "What the server sees", (text,), tuple(items))


def _bits(name: str, found: Sequence[Mapping[str, Any]], against: str, colour: int) -> Series:
    ordered = sorted(found, key=lambda item: float(item[against]))
    return Series(
        name,
        "line",
        tuple(float(item[against]) for item in ordered),
        tuple(item["bits"]["value"] for item in ordered),
        tuple(item["bits"]["low"] for item in ordered),
        tuple(item["bits"]["high"] for item in ordered),
        colour,
    )


def exposure_section(subject: RunRecord, part: Mapping[str, Any]) -> Section:
    """How far up planted secrets stand among all candidates, by how often they were repeated."""
    key, title = "exposure", "Planted secrets"
    if "skipped" in part:
        return Section(key, title, (f"{part['skipped']}.",))
    series, rows = [], []
    copies = sorted({entry["copies"] for run in part["runs"] for entry in run["by_repetition"]})
    for colour, run in zip((0, 1, 2, 3), part["runs"], strict=False):
        name = "this run" if run["run"] == "audited" else "the same without DP"
        name += "" if run["epsilon"] is None else f", epsilon {run['epsilon']:g}"
        entries = sorted(run["by_repetition"], key=lambda entry: entry["copies"])
        series.append(
            Series(
                name,
                "line",
                tuple(float(copies.index(entry["copies"])) for entry in entries),
                tuple(entry["mean"] for entry in entries),
                tuple(min(entry["exposure"]) for entry in entries),
                tuple(max(entry["exposure"]) for entry in entries),
                colour,
            )
        )
        rows += [(name, str(e["copies"]), str(e["secrets"]), f"{e['mean']:.2f}", str(e["extracted"])) for e in entries]
    source = subject.source(AUDIT_FILE)
    chance = float(part["chance_bits"])
    places = tuple(map(float, range(len(copies))))
    series.append(Series("never seen, on average", "line", places, tuple(chance for _ in copies), colour=6))
    return Section(
        key,
        title,
        ("k copies of a secret are k records: group privacy, outside the promise for single records.",),
        (
            Figure(
                "exposure-by-repetition",
                "Exposure by repetition",
                Axis("copies of a secret", "categories", tuple(map(str, copies))),
                Axis(f"bits, of {part['most_bits']:.2f}"),
                tuple(series),
                "log2 of the candidates over a secret's rank (Carlini et al. 2019): mean, and smallest to largest.",
                source,
            ),
            Table(
                "exposure-table",
                "Exposure and extraction",
                ("run", "copies", "secrets", "mean exposure, bits", "given out by greedy decoding"),
                tuple(rows),
                "Extraction: the secret comes out when its beginning is given.",
                source,
            ),
        ),
    )


def shadow_section(subject: RunRecord, part: Mapping[str, Any]) -> Section:
    """The shadow-model attack."""
    if "skipped" in part or not part["views"]:
        return Section("shadows", "Shadow models", (f"{part.get('skipped', 'None were trained')}.",))
    rows = tuple(_attack_row(_view_name(view), attack) for view in part["views"] for attack in view["attacks"])
    return Section(
        "shadows",
        "Shadow models",
        (f"{part['shadows']} shadow models.",),
        (
            Table(
                "shadow-attacks",
                "Membership inference with shadow models",
                ("view", "score", "AUC", "balanced accuracy", "TPR at 1 % FPR", "TPR at 0.1 % FPR"),
                rows,
                "RMIA; the adversary has data of the same kind and trains models of its own.",
                subject.source(AUDIT_FILE),
            ),
        ),
    )


def _histogram(key: str, title: str, histogram: Mapping[str, Sequence[float]], source: tuple[str, ...]) -> Figure:
    edges = histogram["edges"]
    middles = tuple((a + b) / 2 for a, b in pairwise(edges))
    return Figure(
        key.replace("_", "-"),
        title,
        Axis("score"),
        Axis("count"),
        tuple(
            Series(name, "bars", middles, tuple(map(float, histogram[side])), colour=colour)
            for name, side, colour in (("in", "members", 1), ("out", "non_members", 0))
        ),
        "The more the two overlap, the less shows.",
        source,
    )


PART_SECTIONS: Mapping[str, Callable[[RunRecord, Mapping[str, Any]], Section]] = {
    "canaries": canary_section,
    "membership": membership_section,
    "shadows": shadow_section,
    "exposure": exposure_section,
    "server_view": server_section,
    "mechanism": mechanism_section,
    "protocol": protocol_section,
}
"""In reading order; `accounting` is in the table of checks."""
