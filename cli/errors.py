"""How a command ends: documented exit codes, `error:` and `hint:` on standard error.

0  success                      6  the privacy asked for cannot be given
1  an unexpected failure        7  secure aggregation stopped
2  a setting is not acceptable  8  the run directory is missing, damaged or of other settings
3  an audit found a violation   9  the large model's API misbehaved
4  data cannot be used          10 the disk is full or a file cannot be written
5  a model cannot be used       11 an identity or a roster is refused
                                130 interrupted
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from fedpt_secure.errors import FedptError

EXIT_FILES = 10
EXIT_INTERRUPTED = 130


@contextmanager
def reported(console: Console) -> Iterator[None]:
    """Turn the package's errors, a full disk and Ctrl-C into one line each and an exit code."""
    try:
        yield
    except FedptError as error:
        report(console, error.message, error.hint)
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        report(
            console,
            f"cannot write or read{where}: {error.strerror or error}",
            "free some space, or choose another --out",
        )
        raise typer.Exit(EXIT_FILES) from error
    except KeyboardInterrupt:
        report(console, "interrupted", "`fedpt-secure train --resume DIR` goes on from the last round")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def report(console: Console, message: str, hint: str = "") -> None:
    """Print one error."""
    console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    if hint:
        console.print(f"[bold]hint:[/] {escape(hint)}", highlight=False, soft_wrap=True)
