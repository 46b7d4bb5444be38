"""What must not go unsaid."""

from __future__ import annotations

import math

from rich.console import Console

from fedpt_secure.config import RunConfig


def warn_if_not_private(config: RunConfig, console: Console) -> None:
    """Say in red why a run's models are not private, where they are not."""
    if math.isinf(config.privacy.epsilon):
        console.print("[bold red]NOT PRIVATE:[/] epsilon is infinite; updates carry no noise.", soft_wrap=True)
    if config.insecure_deterministic:
        console.print(
            "[bold red]NOT PRIVATE:[/] --insecure-deterministic: anybody can recompute the noise.", soft_wrap=True
        )


def warn_of_trust(config: RunConfig, console: Console) -> None:
    """Say whom a run's clients have to trust, where that is more than they might think."""
    if config.federation.aggregator == "ckks":
        console.print(
            "[bold yellow]TRUST:[/] aggregator ckks: all clients share the key that decrypts every update, so one "
            "colluding client breaks the privacy of all; the server is assumed to be honest but curious. "
            "Differential privacy (mode local) does not depend on it; --aggregator masks withstands both.",
            soft_wrap=True,
        )
