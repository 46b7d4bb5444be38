"""Which device a run computes on."""

from __future__ import annotations

import torch

from fedpt_secure.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU that PyTorch sees, else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {name!r} is not available: {str(error).splitlines()[0]}", hint="--device auto or --device cpu"
        ) from None
    return device
