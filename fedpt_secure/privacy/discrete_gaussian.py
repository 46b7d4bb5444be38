"""The discrete Gaussian on the integers, sampled exactly (after Canonne, Kamath and Steinke 2020, arXiv 2004.00010).

P[X = k] is proportional to exp(-k^2 / (2 sigma^2)). The result is a function of uniform words, and has exactly that
distribution: there is nothing for Mironov's attack (2012) on floating-point noise to hold on to.

**The algorithm** is the paper's 3, rejection from a discrete Laplace, with its two rejections made one. Magnitudes are
proposed in blocks of w integers, w a power of two near sigma / 8:

1. K counts the k >= 1 with U < exp(-k w / sigma), for a uniform U: P[K = j] is proportional to exp(-j w / sigma).
2. m = K w + low, for `low` uniform below w. So P[m] is proportional to exp(-K w / sigma).
3. m is accepted with probability exp(-((m - sigma)^2 + 2 sigma low) / (2 sigma^2)), which is at most 1. The product of
   the two is exp(-m^2 / (2 sigma^2)) times a constant, as K w sigma = m sigma - low sigma.
4. It gets a fair sign; one of the two zeros is thrown away.

**Floating point decides nothing that is close.** Steps 1 and 3 compare a uniform number with an exponential. Of the
number 53 and 44 bits are drawn at first. Where the rounded exponential is further away than its error and the undrawn
bits together could be, the comparison is certain; else `exact_uniform` draws more and computes exactly. The margins are
2^10 and more times the error of a logarithm or exponential that is right to 2^-48, where NumPy's are right to 2^-51.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedpt_secure.errors import PrivacyError
from fedpt_secure.privacy.exact_uniform import LazyUniform, Words

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
WordArray = npt.NDArray[np.uint64]

LARGEST_SIGMA = 1 << 22
"""With it |X| stays below 2^31 unless a uniform number begins with some 700 zeros, and every square below 2^63."""

_BLOCKS_PER_SIGMA = 8
_LOW_BITS = 19
"""The widest block, LARGEST_SIGMA / 8, has so many bits."""
_COIN_BITS = 64 - _LOW_BITS - 1
_BLOCK_BITS = 53
_CERTAIN_FROM = 1 << 30
"""Smaller 53-bit numbers say too little about their own logarithm, with which K is found."""
_K_MARGIN = 2.0**-26
"""16 blocks a sigma times the undrawn bits' share, 2^-30 of the number, on either side, is half of this."""
_COIN_MARGIN = 0.25
"""In units of the last of the coin's bits, 2^-44."""
_AT_ONCE = 1 << 14
"""Attempts a pass, which fit into a core's own cache."""


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
    samples = np.empty(count, dtype=np.int64)
    filled = 0
    while filled < count:
        accepted = _propose(min(_AT_ONCE, 2 * (count - filled) + 16), sigma, words)[: count - filled]
        samples[filled : filled + accepted.size] = accepted
        filled += accepted.size
    return samples


def _propose(size: int, sigma: int, words: Words) -> IntArray:
    """Those of `size` attempts that become samples."""
    width = _block_width(sigma)
    first, second = words(2 * size).reshape(2, size)
    low = (second & np.uint64(width - 1)).astype(np.int64)
    negative = (second >> np.uint64(_LOW_BITS) & np.uint64(1)).astype(np.bool_)
    magnitude = _blocks(first >> np.uint64(64 - _BLOCK_BITS), width, sigma, words) * width + low
    distance = magnitude - sigma
    accepted = _coins(second >> np.uint64(64 - _COIN_BITS), distance * distance + 2 * sigma * low, sigma, words)
    accepted &= ~(negative & (magnitude == 0))
    signed: IntArray = np.where(negative, -magnitude, magnitude)[accepted]
    return signed


def _block_width(sigma: int) -> int:
    """The largest power of two that is at most sigma / 8, or 1."""
    return 1 << max(0, (sigma // _BLOCKS_PER_SIGMA).bit_length() - 1)


def _blocks(prefixes: WordArray, width: int, sigma: int, words: Words) -> IntArray:
    """K of step 1, for numbers U that begin with these 53 bits: the integer part of -ln(U) sigma / width."""
    middle = (prefixes.astype(np.float64) + 0.5) * 2.0**-_BLOCK_BITS
    position = np.log(middle) * (-sigma / width)
    nearest = np.rint(position)
    blocks = np.floor(position).astype(np.int64)
    tiny = prefixes < np.uint64(_CERTAIN_FROM)
    for index in np.flatnonzero(tiny | (np.abs(position - nearest) < _K_MARGIN)).tolist():
        known = 0 if tiny[index] else max(0, int(nearest[index]) - 1)
        uniform = LazyUniform(int(prefixes[index]), _BLOCK_BITS, words)
        blocks[index] = uniform.thresholds_above(width, sigma, known=known)
    return blocks


def _coins(prefixes: WordArray, numerators: IntArray, sigma: int, words: Words) -> BoolArray:
    """Step 3: which of the numbers that begin with these 44 bits are below exp(-numerator / (2 sigma^2))."""
    denominator = 2 * sigma * sigma
    thresholds = np.exp(numerators * (-1.0 / denominator)) * 2.0**_COIN_BITS
    numbers = prefixes.astype(np.float64)
    certain: BoolArray = numbers + (1 + _COIN_MARGIN) <= thresholds
    possible = numbers - _COIN_MARGIN < thresholds
    for index in np.flatnonzero(certain != possible).tolist():
        uniform = LazyUniform(int(prefixes[index]), _COIN_BITS, words)
        certain[index] = uniform.below_exp(int(numerators[index]), denominator)
    return certain
