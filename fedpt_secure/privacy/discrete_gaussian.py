"""The discrete Gaussian on the integers, sampled exactly (Canonne, Kamath and Steinke 2020, arXiv 2004.00010).

P[X = k] is proportional to exp(-k^2 / (2 sigma^2)). Floating point never enters: every coin has a rational
probability and is thrown with integers, so that there is nothing for Mironov's attack (2012) to hold on to. The
algorithms are the paper's 1 (Bernoulli of exp(-gamma)), 2 (discrete Laplace) and 3 (discrete Gaussian by rejection),
over whole arrays at once; an integer sigma makes all their fractions fit 64-bit integers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fedpt_secure.errors import PrivacyError

Words = Callable[[int], npt.NDArray[np.uint64]]
"""`words(n)` returns n fresh, uniform, unpredictable 64-bit words."""

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

LARGEST_SIGMA = 1 << 22
"""With it |X| stays below 2^31 unless some 500 coins of probability 1/e all succeed (chance below 2^-700), and every
square below 2^63."""

_ACCEPTED = 0.45
"""Somewhat below the share of proposals that become samples, (1 - 1/e) * 0.76; only sets the batch size."""


def discrete_gaussian(count: int, *, sigma: int, words: Words) -> IntArray:
    """Draw `count` independent discrete Gaussians with parameter `sigma`, exactly.

    The variance is at most sigma^2, and hardly less (the paper's section 2).

    Args:
        sigma: integer from 1 to `LARGEST_SIGMA`.
        words: the randomness; the samples are exact if its words are uniform and independent.

    Raises:
        PrivacyError: sigma or count out of range.
    """
    if not (isinstance(sigma, int) and 1 <= sigma <= LARGEST_SIGMA):
        raise PrivacyError(f"sigma {sigma!r} of a discrete Gaussian is not an integer in [1, {LARGEST_SIGMA}]")
    if count < 0:
        raise PrivacyError(f"cannot draw {count} samples")
    parts: list[IntArray] = []
    missing = count
    while missing:
        accepted = _propose(int(missing / _ACCEPTED) + 16, sigma, words)[:missing]
        parts.append(accepted)
        missing -= accepted.size
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _propose(size: int, sigma: int, words: Words) -> IntArray:
    """Discrete Laplace proposals of scale sigma, thinned to discrete Gaussians (Algorithm 3 with t = sigma)."""
    proposals = _discrete_laplace(size, sigma, words)
    distance = np.abs(proposals) - sigma
    return proposals[_bernoulli_exp(distance * distance, 2 * sigma * sigma, words)]


def _discrete_laplace(size: int, scale: int, words: Words) -> IntArray:
    """Those of `size` attempts that succeed: P[X = k] proportional to exp(-|k| / scale) (Algorithm 2)."""
    low = _uniform_below(scale, size, words)
    low = low[_bernoulli_exp_fraction(low, scale, words)]
    magnitude = low + scale * _geometric(low.size, words)
    negative = _uniform_below(2, low.size, words).astype(np.bool_)
    # Zero has two signs; one of them is thrown away.
    kept = ~(negative & (magnitude == 0))
    signed: IntArray = np.where(negative, -magnitude, magnitude)[kept]
    return signed


def _geometric(size: int, words: Words) -> IntArray:
    """How many coins of probability 1/e succeed before the first that fails."""
    successes = np.zeros(size, dtype=np.int64)
    running = np.arange(size)
    while running.size:
        running = running[_bernoulli_exp_fraction(np.ones(running.size, dtype=np.int64), 1, words)]
        successes[running] += 1
    return successes


def _bernoulli_exp(numerators: IntArray, denominator: int, words: Words) -> BoolArray:
    """True with probability exp(-numerator / denominator), each (Algorithm 1)."""
    whole, rest = np.divmod(numerators, denominator)
    alive = np.arange(numerators.size)
    done = np.zeros(numerators.size, dtype=np.int64)
    while True:
        pending = alive[done[alive] < whole[alive]]
        if not pending.size:
            break
        passed = _bernoulli_exp_fraction(np.ones(pending.size, dtype=np.int64), 1, words)
        done[pending[passed]] += 1
        failed = np.zeros(numerators.size, dtype=np.bool_)
        failed[pending[~passed]] = True
        alive = alive[~failed[alive]]
    result = np.zeros(numerators.size, dtype=np.bool_)
    result[alive[_bernoulli_exp_fraction(rest[alive], denominator, words)]] = True
    return result


def _bernoulli_exp_fraction(numerators: IntArray, denominator: int, words: Words) -> BoolArray:
    """The same for fractions of at most 1: the parity of a run of coins of probability fraction / k, k = 1, 2, ..."""
    odd = np.zeros(numerators.size, dtype=np.bool_)
    running = np.arange(numerators.size)
    k = 1
    while running.size:
        heads = _uniform_below(denominator * k, running.size, words) < numerators[running]
        odd[running[~heads]] = k % 2 == 1
        running = running[heads]
        k += 1
    return odd


def _uniform_below(bound: int, size: int, words: Words) -> IntArray:
    """Uniform integers in [0, bound), exactly: words above the largest multiple of the bound are drawn again."""
    if bound == 1:
        return np.zeros(size, dtype=np.int64)
    if not 2 <= bound < 1 << 62:
        raise PrivacyError(f"bound {bound} of a uniform draw is not in [1, 2^62)")
    largest = np.uint64(2**64 - 2**64 % bound - 1)
    drawn = words(size)
    while (again := np.flatnonzero(drawn > largest)).size:
        drawn[again] = words(again.size)
    return (drawn % np.uint64(bound)).astype(np.int64)
