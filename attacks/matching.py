"""What a server that sees an update can say about a record in it: which of many candidates it was.

The server knows all candidates (a known sentence with one of many numbers), so that it can compute each one's gradient
g_c, and takes the one that points where the update points: argmax_c cos(g_c - mean, u - mean). What it learns is
log2(candidates / rank of the right one) bits; guessing gives 1.44 on average. Of `n` clients one is the victim, the
others' updates are gradients of their own texts. Lengths are clip norms.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fedpt_secure.attacks.protocol.cohort import Cohort
from fedpt_secure.crypto import FixedPointEncoding
from fedpt_secure.crypto import messages as m
from fedpt_secure.crypto.packing import unpack

FloatArray = npt.NDArray[np.float64]

CHANCE_BITS = 1 / math.log(2)
"""Mean bits of a guess at random, for many candidates."""
COHORTS = (2, 4, 8, 16, 32)
SIGMAS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Standard deviations of a sum's noise, in clip norms."""


def matching_curves(
    candidates: FloatArray, others: FloatArray, *, trials: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Bits from a bare update, a masked one, sums of n, and noised sums of 8.

    Args:
        candidates: clipped gradients of what the victim may have written, `[c, d]`.
        others: clipped gradients of other clients' texts, `[o, d]`.
    """
    centred = candidates - candidates.mean(0)
    lengths = np.maximum(np.linalg.norm(centred, axis=1), 1e-12)

    def bits(updates: FloatArray, secret: npt.NDArray[np.int64], clients: int) -> dict[str, float]:
        # The server subtracts what it expects of everybody: the victim's mean, and the others'.
        expected = candidates.mean(0) + (clients - 1) * others.mean(0)
        scores = (updates - expected) @ centred.T / lengths
        right = scores[np.arange(len(secret)), secret]
        ranks = 1 + (scores > right[:, None]).sum(1)
        return _interval(np.log2(len(candidates) / ranks))

    secret = rng.integers(len(candidates), size=trials)
    rows = [_row("bare", 1, 0.0, bits(candidates[secret], secret, 1), len(candidates), trials)]
    masked = _masked(candidates[secret[: max(2, trials // 4)]])
    rows.append(_row("masked", 1, 0.0, bits(masked, secret[: len(masked)], 1), len(candidates), len(masked)))
    for clients in COHORTS:
        total = candidates[secret] + _others(others, trials, clients - 1, rng)
        rows.append(_row("sum", clients, 0.0, bits(total, secret, clients), len(candidates), trials))
    for sigma in SIGMAS:
        total = candidates[secret] + _others(others, trials, 7, rng)
        total += sigma * rng.standard_normal(total.shape)
        rows.append(_row("noised_sum", 8, sigma, bits(total, secret, 8), len(candidates), trials))
    return rows


def _others(others: FloatArray, trials: int, count: int, rng: np.random.Generator) -> FloatArray:
    chosen = rng.integers(len(others), size=(trials, count))
    return np.array([others[row].sum(0) for row in chosen]).reshape(trials, others.shape[1])


def _masked(updates: FloatArray) -> FloatArray:
    """Each update as the server sees it in a real round of three, read as if it were not masked."""
    cohort, bits = Cohort(3), 32
    encoding = FixedPointEncoding(ring_bits=bits, bound=1.0, cohort=3)
    seen = []
    for index, update in enumerate(updates):
        context = cohort.context(round_index=index, vector_length=len(update))
        a_round = cohort.round(context)
        ring = encoding.encode(update)
        a_round.vectors = dict.fromkeys(cohort.ids, ring)
        a_round.advertise().share()
        sent = a_round.clients[cohort.ids[0]].mask(a_round.inboxes[cohort.ids[0]], ring)
        vector = m.decode(sent, m.MaskedVector, context, body_bytes=9 * len(update)).vector
        seen.append(encoding.signed(unpack(vector, len(update), bits)) / encoding.scale)
    return np.array(seen)


def _row(what: str, clients: int, sigma: float, bits: dict[str, float], candidates: int, trials: int) -> dict[str, Any]:
    return {
        "what": what,
        "clients": clients,
        "sigma": sigma,
        "bits": bits,
        "most_bits": math.log2(candidates),
        "chance_bits": CHANCE_BITS,
        "trials": trials,
    }


def _interval(values: FloatArray) -> dict[str, float]:
    mean = float(values.mean())
    reach = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else mean
    return {"value": mean, "low": max(0.0, mean - reach), "high": mean + reach}
