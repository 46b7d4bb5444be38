"""One record as the small LM sees it, and its loss: what the privacy mechanisms protect and differentiate."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy

from fedpt_secure.errors import PrivacyError
from fedpt_secure.lm.output_classes import StepClasses
from fedpt_secure.lm.part import WHOLE, TrainedPart
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy.noise import NoiseSource


@dataclass(frozen=True, slots=True)
class SmallExample:
    """One record in the small LM's vocabulary.

    Attributes:
        ids: token ids, the separator first.
        loss_from: first position that is predicted with loss, at least 1 and below `len(ids)`.
    """

    ids: tuple[int, ...]
    loss_from: int


@dataclass(frozen=True, slots=True)
class SampledPositions:
    """Which of an example's loss tokens a step looks at: at most `count` of them, uniformly, without replacement.

    **Guarantees** The choice is a function of the key and of the example alone, so that for every value of the key an
    example's gradient still depends on nothing but the weights and that example: whatever sensitivity holds over
    all loss tokens holds over the chosen ones. The key may be known to anybody; no amplification is claimed.
    The sampled loss's gradient is unbiased for the whole loss's, before clipping.

    Attributes:
        count: public constant of the run.
        key: 16 bytes or more, drawn anew in every step.
    """

    count: int
    key: bytes

    @classmethod
    def draw(cls, count: int | None, noise: NoiseSource) -> SampledPositions | None:
        """A step's choice; None, without a draw, where all loss tokens count."""
        return None if count is None else cls(count, noise.random_bytes(16))

    def of(self, example: SmallExample) -> npt.NDArray[np.int64]:
        """Chosen rows, ascending; row i stands for the prediction of position `example.loss_from + i`."""
        rows = len(example.ids) - example.loss_from
        if rows <= self.count:
            return np.arange(rows)
        content = struct.pack(f"<{len(example.ids) + 1}q", example.loss_from, *example.ids)
        seed = hashlib.blake2b(content, key=self.key[:64], digest_size=16).digest()
        chosen = np.random.default_rng(int.from_bytes(seed, "little")).choice(rows, self.count, replace=False)
        return np.sort(chosen)


def drawn_classes(small: SmallLM, count: int | None, noise: NoiseSource) -> StepClasses | None:
    """A step's classes of a sampled softmax; None, without a draw, where the whole head counts.

    The draw depends on the key alone, and what an example adds to it on that example alone: its gradient is still a
    function of the weights and of that example, for every value of the key, which may be known to anybody.

    Raises:
        ConfigError: the small LM cannot be trained so.
    """
    return None if count is None else small.output_classes(count, key=noise.random_bytes(16))


def example_losses(
    small: SmallLM, batch: Sequence[SmallExample], *, positions: SampledPositions | None = None
) -> torch.Tensor:
    """Mean negative log-likelihood (nats per token) of each example's own loss tokens, `[len(batch)]`.

    The mean is over the example's tokens, never over the batch's: an example's gradient must not depend on the
    others.

    Args:
        positions: the loss tokens that count; all of them if None.
    """
    width = max(len(example.ids) for example in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    targets = torch.full((len(batch), width), -100)
    for row, example in enumerate(batch):
        content = torch.tensor(example.ids)
        ids[row, : len(content)] = content
        rows = slice(None) if positions is None else torch.from_numpy(positions.of(example))
        targets[row, example.loss_from - 1 : len(content) - 1][rows] = content[example.loss_from :][rows]
    # Padding is on the right of causal attention, so that no loss token ever sees it: no mask is needed.
    logits = small.model(input_ids=ids.to(small.device), use_cache=False).logits.float()
    targets = targets.to(small.device)
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    counts = (targets != -100).sum(1)
    return losses.view(len(batch), width).sum(1) / counts


def example_loss(
    small: SmallLM,
    example: SmallExample,
    *,
    positions: SampledPositions | None = None,
    classes: StepClasses | None = None,
    part: TrainedPart = WHOLE,
) -> torch.Tensor:
    """The same of one example by itself, computed as `small.compute` says and no more of it than its gradient needs.

    Where the model can be cut (`lm.split`), only its upper half runs again, and its head only at the tokens that count.

    Args:
        classes: what the softmax is over, beside each prediction's own class; all if None.
        part: what is trained; the loss is differentiable in the rest too only above the part's lowest layer.

    Raises:
        PrivacyError: classes are given and the model cannot be cut.
    """
    split = small.split_for(part)
    if split is not None:
        rows = np.arange(len(example.ids) - example.loss_from) if positions is None else positions.of(example)
        return split.loss(example.ids, example.loss_from, torch.from_numpy(rows).to(small.device), classes)
    if classes is not None:
        raise PrivacyError("a sampled softmax needs a small LM that can be cut (`lm.split.SPLITTABLE`)")
    with torch.autocast(small.device.type, small.compute.dtype, enabled=small.compute.dtype != torch.float32):
        return example_losses(small, [example], positions=positions).sum()
