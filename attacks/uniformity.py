"""Do masked vectors look uniform in the ring, and owe nothing to what they hide?

Statistics cannot prove secrecy: a generator with a short key passes them all. They catch masks that are missing,
narrow, used twice, or correlated with what they hide (`tests/crypto/test_masked_looks_uniform.py` plants each fault).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

RingVector = npt.NDArray[np.unsignedinteger]


def uniformity_p_values(
    sample: RingVector, bits: int, plain: npt.NDArray[np.float64] | None = None
) -> dict[str, float]:
    """By name: p-values of tests that `sample` is uniform in Z_{2^bits}, and independent of `plain` where it is given.

    Args:
        sample: `[n]`, a few thousand elements at least.
        plain: `[n]`, what is hidden, in any scale.
    """
    wide = sample.astype(np.uint64)
    top, bottom = wide >> np.uint64(bits - 8), wide & np.uint64(255)
    twice = wide.size - np.unique(wide).size
    found = {
        "top byte, chi-square": stats.chisquare(np.bincount(top.astype(int), minlength=256)).pvalue,
        "bottom byte, chi-square": stats.chisquare(np.bincount(bottom.astype(int), minlength=256)).pvalue,
        "distribution, Kolmogorov-Smirnov": stats.kstest(wide / 2.0**bits, "uniform").pvalue,
        "values seen twice": stats.poisson.sf(twice - 1, wide.size**2 / 2 ** (bits + 1)),
        "neighbours, Spearman at lag 1": _spearman(wide[1:], wide[:-1]),
    }
    if plain is not None:
        found["order of the plaintext, Spearman"] = _spearman(wide, plain)
    for bit in range(bits):
        ones = int(np.count_nonzero(wide >> np.uint64(bit) & np.uint64(1)))
        found[f"bit {bit}, binomial"] = stats.binomtest(ones, wide.size).pvalue
    return {name: float(value) for name, value in found.items()}


def difference(first: RingVector, second: RingVector, bits: int) -> RingVector:
    """`second - first` in Z_{2^bits}: where masks were used twice, what is left is the difference of plain vectors."""
    mask = np.uint64((1 << bits) - 1)
    return np.asarray((second.astype(np.uint64) - first.astype(np.uint64)) & mask)


def _spearman(first: npt.NDArray[np.generic], second: npt.NDArray[np.generic]) -> float:
    # A constant sample has no ranks to correlate: as far from uniform as can be.
    if (first == first[0]).all() or (second == second[0]).all():
        return 0.0
    return float(stats.spearmanr(first, second).pvalue)
