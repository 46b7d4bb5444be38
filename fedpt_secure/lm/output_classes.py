"""Which classes of the head a training step's softmax is over: the frequent ones, and a sample of the others.

A head of V classes costs 4 T V H multiplications for T positions of width H, most of a step where little of the rest is
trained. A *sampled softmax* (Jean et al. 2015, arXiv 1412.2007, section 3; Bengio and Senecal 2008) replaces the sum
over all classes in its denominator by an estimate: here the K most frequent classes are summed, the other V - K are
estimated from m of them, uniform without replacement, each standing for (V - K) / m. A position's own class is
always there, by itself.

**The choice is public**: it follows from the ranking (counts over public text) and a key that no data have touched. So
for every value of the key an example's gradient is a function of the weights and of that example, as with the whole
head: whatever sensitivity holds for one holds for the other. The gradient is not unbiased (the denominator's estimate
is), and its error falls with the number of classes; docs/dp_training.md has what it costs in utility.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Ranking = npt.NDArray[np.int64]
"""All classes, the most frequent first."""


@dataclass(frozen=True, slots=True, eq=False)
class OutputClasses:
    """One step's classes.

    Attributes:
        rows: int64 [n], distinct rows of the head.
        log_weights: float32 [n], log of how many classes each stands for.
        places: int64 [v], where in `rows` a class is; -1 where it is not.
    """

    rows: torch.Tensor
    log_weights: torch.Tensor
    places: torch.Tensor


def count_classes(texts: Iterable[Sequence[int]], classes: int) -> npt.NDArray[np.int64]:
    """How often each class is in token ids of public text, `[v]`.

    Args:
        texts: small token ids.
        classes: v.
    """
    counts = np.zeros(classes, dtype=np.int64)
    for ids in texts:
        counts += np.bincount(np.asarray(ids, dtype=np.int64), minlength=classes)
    return counts


def rank_classes(counts: npt.NDArray[np.int64]) -> Ranking:
    """All classes by their counts; those of equal count by their id."""
    return np.lexsort((np.arange(len(counts)), -counts)).astype(np.int64)


def draw_classes(ranking: Ranking, count: int, *, key: bytes) -> OutputClasses:
    """The half of `count` that is most frequent, and the other half drawn from the rest.

    Args:
        count: at least 2, below the number of classes.
        key: decides the draw; it may be known to anybody, and must not depend on data.
    """
    frequent = count // 2
    rest = ranking[frequent:]
    seed = hashlib.blake2b(b"output classes", key=key[:64], digest_size=16).digest()
    drawn = np.random.default_rng(int.from_bytes(seed, "little")).choice(rest, count - frequent, replace=False)
    rows = torch.from_numpy(np.concatenate([ranking[:frequent], drawn]))
    log_weights = torch.zeros(count)
    log_weights[frequent:] = math.log(len(rest) / len(drawn))
    places = torch.full((len(ranking),), -1, dtype=torch.int64)
    places[rows] = torch.arange(count)
    return OutputClasses(rows, log_weights, places)
