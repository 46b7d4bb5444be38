"""Shadow models and RMIA (Zarifzadeh, Liu and Shokri 2024, arXiv 2312.03262).

A shadow is the audited run in small: an adapter trained centrally, with the run's clipping, noise and server optimizer,
on a random half of the records that are asked about, so that each record is in about half of the shadows. With p(x) the
mean over shadows of x's likelihood a token, a record's ratio is p(x | audited) / p(x), and its score the share of
population records z whose ratio it passes by a factor gamma.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from scipy.special import logsumexp

from fedpt_secure import files
from fedpt_secure.config import RunConfig
from fedpt_secure.federation.server_optimizer import ServerOptimizer
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy import SecureRandom, SmallExample, clipped_sum

FloatArray = npt.NDArray[np.float64]

GAMMA = 1.0


def train_shadow(
    config: RunConfig,
    small: SmallLM,
    examples: Sequence[SmallExample],
    *,
    noise_multiplier: float,
    rng: np.random.Generator,
) -> npt.NDArray[np.float32]:
    """An adapter `[d]` trained on the examples, each once, in as many rounds as the run has.

    The noise of a round is that of the run's cohort, scaled by how many of the run's records a round here stands for.
    """
    federation, training, privacy = config.federation, config.training, config.privacy
    before = small.adapter_vector()
    adapter = np.zeros_like(before)
    optimizer = ServerOptimizer.fresh(
        training.server_optimizer,
        learning_rate=training.server_learning_rate,
        momentum=training.server_momentum,
        dimension=small.dimension,
    )
    order = rng.permutation(len(examples))
    noise = SecureRandom()
    try:
        for batch in np.array_split(order, federation.rounds):
            small.load_adapter_vector(adapter)
            total = clipped_sum(small, [examples[index] for index in batch], clip_norm=privacy.clip_norm).vector
            deviation = noise_multiplier * privacy.clip_norm * math.sqrt(federation.agreed_cohort)
            total = total + noise.gaussian(small.dimension, standard_deviation=deviation)
            step = -training.local_learning_rate / (training.normaliser * federation.agreed_cohort) * total
            adapter, optimizer = optimizer.apply(adapter, step)
    finally:
        small.load_adapter_vector(before)
    return adapter


def stored_shadow(path: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]] | None:
    """A shadow's adapter and which records it has seen; None where there is none, or a damaged one."""
    try:
        with safe_open(path, framework="numpy") as content:
            return content.get_tensor("adapter"), content.get_tensor("seen").astype(np.bool_)
    except (OSError, SafetensorError):
        return None


def store_shadow(path: Path, adapter: npt.NDArray[np.float32], seen: npt.NDArray[np.bool_]) -> None:
    """Keep a shadow."""
    files.write_bytes(path, save({"adapter": adapter, "seen": seen.astype(np.uint8)}))


def rmia_scores(audited: FloatArray, shadows: FloatArray, *, gamma: float = GAMMA) -> FloatArray:
    """RMIA with the asked records themselves as the population.

    Args:
        audited: log-likelihood a token of each record under the audited adapter, `[n]`.
        shadows: the same under each shadow, `[s, n]`.
    """
    ratio = audited - (logsumexp(shadows, axis=0) - math.log(len(shadows)))
    passed = ratio[:, None] >= ratio[None] + math.log(gamma)
    np.fill_diagonal(passed, False)
    # Ties in the share are broken by the ratio itself, which has the same order at gamma 1.
    return np.asarray(passed.mean(1) + 1e-9 * np.tanh(ratio))
