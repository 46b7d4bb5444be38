"""The sum of clipped per-example gradients: all that a Gaussian mechanism on examples asks of training.

Noise, sampling, encoding and accounting are the mechanisms' own; this is the part of them that touches records. Its
guarantee is meant for floating-point numbers as they are, not for the reals they stand for (Casacuberta et al. 2022,
"Widespread underestimation of sensitivity in differentially private libraries"); docs/dp_training.md has the argument
and what each method costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from fedpt_secure.errors import PrivacyError
from fedpt_secure.lm.output_classes import StepClasses
from fedpt_secure.lm.part import WHOLE, TrainedPart
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy.bookkeeping import bookkeeping_gradients
from fedpt_secure.privacy.examples import SampledPositions, SmallExample
from fedpt_secure.privacy.opacus_gradients import ghost_sums, hook_gradients

Method = Literal["bookkeeping", "hooks", "ghost"]

_SMALLEST_CLIP_NORM = float(np.finfo(np.float32).tiny)
_GRID_BITS = 32
_MOST_EXAMPLES = 2 ** (53 - _GRID_BITS)  # their sum, in grid steps, is an integer that float64 holds
_NORM_ROUNDING = 1e-9  # relative; a float64 norm of 1e6 entries is far more exact
_PART = 1 << 15  # entries


@dataclass(frozen=True, slots=True)
class ClippedSum:
    """The un-noised sum over a sample, and what the sum hides.

    **Private**, both of them: neither may leave the client before a mechanism has added its noise.

    Attributes:
        vector: sum of the clipped gradients, float64 `[d]`, in the order of `SmallLM.adapter_vector`.
        norms: L2 norm of each example's gradient before clipping, float64 `[n]`, in the order of the examples; inf
            where the gradient is not finite. Adaptive clipping (Andrew et al. 2021) noises a count over them.
    """

    vector: npt.NDArray[np.float64]
    norms: npt.NDArray[np.float64]


def clipped_sum(
    small: SmallLM,
    examples: Sequence[SmallExample],
    *,
    clip_norm: float,
    method: Method = "bookkeeping",
    examples_per_pass: int = 1,
    positions: SampledPositions | None = None,
    classes: StepClasses | None = None,
    part: TrainedPart = WHOLE,
) -> ClippedSum:
    """Sum the examples' gradients at the loaded adapter, each scaled down to `clip_norm` where it is longer.

    **Guarantees** Adding or removing one example moves `vector` by an L2 norm of at most `clip_norm`, rounding
    included, whatever the weights and the example are:

    - each term's norm is at most `clip_norm`: lengths and products are float64, and the length is rounded up;
    - terms are cut toward zero to a grid of 2^-32 of the clip norm, on which float64 sums are exact, so that neither
      the order nor the number of the other terms changes what one of them adds;
    - a gradient that is not finite counts as zero: clipping cannot bound it, and no noise hides a NaN; weights that
      overflow on one record would otherwise be a way to ask for it;
    - no examples give the zero vector.

    **Assumptions** An example's gradient is a function of the weights and of that example alone. With one example per
    pass that holds by construction, if the processor repeats itself. With more, the gradient is computed in an array
    whose shape the other examples decide, and rounding follows the shape (1e-7 of the gradient in float32, 1e-3
    in bfloat16, which shared passes are therefore refused).

    Args:
        clip_norm: inf does not clip: for a sum that is clipped as a whole. Only the last two guarantees hold then.
        method: `bookkeeping` (one backward pass, `privacy.bookkeeping`); `hooks` and `ghost` are Opacus's, for
            comparison. `ghost` sums in float32, so that its guarantee holds up to rounding.
        examples_per_pass: examples in one forward pass; where the assumption is to be had by construction, 1.
        positions: the loss tokens of an example that count in this step; all of them if None.
        classes: what this step's softmax is over (`lm.output_classes`), drawn without a look at the examples, for
            `bookkeeping` of one example a pass alone; all of them if None.
        part: what is trained, for `bookkeeping` alone; the sum is 0 elsewhere, and an example's norm is over the part.

    Raises:
        PrivacyError: `clip_norm` is not a positive number within float32's range, the method is unknown or a pass
            has no examples, passes in bfloat16 would be shared, there are more examples than the grid can sum, another
            method would sum a part or sample classes, ghost clipping would train in units, or a model whose layers do
            not keep examples apart.
    """
    if not clip_norm >= _SMALLEST_CLIP_NORM:
        raise PrivacyError(f"clip_norm is {clip_norm}, must be at least {_SMALLEST_CLIP_NORM:g}")
    if method not in get_args(Method) or examples_per_pass < 1:
        raise PrivacyError(
            f"method {method!r} with {examples_per_pass} examples per pass is not a way to sum gradients"
        )
    if len(examples) > _MOST_EXAMPLES:
        raise PrivacyError(f"{len(examples)} examples in one sum; at most {_MOST_EXAMPLES} add up exactly")
    if examples_per_pass > 1 and small.compute.dtype != torch.float32:
        raise PrivacyError(
            f"{examples_per_pass} examples would share a pass in {small.compute.dtype}, where one moves the others' "
            "gradients by far more than rounding in float32 does",
            hint="one example per pass, or float32",
        )
    if part != WHOLE and method != "bookkeeping":
        raise PrivacyError(f"method {method!r} sums gradients of whole adapters only")
    if classes is not None and (method != "bookkeeping" or examples_per_pass > 1):
        raise PrivacyError("a sampled softmax is for book-keeping of one example a pass")
    if method == "ghost" and small.has_units:
        raise PrivacyError(
            "ghost clipping knows norms by the parameters themselves, not in the units of lora.output_bias"
        )
    total = _GridSum(small.dimension, clip_norm)
    norms = np.zeros(len(examples))
    if method == "ghost":
        with ghost_sums(small, total.scales, positions=positions) as sums:
            for chosen, batch in _passes(examples, examples_per_pass):
                scaled, norms[chosen] = sums(batch)
                total.add_floats(scaled)
    else:
        way = (
            bookkeeping_gradients(small, positions=positions, classes=classes, part=part)
            if method == "bookkeeping"
            else hook_gradients(small, positions=positions)
        )
        with way as gradients:
            for chosen, batch in _passes(examples, examples_per_pass):
                norms[chosen] = total.add(gradients(batch))
    return ClippedSum(total.value(), norms)


class _GridSum:
    """Clips vectors and adds them up, in steps of a power of two near 2^-32 of the clip norm."""

    def __init__(self, dimension: int, clip_norm: float) -> None:
        self._clip_norm = clip_norm
        self._on_grid = math.isfinite(clip_norm)
        self._step = 2.0 ** (math.frexp(clip_norm)[1] - _GRID_BITS) if self._on_grid else 1.0
        self._steps = torch.zeros(dimension, dtype=torch.float64)
        self._buffer = torch.empty(_PART, dtype=torch.float64)

    def scales(self, norms: torch.Tensor) -> torch.Tensor:
        """Factor for each vector of these norms: at most 1, and 0 where the norm is not finite."""
        longest = norms.double() * (1 + _NORM_ROUNDING)
        return torch.where(longest.isfinite(), (self._clip_norm / longest).clamp(max=1.0), 0.0)

    def add(self, vectors: torch.Tensor) -> npt.NDArray[np.float64]:
        """Clip and add the rows of `[n, d]`; their norms before that, inf where not finite."""
        norms = torch.stack([self._norm(vector) for vector in vectors]).nan_to_num(nan=torch.inf, posinf=torch.inf)
        for vector, scale in zip(vectors, self.scales(norms).tolist(), strict=True):
            if scale == 0:  # a product of 0 and inf would be NaN
                continue
            for part, total in zip(_parts(vector), _parts(self._steps), strict=True):
                steps = self._in_float64(part).mul_(scale / self._step)
                if self._on_grid:
                    np.trunc(steps.numpy(), out=steps.numpy())  # the same numbers as torch's, 20 times as fast
                total += steps
        return np.asarray(norms.numpy())

    def _norm(self, vector: torch.Tensor) -> torch.Tensor:
        squares = (torch.dot(part, part) for part in map(self._in_float64, _parts(vector)))
        return torch.as_tensor(sum(squares)).sqrt()

    def _in_float64(self, part: torch.Tensor) -> torch.Tensor:
        """Until the next call. In one buffer: the memory of a wide adapter's copy would be mapped anew each time."""
        return self._buffer[: len(part)].copy_(part)

    def add_floats(self, vector: torch.Tensor) -> None:
        """Add `[d]` as it is."""
        self._steps += vector.double() / self._step

    def value(self) -> npt.NDArray[np.float64]:
        return np.asarray((self._steps * self._step).numpy())


def _parts(vector: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(vector, _PART)


def _passes(
    examples: Sequence[SmallExample], examples_per_pass: int
) -> Iterator[tuple[npt.NDArray[np.int64], list[SmallExample]]]:
    """Each pass's examples and their indices, like lengths together, so that little is padded."""
    order = np.argsort([len(example.ids) for example in examples], kind="stable").astype(np.int64)
    for start in range(0, len(order), examples_per_pass):
        chosen = order[start : start + examples_per_pass]
        yield chosen, [examples[index] for index in chosen]
