"""The argument of `docs/protocol.md`, "Why one sum", checked on small cases by code of its own.

First the bounds of `crypto/parameters.py`, against an enumeration of everything a server can do to a small ring. Then
the protocol's rules, against servers that show every client lists of its own: what the masks leave to be seen is worked
out by linear algebra.
"""

import random
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest

from fedpt_secure.crypto import ClientPolicy
from fedpt_secure.crypto.parameters import graph_withstands, split_probability


def _near(size, degree, place):
    """The place on the ring and those within degree / 2 of it."""
    reach = degree // 2
    return {(place + step) % size for step in range(-reach, reach + 1)}


def _components(places, adjacent):
    left, found = set(places), []
    while left:
        component, edge = set(), {left.pop()}
        while edge:
            component |= edge
            edge = {other for place in edge for other in adjacent[place] if other in left}
            left -= edge
        found.append(component)
    return found


def _can_split(size, degree, threshold, corrupt, removable):
    """Whether, with so many honest members removed, some side of a split can be unmasked."""
    adjacent = {place: _near(size, degree, place) for place in range(size)}
    honest = [place for place in range(size) if place not in corrupt]
    for count in range(removable + 1):
        for lost in combinations(honest, count):
            left = [place for place in honest if place not in lost]
            helpful = corrupt.union(left)
            sides = _components(left, adjacent)
            if len(sides) > 1 and any(
                all(len(adjacent[place] & helpful) >= threshold for place in side) for side in sides
            ):
                return True
    return False


def _exact(cohort, corrupt, dropouts, degree, threshold):
    """The two failure probabilities, at the directory's size that suits the server best."""
    split = crowded = Fraction(0)
    beaten = 2 * threshold - degree - 2
    for size in range(max(cohort - dropouts, degree + 2), cohort + 1):
        removable = dropouts - (cohort - size)
        bad_splits = bad_crowds = 0
        for chosen in combinations(range(size), corrupt):
            chosen = frozenset(chosen)
            bad_splits += _can_split(size, degree, threshold, chosen, removable)
            bad_crowds += any(
                len(_near(size, degree, place) & chosen) > beaten for place in range(size) if place not in chosen
            )
        split = max(split, Fraction(bad_splits, comb(size, corrupt)))
        crowded = max(crowded, Fraction(bad_crowds, comb(size, corrupt)))
    return split, crowded


SMALL = [
    (cohort, corrupt, dropouts, degree, threshold)
    for cohort, corrupt, dropouts in [(8, 2, 2), (9, 2, 3), (10, 3, 2), (10, 4, 1), (11, 3, 3), (12, 4, 2)]
    for degree in (4, 6)
    for threshold in range(degree // 2 + 1, degree + 2)
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_bounds_hold_against_every_choice_of_a_server_on_a_small_ring(case):
    """All corrupt sets, all sets of lost clients that the server may choose when it sees the ring, all directories."""
    cohort, corrupt, dropouts, degree, threshold = case
    split, crowded = _exact(*case)
    assert split <= split_probability(*case)
    settings = {
        "cohort": cohort,
        "degree": degree,
        "threshold": threshold,
        "corrupt": corrupt,
        "dropouts": dropouts,
    }
    for bits in range(12):
        if graph_withstands(**settings, security_bits=bits):
            assert max(split, crowded) < Fraction(1, 2 << bits)


def test_the_enumeration_meets_graphs_that_split_and_graphs_that_do_not():
    """Without both, the test above would show nothing."""
    splits = [_exact(*case)[0] for case in [(10, 3, 2, 4, 3), (10, 3, 2, 4, 4), (8, 2, 2, 4, 5)]]
    assert splits[0] > splits[1] > splits[2] == 0


class _Rules:
    """What honest clients insist on, and the graph."""

    def __init__(self, cohort, degree, threshold, minimum, quorum):
        self.cohort, self.degree = cohort, degree
        self.threshold, self.minimum, self.quorum = threshold, minimum, quorum
        self.holders = [
            set(range(cohort)) if degree is None else _near(cohort, degree, place) for place in range(cohort)
        ]


def _released(rules, corrupt, sharers, survivors):
    """Whose seed and whose mask key the server can rebuild, from what honest clients release and accomplices hold.

    `sharers` and `survivors` are what each honest client was shown. A client whose lists break a rule releases nothing.
    """
    signed = {}
    for client, shown in survivors.items():
        own = rules.holders[client]
        if (
            client in shown
            and shown <= sharers[client]
            and min(len(sharers[client]), len(shown)) >= rules.minimum
            and len(shown & own) >= rules.threshold
        ):
            signed.setdefault((sharers[client], shown), set()).add(client)
    seeds = {client: corrupt & rules.holders[client] for client in range(rules.cohort)}
    keys = {client: corrupt & rules.holders[client] for client in range(rules.cohort)}
    for (shared, shown), signers in signed.items():
        confirmed = signers | (corrupt & shown)
        for client in signers:
            if len(confirmed) < rules.quorum or len(confirmed & rules.holders[client]) < rules.threshold:
                continue
            for owner in rules.holders[client] & shared:
                kind = seeds if owner in shown else keys
                kind[owner] = kind[owner] | {client}
    rebuilt = ({owner for owner in kind if len(kind[owner]) >= rules.threshold} for kind in (seeds, keys))
    return tuple(rebuilt)


def _sums_in_sight(rules, corrupt, sharers, survivors):
    """A basis of the sums of honest vectors that the masks leave in sight: rows over the clients."""
    seeds, keys = _released(rules, corrupt, sharers, survivors)
    open_vectors = [
        client
        for client in sharers
        if client in seeds
        and client in sharers[client]
        and len(sharers[client] & rules.holders[client]) >= rules.threshold
    ]
    edges = {edge: number for number, edge in enumerate(combinations(range(rules.cohort), 2))}
    masks = np.zeros((len(open_vectors), len(edges)))
    for row, client in enumerate(open_vectors):
        for peer in rules.holders[client] & sharers[client] - {client}:
            if peer not in corrupt and not {client, peer} & keys:
                masks[row, edges[min(client, peer), max(client, peer)]] = 1 if client < peer else -1
    if not open_vectors:
        return seeds, keys, np.zeros((0, rules.cohort))
    left, values, _ = np.linalg.svd(masks)
    rank = int(np.count_nonzero(values > 1e-9))
    combined = np.zeros((len(open_vectors) - rank, rules.cohort))
    combined[:, open_vectors] = left[:, rank:].T
    return seeds, keys, combined


def _deceit(draw, rules, corrupt):
    """Lists for every honest client: a story for one part of the ring, one for the rest, and some told their own."""
    everybody = frozenset(range(rules.cohort))
    most = rules.cohort - rules.minimum

    def story():
        unheard = set(draw.sample(sorted(everybody), draw.randint(0, most)))
        lost = set(draw.sample(sorted(everybody), draw.randint(0, most)))
        return everybody - unheard, everybody - unheard - lost

    start, length = draw.randrange(rules.cohort), draw.randint(0, rules.cohort)
    arc = frozenset((start + step) % rules.cohort for step in range(length))
    if draw.random() < 0.3:
        stories = [(everybody, everybody - arc | corrupt), (everybody, arc | corrupt)]
    else:
        stories = [story(), story()]
    told = {}
    lone = draw.choice([0, 0, draw.random() / 2])
    for client in everybody - corrupt:
        told[client] = story() if draw.random() < lone else stories[client in arc]
    return {client: lists[0] for client, lists in told.items()}, {client: lists[1] for client, lists in told.items()}


def _worst(rules, corrupt_count, *, trials, seed):
    """Over many deceits: the most sums in sight, the fewest honest clients in one, and whether both kinds were had."""
    draw = random.Random(seed)
    most, fewest, both = 0, rules.cohort, False
    for _ in range(trials):
        corrupt = frozenset(draw.sample(range(rules.cohort), draw.randint(0, corrupt_count)))
        seeds, keys, sums = _sums_in_sight(rules, corrupt, *_deceit(draw, rules, corrupt))
        both = both or bool(seeds & keys)
        most = max(most, len(sums))
        for row in sums:
            parts = row[np.abs(row) > 1e-9]
            fewest = min(fewest, len(parts) if np.allclose(parts, parts[0]) else 0)
    return most, fewest, both


SOUND = {
    "complete, no accomplice": (_Rules(6, None, 4, 4, 4), 0),
    "complete, one accomplice": (_Rules(7, None, 5, 4, 5), 1),
    "complete, two accomplices": (_Rules(7, None, 5, 5, 5), 2),
    "sparse, no accomplice": (_Rules(8, 4, 4, 6, 6), 0),
    "sparse, one accomplice": (_Rules(9, 6, 5, 7, 7), 1),
    "sparse, two accomplices": (_Rules(10, 6, 6, 8, 8), 2),
}


@pytest.mark.parametrize("name", SOUND)
def test_whatever_lists_are_shown_to_whom_one_sum_comes_into_sight_and_no_small_one(name):
    """3,000 servers each, with lists that differ between single clients and between parts of the ring (fixed seed)."""
    rules, corrupt_count = SOUND[name]
    most, fewest, both = _worst(rules, corrupt_count, trials=3000, seed=1)
    assert most == 1
    assert fewest >= rules.minimum - corrupt_count
    assert not both


@pytest.mark.parametrize("name", [name for name in SOUND if name.startswith("sparse")])
def test_the_sparse_rules_of_the_search_are_such_as_a_client_accepts(make_cohort, name):
    rules, corrupt_count = SOUND[name]
    context = make_cohort(rules.cohort).context(
        degree=rules.degree, threshold=rules.threshold, minimum_survivors=rules.minimum
    )
    assert context.quorum == rules.quorum
    ClientPolicy(tolerated_corrupt_clients=corrupt_count).check(context)


BROKEN = {
    "a threshold that two halves reach": (_Rules(6, None, 3, 3, 3), 0),
    "an accomplice more than the threshold beats": (_Rules(7, None, 4, 3, 4), 1),
    "a ring that two lost clients cut": (_Rules(8, 2, 2, 5, 5), 0),
    "a sparse graph with too low a threshold for its accomplices": (_Rules(10, 4, 3, 6, 6), 2),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_search_finds_second_sums_or_both_kinds_of_shares_where_a_rule_is_broken(name):
    rules, corrupt_count = BROKEN[name]
    most, _, both = _worst(rules, corrupt_count, trials=3000, seed=1)
    assert most > 1 or both
