"""`fedpt-secure generate`."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from fedpt_secure.cli.errors import reported
from fedpt_secure.cli.privacy_warning import warn_if_not_private
from fedpt_secure.cli.progress import shown_on
from fedpt_secure.cli.steering import SHARES_HELP, parse_shares
from fedpt_secure.config import GenerateConfig, build


def generate(
    prompt: str = typer.Argument(..., help="Text to continue."),
    run: Path = typer.Option(..., help="Run directory."),
    alpha: float | None = typer.Option(None, help="Weight of the small LM's shift. [default: the run's]"),
    shares: str | None = typer.Option(None, help=SHARES_HELP + " [default: the run's]"),
    max_new_tokens: int = typer.Option(48),
    temperature: float = typer.Option(0.0, help="0 takes the most likely token."),
    top_p: float = typer.Option(1.0, help="Sample from the fewest most likely tokens with this mass."),
    top_k: int = typer.Option(0, help="Sample from this many most likely tokens; 0 for all."),
    repetition_penalty: float = typer.Option(1.0, help="Above 1: tokens that were there before are less likely."),
    stop: list[str] = typer.Option([], help="Text that ends the continuation; may be given several times."),
    speculate: bool = typer.Option(
        False, "--speculate", help="Guess several tokens per call of the large LM; the same distribution, fewer calls."
    ),
    seed: int = typer.Option(0, help="Of the sampling."),
    chat: bool = typer.Option(False, "--chat", help="Wrap the prompt in the model's chat format."),
    json_output: bool = typer.Option(False, "--json", help="Print the continuations as JSON."),
) -> None:
    """Continue a prompt with the black box alone and proxy-tuned, side by side."""
    console = Console(stderr=True)
    with reported(console):
        wanted = build(
            GenerateConfig,
            {
                "prompt": prompt,
                "alpha": alpha,
                "shares": parse_shares(shares),
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "repetition_penalty": repetition_penalty,
                "stop": stop,
                "speculate": speculate,
                "seed": seed,
            },
            command="generate",
        )
        from fedpt_secure.cli.quiet import quiet_libraries
        from fedpt_secure.data import Cache
        from fedpt_secure.federation import RunDirectory, continuations

        quiet_libraries()
        directory = RunDirectory.open(run)
        warn_if_not_private(directory.config(), console)
        with shown_on(console) as progress:
            texts = continuations(directory, **dict(wanted), chat=chat, cache=Cache(), progress=progress)
    if json_output:
        typer.echo(json.dumps({"prompt": prompt, **texts}, indent=2))
        return
    titles = {"base": "large LM alone", "proxy_tuned": "proxy-tuned"}
    panels = [Panel(Text(texts[name]), title=title) for name, title in titles.items()]
    Console().print(Columns(panels, equal=True, expand=True))
