"""`fedpt-secure train`."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from fedpt_secure.cli.errors import reported
from fedpt_secure.cli.privacy_warning import warn_if_not_private, warn_of_trust
from fedpt_secure.cli.progress import shown_on
from fedpt_secure.cli.steering import SHARES_HELP, parse_shares
from fedpt_secure.cli.tables import print_summary
from fedpt_secure.config import RunConfig, build, overlay, read_settings
from fedpt_secure.errors import ConfigError

DATA, MODELS, PRIVACY, FEDERATION, TUNING, AUDIT, OUTPUT = (
    "Data",
    "Models",
    "Privacy",
    "Federation",
    "Training and steering",
    "For a later audit",
    "Run",
)


def train(
    epsilon: float | None = typer.Option(
        None, help="Privacy of a record over the whole run; inf for none. [default: 4]", rich_help_panel=PRIVACY
    ),
    budget_epsilon: float | None = typer.Option(
        None,
        help="A client's own budget over all runs, where it has no ledger yet. [default: --epsilon]",
        rich_help_panel=PRIVACY,
    ),
    delta: float | None = typer.Option(None, help="[default: 1e-05]", rich_help_panel=PRIVACY),
    privacy: str | None = typer.Option(
        None,
        help="local: each client's own noise protects its records. distributed: the cohort's noise does, where at most "
        "--corrupt-fraction collude. client: so are all of a client's records at once. [default: local]",
        rich_help_panel=PRIVACY,
    ),
    corrupt_fraction: float | None = typer.Option(
        None, help="Share of a cohort that may collude with the server. [default: 0.1]", rich_help_panel=PRIVACY
    ),
    clip_norm: float | None = typer.Option(
        None, help="L2 clip of a record's gradient, or of a client's update.", rich_help_panel=PRIVACY
    ),
    clipping: str | None = typer.Option(
        None, help="fixed, or quantile: the clip norm follows a private quantile.", rich_help_panel=PRIVACY
    ),
    clip_quantile: float | None = typer.Option(
        None, help="Of the norms, with --clipping quantile. [default: 0.5]", rich_help_panel=PRIVACY
    ),
    sampling_rate: float | None = typer.Option(
        None, help="Public chance that a record (or a client) is in a step.", rich_help_panel=PRIVACY
    ),
    data: str | None = typer.Option(
        None,
        help="chitchat, sotu, a path (JSONL, CSV, Parquet, folder of text) or a Hugging Face id. [default: chitchat]",
        rich_help_panel=DATA,
    ),
    client_column: str | None = typer.Option(None, help="Column that names a record's owner.", rich_help_panel=DATA),
    text_column: str | None = typer.Option(None, rich_help_panel=DATA),
    prompt_column: str | None = typer.Option(
        None, help="With --response-column: loss on the response only.", rich_help_panel=DATA
    ),
    response_column: str | None = typer.Option(None, rich_help_panel=DATA),
    label_column: str | None = typer.Option(None, help="Column a Dirichlet partition skews by.", rich_help_panel=DATA),
    clients: int | None = typer.Option(
        None, help="Deal the records to this many clients (with --partition).", rich_help_panel=DATA
    ),
    partition: str | None = typer.Option(None, help="equal or dirichlet.", rich_help_panel=DATA),
    dirichlet_alpha: float | None = typer.Option(None, help="Small is uneven.", rich_help_panel=DATA),
    minimum_records: int | None = typer.Option(
        None, help="Fewest records of a client that takes part.", rich_help_panel=DATA
    ),
    maximum_records: int | None = typer.Option(
        None, help="Read no more than this many records (quick trials).", rich_help_panel=DATA
    ),
    large: str | None = typer.Option(
        None,
        help="The black box: a Transformers directory or Hugging Face id, or an API: llama.cpp:http://127.0.0.1:8080, "
        "openai:https://host/v1#model. [default: SmolLM2-135M-Instruct]",
        rich_help_panel=MODELS,
    ),
    large_tokenizer: str | None = typer.Option(
        None, help="Folder of the tokenizer of an API's model. [default: SmolLM2's]", rich_help_panel=MODELS
    ),
    large_top_k: int | None = typer.Option(
        None,
        help="Log-probabilities a position that an API is asked for; the small LM's shape fills in the rest.",
        rich_help_panel=MODELS,
    ),
    small: str | None = typer.Option(
        None, help="The proxy: builtin, a directory or Hugging Face id. [default: builtin]", rich_help_panel=MODELS
    ),
    context_length: int | None = typer.Option(None, help="Tokens of a record that are used.", rich_help_panel=MODELS),
    device: str | None = typer.Option(
        None, help="auto, cpu, cuda, cuda:N or mps. [default: auto]", rich_help_panel=MODELS
    ),
    rounds: int | None = typer.Option(None, rich_help_panel=FEDERATION),
    cohort: int | None = typer.Option(None, help="Clients per round.", rich_help_panel=FEDERATION),
    dropout: float | None = typer.Option(
        None, help="Chance that a client vanishes in a round (simulation).", rich_help_panel=FEDERATION
    ),
    aggregator: str | None = typer.Option(
        None,
        help="masks, or ckks: encryption under a key that all clients share; one colluding client breaks the privacy "
        "of all. [default: masks]",
        rich_help_panel=FEDERATION,
    ),
    ledgers: Path | None = typer.Option(
        None,
        help="Directory where clients' ledgers outlive the run: the next run on the same data spends from the same "
        "budgets. [default: in the run directory]",
        rich_help_panel=FEDERATION,
    ),
    minimum_survivors: int | None = typer.Option(
        None, help="A round with fewer is aborted. [default: 2/3 of the cohort]", rich_help_panel=FEDERATION
    ),
    local_steps: int | None = typer.Option(None, help="DP-SGD steps a client makes per round.", rich_help_panel=TUNING),
    server_learning_rate: float | None = typer.Option(None, rich_help_panel=TUNING),
    lora_rank: int | None = typer.Option(None, rich_help_panel=TUNING),
    lora_layers: int | None = typer.Option(
        None, help="Train only the last this many layers; 0 for all.", rich_help_panel=TUNING
    ),
    alpha: float | None = typer.Option(
        None, help="Weight of the small LM's shift when steering the large one.", rich_help_panel=TUNING
    ),
    shares: str | None = typer.Option(None, help=SHARES_HELP, rich_help_panel=TUNING),
    distill_steps: int | None = typer.Option(
        None, help="Distillation steps on public text after each round.", rich_help_panel=TUNING
    ),
    seed: int | None = typer.Option(None, help="Data split and cohorts; never keys or noise.", rich_help_panel=OUTPUT),
    insecure_deterministic: bool | None = typer.Option(
        None,
        "--insecure-deterministic",
        help="[red]Noise from the seed, for debugging. Not private.[/]",
        rich_help_panel=OUTPUT,
    ),
    evaluation_records: int | None = typer.Option(
        None, help="Held-out records in the final report.", rich_help_panel=OUTPUT
    ),
    canaries: int | None = typer.Option(
        None, help="Plant this many records with a coin each, for `audit`'s bound of epsilon.", rich_help_panel=AUDIT
    ),
    secrets: int | None = typer.Option(
        None,
        help="Plant this many invented secrets for each of 1, 4 and 16 repetitions (extra: audit).",
        rich_help_panel=AUDIT,
    ),
    record_server_view: bool | None = typer.Option(
        None, "--record-server-view", help="Keep the masked vectors that the server receives.", rich_help_panel=AUDIT
    ),
    config: Path | None = typer.Option(
        None,
        help="TOML file with any of the settings, also those without an option, nested as in a run's config.toml. "
        "Options on the command line override it.",
        rich_help_panel=OUTPUT,
    ),
    out: Path | None = typer.Option(None, help="Run directory. [default: runs/DATE-TIME]", rich_help_panel=OUTPUT),
    resume: Path | None = typer.Option(None, help="Go on with an interrupted run.", rich_help_panel=OUTPUT),
    json_output: bool = typer.Option(
        False, "--json", help="Print summary.json on standard output.", rich_help_panel=OUTPUT
    ),
) -> None:
    """Tune on private text, round by round, and report what it did for the black box.

    Settings come from the command line, else from the file given with --config, else they are the defaults.

    Exit codes: 0 done, 2 settings, 4 data, 5 models, 6 privacy, 7 rounds, 8 run directory, 9 black box, 10 files,
    130 interrupted.
    """
    console = Console(stderr=True)
    with reported(console):
        given_shares = parse_shares(shares)
        settings: dict[str, Any] = {
            "seed": seed,
            "insecure_deterministic": insecure_deterministic,
            "data": {
                "source": data,
                "client_column": client_column,
                "text_column": text_column,
                "prompt_column": prompt_column,
                "response_column": response_column,
                "label_column": label_column,
                "clients": clients,
                "partition": partition,
                "dirichlet_alpha": dirichlet_alpha,
                "minimum_records": minimum_records,
                "maximum_records": maximum_records,
            },
            "models": {"small": small, "large": large, "device": device, "context_length": context_length},
            "api": {"tokenizer": large_tokenizer, "top_k": large_top_k},
            "lora": {"rank": lora_rank, "layers": lora_layers},
            "privacy": {
                "mode": privacy,
                "epsilon": epsilon,
                "budget_epsilon": budget_epsilon,
                "delta": delta,
                "corrupt_fraction": corrupt_fraction,
                "clip_norm": clip_norm,
                "clipping": clipping,
                "clip_quantile": clip_quantile,
                "sampling_rate": sampling_rate,
            },
            "federation": {
                "rounds": rounds,
                "cohort": cohort,
                "dropout": dropout,
                "minimum_survivors": minimum_survivors,
                "ledgers": None if ledgers is None else str(ledgers),
                "aggregator": aggregator,
            },
            "training": {"local_steps": local_steps, "server_learning_rate": server_learning_rate},
            "proxy": {
                "alpha": alpha,
                "shares": given_shares,
                "response_shares": given_shares,
                "distill_steps": distill_steps,
            },
            "evaluation": {"records": evaluation_records},
            "audit": {"canaries": canaries, "secrets": secrets, "record_server_view": record_server_view},
        }
        summary = _run(_given(settings), file=config, out=out, resume=resume, console=console)
    if json_output:
        typer.echo(json.dumps(summary, indent=2, allow_nan=False))
    else:
        print_summary(Console(), summary)


def _run(
    settings: dict[str, Any], *, file: Path | None, out: Path | None, resume: Path | None, console: Console
) -> dict[str, Any]:
    if out is not None and resume is not None:
        raise ConfigError("--out starts a run and --resume goes on with one: give one of them")
    if file is not None and resume is not None:
        raise ConfigError("--config starts a run and --resume goes on with one, whose settings are in its directory")
    # A new run's settings are checked before the heavy imports, so that a typing error is answered at once.
    if resume is None:
        config = build(RunConfig, overlay(read_settings(file), settings) if file is not None else settings)
    from fedpt_secure import files
    from fedpt_secure.cli.quiet import quiet_libraries
    from fedpt_secure.data import Cache
    from fedpt_secure.federation import RunDirectory, aggregation_of, run_training
    from fedpt_secure.report import summarise

    quiet_libraries()
    if resume is not None:
        directory = RunDirectory.open(resume)
        directory.require_settings(settings)
        config = directory.config()
    else:
        aggregation_of(config)  # what it needs is missed before a directory is made
        path = out or Path("runs") / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        directory = RunDirectory.create(path, config)
    warn_if_not_private(config, console)
    warn_of_trust(config, console)
    with shown_on(console) as progress:
        result = run_training(config, directory, cache=Cache(), progress=progress)
    summary = summarise(result)
    files.write_json(directory.path / "summary.json", summary)
    console.print(f"run directory: {directory.path}", style="dim", highlight=False, soft_wrap=True)
    return summary


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Drop what was not given, so that defaults live in one place (`config`)."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            if inner := _given(value):
                kept[key] = inner
        elif value is not None:
            kept[key] = value
    return kept
