"""The audit's part `canaries`: a lower bound of epsilon from the coins of planted records."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fedpt_secure.attacks.canary_scores import ReleaseView, release_scores
from fedpt_secure.attacks.findings import Check, Finding
from fedpt_secure.attacks.membership import ADAPTER_VIEW, adapter_scores
from fedpt_secure.attacks.one_run import FRACTIONS, analyse_canaries
from fedpt_secure.attacks.scores import HEADLINE
from fedpt_secure.attacks.settings import TimeBudget
from fedpt_secure.attacks.subject import Claim, Subject
from fedpt_secure.data import Record
from fedpt_secure.data.planting import by_client
from fedpt_secure.federation import load_releases
from fedpt_secure.privacy import clipped_sum
from fedpt_secure.progress import Progress

RELEASES_VIEW = "releases"
_TIMED = 3


def audit_canaries(
    subject: Subject,
    claim: Claim,
    budget: TimeBudget,
    progress: Progress,
    rng: np.random.Generator,
    *,
    alpha: float,
) -> Finding:
    """Score canaries from what the statement's adversary saw, and from the adapter; bound epsilon from each.

    The first decides; it was chosen before, so that nothing is picked by its outcome.
    """
    planted = subject.planted.canaries
    if not planted:
        return Finding({"skipped": "no canaries were planted (train --canaries 1000)"})
    included = np.array([canary.included for canary in planted])
    views = []
    groups = _release_groups(subject, rng)
    if groups:
        chosen = _affordable(subject, groups, budget)
        total = sum(_gradients(subject, group) for group in chosen)
        with progress.task("canaries: gradients", total, unit="gradients") as task:
            scores, seen = release_scores(
                _views(subject, chosen),
                len(planted),
                subject.models.small,
                uses=subject.config.privacy.sampling_rate * subject.config.training.local_steps,
                advance=task.advance,
            )
        views.append(_view(RELEASES_VIEW, scores[seen], included[seen], claim, alpha, decisive=True))
    candidates = subject.candidates([Record(canary.text) for canary in planted])
    from_adapter = adapter_scores(subject.adapter_view(), candidates, progress)[HEADLINE]
    views.append(_view(ADAPTER_VIEW, from_adapter, included, claim, alpha, decisive=not groups))
    result: dict[str, Any] = {
        "planted": len(planted),
        "used": views[0]["canaries"],
        "included": int(included.sum()),
        "adjacency": claim.neighbouring,
        "delta": claim.delta,
        "alpha": alpha,
        "correction": len(FRACTIONS),
        "claimed_epsilon": claim.epsilon,
        "views": views,
    }
    return Finding(result, tuple(_check(view, claim, alpha) for view in views))


def _view(
    name: str,
    scores: npt.NDArray[np.float64],
    included: npt.NDArray[np.bool_],
    claim: Claim,
    alpha: float,
    *,
    decisive: bool,
) -> dict[str, Any]:
    found = analyse_canaries(scores, included, delta=claim.delta, alpha=alpha, claimed=claim.epsilon)
    return {"view": name, "decisive": decisive, "canaries": len(scores), **found}


def _check(view: dict[str, Any], claim: Claim, alpha: float) -> Check:
    bound, reach = view["epsilon_lower_bound"], view["detectable_epsilon"]
    where = {
        RELEASES_VIEW: "what the statement's strongest adversary sees",
        ADAPTER_VIEW: "the released adapter",
    }[view["view"]]
    claimed = "none claimed" if claim.epsilon is None else f"claimed {claim.epsilon:g}"
    sentence = (
        f"{view['canaries']} canaries from {where}: epsilon >= {bound:.3f} at {1 - alpha:.3g} confidence, "
        f"{claimed}, delta {claim.delta:g}; could have detected up to {reach:.2f}"
    )
    violation = claim.epsilon is not None and bound > claim.epsilon
    name = "canaries" if view["decisive"] else f"canaries ({view['view']})"
    return Check(name, violation, view["decisive"], alpha, sentence, bound, reach)


_Group = tuple[int, str, tuple[str, ...]]
"""Round, name of the release, and the clients whose records are in it."""


def _release_groups(subject: Subject, rng: np.random.Generator) -> list[_Group]:
    """All releases that were kept, in random order: which of them are looked at depends on no coin."""
    groups: list[_Group] = []
    owners = by_client(subject.planted)
    for round_index, survivors in enumerate(subject.survivors):
        names = [name for name in load_releases(subject.directory, round_index) if name != "adapter"]
        for name in names:
            clients = survivors if name == "sum" else (name.removeprefix("client/"),)
            if any(client in owners for client in clients):
                groups.append((round_index, name, clients))
    return [groups[index] for index in rng.permutation(len(groups))]


def _gradients(subject: Subject, group: _Group) -> int:
    owners = by_client(subject.planted)
    return sum(len(subject.text.client(client).train) + len(owners.get(client, ())) for client in group[2])


def _affordable(subject: Subject, groups: list[_Group], budget: TimeBudget) -> list[_Group]:
    """The first groups that the budget has time for; all releases of a client that is begun are none of our concern."""
    each = 0.0
    if budget.seconds is not None:
        small, clip_norm = subject.models.small, subject.config.privacy.clip_norm
        examples = [subject.small_example(record) for record in subject.members()[:_TIMED]]
        clipped_sum(small, examples[:1], clip_norm=clip_norm)
        began = time.monotonic()
        clipped_sum(small, examples, clip_norm=clip_norm)
        each = (time.monotonic() - began) / len(examples)
    costs = [_gradients(subject, group) for group in groups]
    allowed = budget.fit(
        "canaries, gradients",
        sum(costs),
        seconds_each=each,
        share=0.35,
        minimum=costs[0],
        consequence="canaries of the other releases are left out, and fewer canaries can contradict less",
    )
    count = int(np.searchsorted(np.cumsum(costs), allowed, side="right"))
    return groups[: max(1, count)]


def _views(subject: Subject, groups: list[_Group]) -> Iterator[ReleaseView]:
    owners = by_client(subject.planted)
    index_of = {canary.text: index for index, canary in enumerate(subject.planted.canaries)}
    privacy, training = subject.config.privacy, subject.config.training
    # The log has each round's *next* clip norm.
    clip_norms = [privacy.clip_norm, *(line["clip_norm"] for line in subject.directory.read_log("metrics"))]
    for round_index, name, clients in groups:
        clip_norm = clip_norms[round_index]
        content = load_releases(subject.directory, round_index)
        released = content[name].astype(np.float64)
        # What a release is of the sum of clipped gradients, in clip norms (federation/mechanisms.py).
        scale = -training.normaliser / (training.local_learning_rate * clip_norm)
        if name == "sum":
            scale *= len(clients) * privacy.sampling_rate
        canaries = [canary for client in clients for canary in owners.get(client, ())]
        yield ReleaseView(
            noised_sum=scale * released,
            adapter=content["adapter"],
            clip_norm=clip_norm,
            known=[subject.small_example(record) for client in clients for record in _known(subject, client)],
            canaries=[index_of[canary.text] for canary in canaries],
            examples=[subject.small_example(Record(canary.text)) for canary in canaries],
        )


def _known(subject: Subject, client_id: str) -> list[Record]:
    """A client's records whose presence is no secret of the coins: its own, and planted secrets."""
    secrets = [
        Record(item.text) for item in subject.planted.secrets if item.client_id == client_id for _ in range(item.copies)
    ]
    return [*subject.text.client(client_id).train, *secrets]
