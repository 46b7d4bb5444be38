"""Which classes of the head a training step's softmax is over: those that matter most, and a sample of the others.

A head of V classes costs 4 T V H multiplications for T positions of width H, most of a step where little of the rest is
trained. A *sampled softmax* (Jean et al. 2015, arXiv 1412.2007, section 3; Bengio and Senecal 2008) replaces the sum
over all classes in its denominator by an estimate: here K classes are summed, the other V - K are estimated from m of
them, uniform without replacement, each standing for (V - K) / m. A position's own class is always there, by itself.

The K are the most frequent ones by public text (`draw_classes`), or each example's own (`ClassDraw`): those that the
frozen base thinks likeliest in it (`likely_classes`), fewer of which do.

**Sensitivity is as with the whole head.** Public counts and a key that no data have touched decide what is shared by a
step's examples; an example's own classes follow from public weights and from that example alone. So for every value of
the key an example's gradient is a function of the weights and of that example: whatever sensitivity holds for one holds
for the other. Classes by a client's other records would break that. The gradient is not unbiased (the denominator's
estimate is), and its error falls with the number of classes; docs/dp_training.md has what it costs in utility.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

_BLOCK_ROWS = 128

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


@dataclass(frozen=True, slots=True, eq=False)
class ClassDraw:
    """One step's draw where every example has likely classes of its own.

    Attributes:
        own: K, an example's likely classes.
        order: int64 [K + m], distinct classes, uniform without replacement: the rest of an example is the first m of
            them that are not its own.
        classes: V.
    """

    own: int
    order: torch.Tensor
    classes: int

    def with_own(self, likely: torch.Tensor) -> OutputClasses:
        """The classes of an example whose likely ones are int64 `[own]`, distinct."""
        order = self.order.to(likely.device)
        mine = torch.zeros(self.classes, dtype=torch.bool, device=likely.device)
        mine[likely] = True
        rest = order[~mine[order]][: len(order) - self.own]
        return _classes(likely, rest, self.classes)


StepClasses = OutputClasses | ClassDraw
"""What a step's softmax is over."""


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
    drawn = _generator(key).choice(rest, count - frequent, replace=False)
    return _classes(torch.from_numpy(ranking[:frequent]), torch.from_numpy(drawn), len(ranking))


def draw_rest(classes: int, count: int, *, key: bytes) -> ClassDraw:
    """For two thirds of `count` that are an example's own and a third drawn from the rest.

    Args:
        classes: V.
        count: at least 3, below V.
        key: as in `draw_classes`.
    """
    own = count - count // 3
    order = _generator(key).choice(classes, count, replace=False)
    return ClassDraw(own, torch.from_numpy(order.astype(np.int64)), classes)


@torch.no_grad()
def likely_classes(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, count: int) -> torch.Tensor:
    """An example's own classes: its targets, and those of most probability, summed over its positions.

    Args:
        hidden: [positions, width], what the head reads where nothing has been trained.
        weight: of the head, [V, width].
        targets: int64 [positions].
        count: at most V. Of more different targets than that, which are left out is arbitrary.

    Returns: int64 [count], distinct.
    """
    mass = torch.zeros(len(weight), device=weight.device)
    for rows in torch.split(hidden, _BLOCK_ROWS):
        mass += torch.softmax((rows.to(weight.dtype) @ weight.T).float(), dim=1).sum(0)
    mass[targets] += len(targets) + 1.0  # above any that is no target
    return mass.topk(count).indices


def _generator(key: bytes) -> np.random.Generator:
    seed = hashlib.blake2b(b"output classes", key=key[:64], digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(seed, "little"))


def _classes(summed: torch.Tensor, drawn: torch.Tensor, classes: int) -> OutputClasses:
    """Classes that stand for themselves, and some of the rest for all of it."""
    rows = torch.cat([summed, drawn])
    log_weights = torch.zeros(len(rows), device=rows.device)
    log_weights[len(summed) :] = math.log((classes - len(summed)) / len(drawn))
    places = torch.full((classes,), -1, dtype=torch.int64, device=rows.device)
    places[rows] = torch.arange(len(rows), device=rows.device)
    return OutputClasses(rows, log_weights, places)
