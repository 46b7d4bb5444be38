"""`fedpt-secure serve`."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import typer
from rich.console import Console

from fedpt_secure.cli.errors import reported
from fedpt_secure.cli.privacy_warning import warn_if_not_private
from fedpt_secure.cli.progress import shown_on
from fedpt_secure.config import build
from fedpt_secure.errors import ConfigError

LISTENING, LIMITS = "Listening", "Limits"


def serve(
    run: Path = typer.Option(..., help="Run directory."),
    host: str | None = typer.Option(
        None,
        help="Address to listen on; a public one needs an API key. [default: 127.0.0.1]",
        rich_help_panel=LISTENING,
    ),
    port: int | None = typer.Option(None, help="0 takes a free one. [default: 8000]", rich_help_panel=LISTENING),
    name: str | None = typer.Option(None, help="Of the model in the API. [default: the run directory's]"),
    api_key_file: Path | None = typer.Option(
        None,
        help="One key a line, readable by you alone; the environment's FEDPT_API_KEYS (commas) counts too.",
        rich_help_panel=LISTENING,
    ),
    tls_certificate: Path | None = typer.Option(None, help="PEM.", rich_help_panel=LISTENING),
    tls_key: Path | None = typer.Option(None, help="PEM.", rich_help_panel=LISTENING),
    max_logprobs: int | None = typer.Option(
        None,
        help="Most alternatives per token that an answer may tell. More reveal more of the tuned small model, all of "
        "them reveal it exactly; 0 tells none. [default: 5]",
        rich_help_panel=LIMITS,
    ),
    concurrent_requests: int | None = typer.Option(
        None, help="Answers in work at a time. [default: 64]", rich_help_panel=LIMITS
    ),
    batch_rows: int | None = typer.Option(
        None, help="Answers that one forward pass advances. [default: 32]", rich_help_panel=LIMITS
    ),
    requests_per_minute: float | None = typer.Option(
        None, help="Of a key, or of an address without one. [default: 600]", rich_help_panel=LIMITS
    ),
    body_bytes: int | None = typer.Option(None, help="Largest request. [default: 1048576]", rich_help_panel=LIMITS),
    prompt_tokens: int | None = typer.Option(None, help="Longest prompt. [default: 4096]", rich_help_panel=LIMITS),
    new_tokens: int | None = typer.Option(None, help="Longest answer. [default: 1024]", rich_help_panel=LIMITS),
    choices: int | None = typer.Option(None, help="Most answers of one request. [default: 8]", rich_help_panel=LIMITS),
    shutdown_seconds: float | None = typer.Option(
        None, help="Time that running answers have to end when the server stops. [default: 30]", rich_help_panel=LIMITS
    ),
) -> None:
    """Serve a run as an OpenAI-compatible API, with a page to compare answers."""
    console = Console(stderr=True)
    with reported(console):
        _require_extra()
        from fedpt_secure import serving

        given = {
            "host": host,
            "port": port,
            "name": name or re.sub(r"[^A-Za-z0-9._-]+", "-", run.resolve().name).strip("-._") or "run",
            "tls_certificate": tls_certificate,
            "tls_key": tls_key,
            "max_logprobs": max_logprobs,
            "concurrent_requests": concurrent_requests,
            "batch_rows": batch_rows,
            "requests_per_minute": requests_per_minute,
            "body_bytes": body_bytes,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "choices": choices,
            "shutdown_seconds": shutdown_seconds,
        }
        settings = build(
            serving.ServeSettings,
            {key: value for key, value in given.items() if value is not None},
            command="serve",
        )
        keys = serving.read_keys(api_key_file, os.environ)
        serving.require_key_if_public(settings, keys)
        from fedpt_secure.cli.quiet import quiet_libraries
        from fedpt_secure.data import Cache
        from fedpt_secure.federation import RunDirectory

        quiet_libraries()
        directory = RunDirectory.open(run)
        warn_if_not_private(directory.config(), console)
        _warn_of_exposure(settings, console)
        listener = serving.Listener(settings)
        with shown_on(console) as progress:
            served = serving.load_run(directory, batch_rows=settings.batch_rows, cache=Cache(), progress=progress)
        _log_to_stderr()
        serving.serve(
            serving.create_app(served, settings, keys),
            listener,
            settings,
            on_ready=lambda: console.print(
                f"serving {settings.name} at {listener.url} (API: {listener.url}/v1, "
                f"{len(keys) or 'no'} API key{'' if len(keys) == 1 else 's'}); Ctrl-C stops",
                highlight=False,
                soft_wrap=True,
            ),
        )


def _require_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"serving needs the package {error.name!r}, which is not installed",
            hint="pip install 'fedpt-secure[serve]'",
        ) from None


def _warn_of_exposure(settings: object, console: Console) -> None:
    """Say what an unusual setting gives away."""
    from fedpt_secure.serving.settings import DEFAULT_LOGPROBS, ServeSettings

    if not isinstance(settings, ServeSettings):
        raise TypeError("settings of another command")
    if settings.max_logprobs > DEFAULT_LOGPROBS:
        console.print(
            f"[bold yellow]warning:[/] --max-logprobs {settings.max_logprobs}: whoever may ask gets the tuned small "
            "model's own prediction at that many tokens per place; with the whole vocabulary, exactly all of it. Only "
            "the run's differential privacy then protects the training records.",
            highlight=False,
            soft_wrap=True,
        )
    if not settings.is_loopback and settings.tls_certificate is None:
        console.print(
            f"[bold yellow]warning:[/] {settings.host} is served without TLS: keys, prompts and answers cross the "
            "network in the clear unless something in front encrypts them.",
            highlight=False,
            soft_wrap=True,
        )


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("fedpt_secure.serving", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO if name.startswith("fedpt") else logging.WARNING)
