"""A model's weights in one byte each, for files: matrices as int8 with a float16 scale per row, the rest as float16.

    NAME          int8 `[rows, columns]`, from -127 to 127
    NAME.scale    float16 `[rows]`; an entry of the weight is its integer times its row's scale, exactly, in float32

A scale is the row's largest magnitude over 127, rounded to float16; integers are chosen for the rounded scale, so that
no entry is off by more than half of it. Scales below float16's normal numbers, which would keep few bits, are the next
power of two instead; a row too small even for these, like a row of zeros, has scale 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

SCALE = ".scale"
_LEVELS = 127
_SMALL_SCALES = torch.tensor([2.0**exponent for exponent in range(-24, -13)], dtype=torch.float64)
"""The powers of two from float16's smallest number to its smallest normal one."""


def compact(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Round a model's weights to the form for files; `expand` gives the rounded weights back.

    **Guarantees**: an entry of a matrix is off by at most half of its row's stored scale. Rounding is done once:
    `compact(expand(compact(state)))` is `compact(state)`, bit for bit.

    Raises:
        ValueError: a tensor that is not floating-point or not finite, entries beyond what float16 can scale or hold, or
            a name that ends in `.scale`.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(SCALE):
            raise ValueError(f"{name}: names that end in {SCALE} are kept for the scales of int8 weights")
        if not value.is_floating_point():
            raise ValueError(f"{name} is of {value.dtype}, not floating-point")
        if not value.isfinite().all():
            raise ValueError(f"{name} holds entries that are not finite")
        matrix = value.dim() == 2
        halves = _scales(value.detach()) if matrix else value.detach().half().contiguous()
        if not halves.isfinite().all():
            raise ValueError(f"{name} holds entries up to {value.abs().max():.3g}, too large for float16")
        if matrix:
            tensors[name], tensors[name + SCALE] = _rounded(value.detach(), halves)
        else:
            tensors[name] = halves
    return tensors


def expand(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 weights of a file that `compact` made, or of one in plain float16 or float32.

    Raises:
        ValueError: as `expanded`.
    """
    return dict(expanded(tensors))


def expanded(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """`expand` one weight at a time, so that a reader need not hold all of them twice.

    Raises:
        ValueError: an int8 weight without its scale or a scale without its int8 weight; a wrong shape, rank or dtype;
            scales that are negative or not finite; an integer outside -127 to 127.
    """
    for name, value in tensors.items():
        if name.endswith(SCALE):
            weight = tensors.get(name.removesuffix(SCALE))
            if weight is None or weight.dtype != torch.int8:
                raise ValueError(f"{name} is the scale of no int8 weight")
        elif value.dtype == torch.int8:
            scale = tensors.get(name + SCALE)
            if scale is None:
                raise ValueError(f"{name} is int8 and lacks its scale {name}{SCALE}")
            yield name, _scaled(name, value, scale)
        elif value.dtype in (torch.float16, torch.float32):
            yield name, value.float()
        else:
            raise ValueError(f"{name} is of {value.dtype}; weights are int8, float16 or float32")


def _scales(weight: Tensor) -> Tensor:
    """float16 `[rows]`, above zero; infinite where float16 has none so large."""
    wanted = weight.double().abs().amax(1) / _LEVELS
    powers = _SMALL_SCALES.to(wanted.device)
    next_power = powers[torch.bucketize(wanted, powers).clamp(max=len(powers) - 1)]
    return torch.where(wanted < powers[-1], next_power, wanted).half()


def _rounded(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Integers `[rows, columns]`, and the scales with 0 for rows that have become zero."""
    # In float64 the quotients of float32 weights round as the exact ones do.
    integers = (weight.double() / scale.double()[:, None]).round()
    return integers.to(torch.int8), torch.where(integers.any(1), scale, 0.0)


def _scaled(name: str, weight: Tensor, scale: Tensor) -> Tensor:
    if weight.dim() != 2:
        raise ValueError(f"{name} is int8 of rank {weight.dim()}; only matrices are")
    if scale.dtype != torch.float16 or scale.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}{SCALE} is {scale.dtype} of shape {list(scale.shape)}, not float16 of shape [{len(weight)}]"
        )
    if not scale.isfinite().all() or (scale < 0).any():
        raise ValueError(f"{name}{SCALE} holds scales that are negative or not finite")
    if (weight < -_LEVELS).any():
        raise ValueError(f"{name} holds {int(weight.min())}; its integers are from -{_LEVELS} to {_LEVELS}")
    return weight.float().mul_(scale.float()[:, None])
