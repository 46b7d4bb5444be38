"""What the command lines of the simulated utility benchmarks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console

from fedpt_secure.cli.progress import shown_on
from fedpt_secure.cli.quiet import quiet_libraries
from fedpt_secure.errors import FedptError
from fedpt_secure.progress import Progress


def finished(work: Callable[[Progress], None]) -> int:
    """Do the work on one thread under a progress display; the exit code, an error of ours told on standard error."""
    torch.set_num_threads(1)
    quiet_libraries()
    console = Console(stderr=True)
    try:
        with shown_on(console) as progress:
            work(progress)
    except FedptError as error:
        console.print(f"error: {error}", markup=False)
        return error.exit_code
    return 0


def floats(text: str) -> list[float]:
    """Numbers between commas."""
    return [float(part) for part in text.split(",")]
