"""Degree of the graph and threshold of the sharing, from exact tails.

Everything is integer arithmetic on binomial coefficients: no asymptotics and no floating point, so that a bound
holds or does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import comb, floor
from typing import Final

from fedpt_secure.crypto.errors import ParameterError
from fedpt_secure.crypto.identities import LARGEST_ROSTER

SMALLEST_SPARSE_COHORT: Final = 100
"""Below it the complete graph is cheap, and bounds that rest on the whole part of a few corruptions are thin."""

GRINDING_BITS: Final = 64
"""log2 of the graphs that a server is assumed to try out."""

LARGEST_SECURITY_BITS: Final = 512
"""More is a slip of the keyboard, and would only make the arithmetic slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureAggregationParameters:
    """What a cohort of a given size needs, and against whom.

    Attributes:
        cohort: clients that take part.
        degree: neighbours of each client, for `RoundContext.degree`; None for the complete graph.
        threshold: shares that rebuild a secret, for `RoundContext.threshold`.
        minimum_survivors: fewest masked vectors that the dropout fraction leaves, for `RoundContext`.
        tolerated_corruptions: corrupt share holders of one client that the threshold beats, for `ClientPolicy`.
        tolerated_corrupt_clients: corrupt clients in all, for `ClientPolicy`.
        adversary: in words.
    """

    cohort: int
    degree: int | None
    threshold: int
    minimum_survivors: int
    tolerated_corruptions: int
    tolerated_corrupt_clients: int
    adversary: str


def secure_aggregation_parameters(
    cohort: int,
    corrupt_fraction: float,
    dropout_fraction: float,
    *,
    security_bits: int = 40,
    correctness_bits: int = 20,
    grinding_bits: int = GRINDING_BITS,
) -> SecureAggregationParameters:
    """The sparsest graph, and its threshold, that withstand the stated adversary.

    Guarantees, for an actively malicious server that controls at most c = floor(corrupt_fraction n) clients of the
    cohort, the same ones whatever the graph turns out to be, and leaves any d = floor(dropout_fraction n) others out of
    the directory, the sharers or the survivors, or shows them lists of their own, whom it chooses when it knows the
    graph:

    1. The graph of the remaining honest clients is connected, or no side of a split can be unmasked, but with
       probability 2^-(security_bits + 1): what the server sees is one sum over all of them.
    2. No client has more than a corrupt neighbours but with probability 2^-(security_bits + 1) over all clients, and
       2t > k + 1 + a: the holders of a client's shares, itself among them, never yield both kinds, whatever lists of
       survivors the server shows to whom. (In the complete graph this is the condition 2t > n + n_C of Bonawitz et al.
       2017 for active adversaries.)
    3. If d clients vanish independently of the graph, fewer than t neighbours of some client survive with
       probability at most 2^-correctness_bits; the round is then abandoned, and nothing is revealed.

    The probability is over the permutation, which is a random oracle's answer to the directory; the bound holds for all
    2^grinding_bits directories that the server may try, in all rounds and attempts together. `docs/protocol.md`, "Why
    one sum", has the proof.

    The approach is that of Bell et al. 2020: a Harary graph on a random permutation, its degree and threshold from
    hypergeometric tails. Bounds 1 and 2 differ from theirs, since here the server chooses who is lost, the population
    is what remains if it chooses at once, and a client's own share counts. Bound 3 is theirs.

    For the complete graph 1 and 2 hold without exception, and 3 whenever the dropouts are as many as stated.

    Args:
        cohort: n.
        corrupt_fraction: of clients that collude with the server, in [0, 1).
        dropout_fraction: of clients that may vanish, in [0, 1).
        security_bits: of the statistical bounds 1 and 2.
        correctness_bits: of bound 3.
        grinding_bits: log2 of the graphs that the server can try out. It sees honest keys before it settles the keys
            of clients it controls, so it may search for a graph it likes (`neighbours.py`); a union bound over
            2^grinding_bits tries keeps 1 and 2. Zero is for a server that does not search, the semi-malicious one of
            Bell et al.

    Raises:
        ParameterError: no graph on the cohort withstands such an adversary, or the arguments make no sense.
    """
    if type(cohort) is not int or not 2 <= cohort <= LARGEST_ROSTER:
        raise ParameterError(f"a cohort of {cohort}; it must be an integer in 2..{LARGEST_ROSTER}")
    for name, fraction in (("corrupt_fraction", corrupt_fraction), ("dropout_fraction", dropout_fraction)):
        if not 0 <= fraction < 1:
            raise ParameterError(f"{name} is {fraction}; it must lie in [0, 1)")
    for name, bits in (
        ("security_bits", security_bits),
        ("correctness_bits", correctness_bits),
        ("grinding_bits", grinding_bits),
    ):
        if type(bits) is not int or not 0 <= bits <= LARGEST_SECURITY_BITS:
            raise ParameterError(f"{name} is {bits}; it must be an integer in 0..{LARGEST_SECURITY_BITS}")
    corrupt, dropouts = _whole(corrupt_fraction, cohort), _whole(dropout_fraction, cohort)
    majority = max((cohort + corrupt) // 2 + 1, 2)
    if majority > cohort - dropouts:
        raise ParameterError(
            f"{cohort} clients cannot bear {corrupt} corruptions and {dropouts} dropouts: against two survivor lists "
            f"{majority} must agree, and only {cohort - dropouts} may be left",
            hint="corrupt_fraction + 2 * dropout_fraction must stay below 1",
        )
    sparse = None
    if cohort >= SMALLEST_SPARSE_COHORT:
        sparse = sparsest_graph(
            cohort, corrupt, dropouts, security_bits=security_bits + grinding_bits, correctness_bits=correctness_bits
        )
    if sparse is None:
        degree, threshold, tolerated, tries = None, majority, corrupt, ""
    else:
        degree, threshold, tolerated = sparse
        tries = f", that tries out up to 2^{grinding_bits} graphs (failure below 2^-{security_bits})"
    return SecureAggregationParameters(
        cohort=cohort,
        degree=degree,
        threshold=threshold,
        minimum_survivors=max(cohort - dropouts, 2),
        tolerated_corruptions=tolerated,
        tolerated_corrupt_clients=corrupt,
        adversary=f"an actively malicious server with {corrupt} of {cohort} clients{tries}; up to {dropouts} dropouts",
    )


def sparsest_graph(
    cohort: int, corrupt: int, dropouts: int, *, security_bits: int, correctness_bits: int
) -> tuple[int, int, int] | None:
    """Smallest even degree that meets the three bounds, its threshold, and the corrupt neighbours it beats.

    None if no degree below that of the complete graph does.
    """
    members = cohort - dropouts  # in the directory, if the server leaves out as many honest clients as it may
    limit = Fraction(1, cohort << (security_bits + 1))
    rare = Fraction(1, cohort << correctness_bits)
    for degree in range(2, members - 1, 2):
        bad = _smallest_with_upper_tail_below(limit, members - 1, corrupt, degree)
        threshold = (degree + 1 + bad) // 2 + 1
        while threshold <= degree and not _resists_splits(
            cohort, corrupt, dropouts, degree, threshold, security_bits=security_bits
        ):
            threshold += 1
        if threshold <= degree and _lower_tail(cohort - 1, cohort - 1 - dropouts, degree, threshold) < rare:
            return degree, threshold, bad
    return None


@lru_cache(maxsize=64)
def graph_withstands(
    *, cohort: int, degree: int, threshold: int, corrupt: int, dropouts: int, security_bits: int
) -> bool:
    """Whether bounds 1 and 2 of `secure_aggregation_parameters` hold for a k-regular graph that somebody else chose.

    Args:
        cohort: n, at least dropouts + corrupt.
        degree: k.
        threshold: t.
        corrupt: c.
        dropouts: d.
        security_bits: each bound fails with a probability below 2^-(security_bits + 1) for one random graph.
    """
    others = cohort - dropouts - 1
    beaten = 2 * threshold - degree - 2  # the most corrupt neighbours that the threshold still beats
    if beaten < 0:
        return False
    # A directory so small that the graph on it is complete has fewer share holders than k + 1.
    rest = min(degree, others)
    failing = cohort * _upper_tail(others, min(corrupt, others), rest, beaten + 1)
    return failing < Fraction(1, 2 << security_bits) and _resists_splits(
        cohort, corrupt, dropouts, degree, threshold, security_bits=security_bits
    )


def _whole(fraction: float, cohort: int) -> int:
    # The nudge keeps 0.1 * 30, which is 3.0000000000000004 or 2.9999999999999996 in binary, at 3.
    return floor((fraction + 1e-14) * cohort)


def _resists_splits(
    cohort: int, corrupt: int, dropouts: int, degree: int, threshold: int, *, security_bits: int
) -> bool:
    return split_probability(cohort, corrupt, dropouts, degree, threshold) < Fraction(1, 2 << security_bits)


def split_probability(cohort: int, corrupt: int, dropouts: int, degree: int, threshold: int) -> Fraction:
    """A bound on the probability that the server can split the honest part of a random Harary graph, by any choice.

    A split has two sides with a gap of at least k/2 on the ring between them at either end. The k/2 places of a gap
    that are next to a side which is to be unmasked are a run; its members are corrupt or lost, so at least k - d of
    both runs are corrupt. And the honest survivor at the edge of a run has at most k/2 + 1 holders that are not in the
    run, so that at least t - k/2 - 1 of each run have to be corrupt to give the server t shares of its seed. There are
    at most n (n - k - 1) / 2 pairs of runs, and the corrupt ones among k given places are hypergeometric, in a
    directory of at least n - d: a union bound, which may exceed 1.
    """
    needed = max(degree - dropouts, 2 * (threshold - degree // 2 - 1), 0)
    pairs = Fraction(cohort * max(cohort - degree - 1, 0), 2)
    members = cohort - dropouts
    if degree >= members - 1:
        # The server can make the directory so small that the graph is complete, or larger; the bound for a larger one
        # is that for the smallest which is not complete.
        members = degree + 2
    return pairs * _upper_tail(members, min(corrupt, members), degree, needed)


def _upper_tail(population: int, marked: int, drawn: int, least: int) -> Fraction:
    """P[X >= least] for X hypergeometric: marked members among `drawn` of `population`."""
    return Fraction(sum(_ways(population, marked, drawn)[least:]), comb(population, drawn))


def _lower_tail(population: int, marked: int, drawn: int, below: int) -> Fraction:
    """P[X < below] for X hypergeometric, as in `_upper_tail`."""
    return Fraction(sum(_ways(population, marked, drawn)[:below]), comb(population, drawn))


def _smallest_with_upper_tail_below(limit: Fraction, population: int, marked: int, drawn: int) -> int:
    """Smallest a with P[X > a] < limit for X hypergeometric, as in `_upper_tail`."""
    ways = _ways(population, marked, drawn)
    allowed = limit * comb(population, drawn)
    tail, least = 0, len(ways) - 1
    while least > 0 and tail + ways[least] < allowed:
        tail += ways[least]
        least -= 1
    return least


@lru_cache(maxsize=4)
def _ways(population: int, marked: int, drawn: int) -> tuple[int, ...]:
    """Ways to draw with exactly 0, 1, ..., `drawn` marked members among those drawn."""
    unmarked = population - marked
    counts = []
    for count in range(drawn + 1):
        # Neighbouring terms differ by small factors, which is far faster than two binomial coefficients a term.
        if count > marked or drawn - count > unmarked:
            counts.append(0)
        elif not count or not counts[-1]:
            counts.append(comb(marked, count) * comb(unmarked, drawn - count))
        else:
            up, down = (marked - count + 1) * (drawn - count + 1), count * (unmarked - drawn + count)
            counts.append(counts[-1] * up // down)
    return tuple(counts)
