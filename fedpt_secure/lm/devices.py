"""Which device a run computes on."""

from __future__ import annotations

import re

import torch

from fedpt_secure.errors import ConfigError

_KNOWN = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?|mps", re.ASCII)


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU that PyTorch sees, else the CPU.

    PyTorch knows more names, `meta` for one, which computes nothing; they are refused.

    Raises:
        ConfigError: not one of `auto`, `cpu`, `cuda`, `cuda:N` and `mps`, or no such device here.
    """
    if not _KNOWN.fullmatch(name):
        raise ConfigError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N and mps", hint="--device auto")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ConfigError(f"device {name!r} is not available: {reason}", hint="--device auto or --device cpu") from None
    return device
