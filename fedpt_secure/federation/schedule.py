"""Which clients take part in which round: public, fixed by the seed before the first round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedpt_secure.data.simulation import simulation_rng


def cohort_schedule(client_ids: Sequence[str], *, rounds: int, cohort: int, seed: int) -> tuple[tuple[str, ...], ...]:
    """Deal clients to rounds as evenly as possible.

    Every client is in a round once before any is in twice, and so on, because a client's noise must cover all its
    rounds: with R rounds of n out of N clients nobody takes part more than ceil(R n / N) + 1 times (one more than the
    mean where a round begins one pass and ends another).

    Args:
        cohort: at most the number of clients.

    Returns one sorted tuple of distinct client ids per round.
    """
    rng = simulation_rng("cohorts", seed)
    waiting: list[str] = []
    schedule = []
    for _ in range(rounds):
        chosen = waiting[:cohort]
        waiting = waiting[cohort:]
        if len(chosen) < cohort:
            ordered = sorted(client_ids)
            new_pass = [ordered[index] for index in rng.permutation(len(ordered))]
            already = set(chosen)
            # Those already in this round keep their place in the new pass and come in a later round of it.
            missing = [client for client in new_pass if client not in already][: cohort - len(chosen)]
            chosen += missing
            taken = set(missing)
            waiting = [client for client in new_pass if client not in taken]
        schedule.append(tuple(sorted(chosen)))
    return tuple(schedule)


def participations(schedule: Sequence[Sequence[str]]) -> dict[str, int]:
    """How often each client is in the schedule."""
    return dict(Counter(client for cohort in schedule for client in cohort))
