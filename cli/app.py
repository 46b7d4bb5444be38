"""The command tree."""

from __future__ import annotations

import os
import warnings

import typer

from fedpt_secure import __version__
from fedpt_secure.cli.account import account
from fedpt_secure.cli.audit import audit
from fedpt_secure.cli.crypto_parameters import crypto
from fedpt_secure.cli.evaluate import evaluate
from fedpt_secure.cli.federation import federation
from fedpt_secure.cli.fetch import fetch
from fedpt_secure.cli.generate import generate
from fedpt_secure.cli.keys import keys
from fedpt_secure.cli.ledger import ledger
from fedpt_secure.cli.plan import plan
from fedpt_secure.cli.report import compare, report
from fedpt_secure.cli.serve import serve
from fedpt_secure.cli.sweep import sweep
from fedpt_secure.cli.train import train

app = typer.Typer(
    name="fedpt-secure",
    help="Tune a black-box language model on text that stays with its owners: federated proxy-tuning with secure "
    "aggregation and differential privacy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
app.command()(train)
app.command()(generate)
app.command()(serve)
app.command()(evaluate)
app.command()(fetch)
app.command()(account)
app.command()(plan)
app.command()(sweep)
app.command()(report)
app.command()(compare)
app.command()(audit)
app.add_typer(federation)
app.add_typer(keys)
app.add_typer(crypto)
app.add_typer(ledger)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Read the options that stand before a command."""


def main() -> None:
    """Entry point of the console script."""
    # Two libraries advise their developers on standard error at every start; a user can do nothing with it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|transformers|peft")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
