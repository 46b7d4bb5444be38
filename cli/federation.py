"""`fedpt-secure federation init|renew|server|client|run|status`."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from fedpt_secure.cli.errors import EXIT_INTERRUPTED, report, reported
from fedpt_secure.cli.privacy_warning import warn_if_not_private, warn_of_trust
from fedpt_secure.cli.progress import shown_on
from fedpt_secure.config import RunConfig, build, overlay, read_settings
from fedpt_secure.errors import ConfigError, IdentityError

if TYPE_CHECKING:
    from fedpt_secure.network.folder import ClientSettings, Endpoint

federation = typer.Typer(
    name="federation",
    help="A federation of machines over Flower: one server, and clients that keep their text (docs/federation.md).",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
WHO, SERVER, RUN, OWN = "What to make", "The server", "The run's settings", "This client's own"
JSON = typer.Option(False, "--json", help="Print the result as JSON.")
_ENDS = (signal.SIGINT, signal.SIGTERM)


@federation.command()
def init(
    folder: Path = typer.Argument(..., help="Folder to make; nothing that exists is replaced."),
    clients: int | None = typer.Option(
        None, "--clients", min=3, help="A test network of one server and this many clients.", rich_help_panel=WHO
    ),
    server: bool = typer.Option(False, "--server", help="The server's side only.", rich_help_panel=WHO),
    client_id: str | None = typer.Option(
        None, "--client-id", help="One client's side only, under this id in the roster.", rich_help_panel=WHO
    ),
    name: str = typer.Option("federation", help="Of the federation.", rich_help_panel=WHO),
    host: str = typer.Option("127.0.0.1", help="By which clients reach the server.", rich_help_panel=SERVER),
    port: int = typer.Option(8000, min=1, max=65535, rich_help_panel=SERVER),
    insecure: bool = typer.Option(
        False,
        "--insecure",
        help="[red]No TLS, no keys of nodes.[/] For a server on 127.0.0.1 only.",
        rich_help_panel=SERVER,
    ),
    config: Path | None = typer.Option(
        None, help="TOML file with the run's settings, as for `train`.", rich_help_panel=RUN
    ),
    data: str | None = typer.Option(
        None, help="Source that all clients of a test network read, each its share.", rich_help_panel=RUN
    ),
    epsilon: float | None = typer.Option(None, rich_help_panel=RUN),
    delta: float | None = typer.Option(None, rich_help_panel=RUN),
    privacy: str | None = typer.Option(None, help="local, distributed or client.", rich_help_panel=RUN),
    rounds: int | None = typer.Option(None, rich_help_panel=RUN),
    cohort: int | None = typer.Option(None, help="Clients per round.", rich_help_panel=RUN),
    records: str | None = typer.Option(
        None, help="Where this client's own records are; all of them are its.", rich_help_panel=OWN
    ),
    text_column: str | None = typer.Option(None, rich_help_panel=OWN),
    prompt_column: str | None = typer.Option(None, rich_help_panel=OWN),
    response_column: str | None = typer.Option(None, rich_help_panel=OWN),
    budget_epsilon: float | None = typer.Option(
        None,
        help="What the records may be used for, over all runs and servers. [default: one run of --config]",
        rich_help_panel=OWN,
    ),
    no_passphrase: bool = typer.Option(
        False,
        "--no-passphrase",
        help="Do not seal the signing key: for clients that start unattended. A test network's never are.",
        rich_help_panel=OWN,
    ),
    json_output: bool = JSON,
) -> None:
    """Make a test network's folders, or one organisation's, and say what to do next.

    Exit codes: 0 done, 2 settings, 4 data, 6 the ledger, 10 files, 11 id or passphrase not acceptable.
    """
    console = Console(stderr=True)
    with reported(console):
        if [clients is not None, server, client_id is not None].count(True) != 1:
            raise ConfigError("give one of --clients N (a test network), --server and --client-id ID (one side of one)")
        from fedpt_secure.network.folder import Endpoint

        changes = {
            "data": {"source": data},
            "privacy": {"mode": privacy, "epsilon": epsilon, "delta": delta, "budget_epsilon": budget_epsilon},
            "federation": {"rounds": rounds, "cohort": cohort},
        }
        given = _given(changes)
        where = build(Endpoint, {"host": host, "port": port, "insecure": insecure}, command="federation init")
        has_settings = config is not None or bool(given)
        settings = build(RunConfig, overlay(read_settings(config) if config else {}, given)) if has_settings else None
        own = _given(
            {
                "source": records,
                "text_column": text_column,
                "prompt_column": prompt_column,
                "response_column": response_column,
            }
        )
        if client_id is None and (own or no_passphrase):
            raise ConfigError("--records, its columns and --no-passphrase are for one client's side: --client-id ID")
        if insecure:
            console.print(
                "[bold red]INSECURE:[/] no TLS, and any process of this machine may be a node.", soft_wrap=True
            )
        if settings is not None:
            warn_if_not_private(settings, console)
            warn_of_trust(settings, console)
        if client_id is not None:
            client_settings = _client_settings(name, client_id, where, own)
            if settings is None:
                raise ConfigError(
                    "what the records may be used for is decided when a client is made: its ledger begins with it",
                    hint="--config FILE for one run of these settings, or --budget-epsilon",
                )
            result, lines = _init_client(
                folder, client_settings, settings, has_config=config is not None, seal=not no_passphrase
            )
        elif server:
            result, lines = _init_server(folder, settings or RunConfig(), where, name)
        else:
            result, lines = _init_network(folder, settings or RunConfig(), clients or 0, where, name, console)
    typer.echo(json.dumps(result, indent=2) if json_output else "\n".join(lines))


@federation.command()
def renew(folder: Path = typer.Argument(..., help="The server's folder."), json_output: bool = JSON) -> None:
    """Give the server a new certificate, under the authority that its clients have. It is used from its next start on.

    Exit codes: 0 done, 2 settings or the authority's key not acceptable, 10 files.
    """
    with reported(Console(stderr=True)):
        from fedpt_secure.flower.certificates import expires
        from fedpt_secure.flower.new_folders import renew as renew_certificate
        from fedpt_secure.network.folder import ServerFolder

        place = ServerFolder(folder)
        renew_certificate(place, place.settings().server)
        until = expires(place.tls("server.pem").read_bytes())
    typer.echo(json.dumps({"until": until.isoformat()}) if json_output else f"new certificate, until {until:%Y-%m-%d}")


@federation.command("server")
def serve_federation(folder: Path = typer.Argument(..., help="The server's folder.")) -> None:
    """Run the server in the foreground: it waits for clients, and for `federation run`.

    Exit codes: 0 ended by a signal, 2 settings or port, 8 no settings of the run, 10 files, 11 roster.
    """
    console = Console(stderr=True)
    with reported(console), _until_told() as stop:
        from fedpt_secure.flower.services import serve
        from fedpt_secure.network.folder import ServerFolder

        serve(ServerFolder(folder), stop=stop, note=lambda text: console.print(text, highlight=False, soft_wrap=True))


@federation.command()
def client(folder: Path = typer.Argument(..., help="The client's folder.")) -> None:
    """Run a client in the foreground: its worker, and what connects it to the server.

    The passphrase of a sealed signing key is asked for on the terminal.

    Exit codes: 0 ended by a signal, 2 settings, 4 data, 5 models, 6 privacy or ledger, 8 no settings of the run,
    10 files, 11 key or roster.
    """
    console = Console(stderr=True)
    with reported(console), _until_told() as stop:
        from fedpt_secure.cli.quiet import quiet_libraries
        from fedpt_secure.flower.compatibility import require_installed
        from fedpt_secure.flower.services import serve_client
        from fedpt_secure.network.folder import ClientFolder

        require_installed()
        quiet_libraries()
        place = ClientFolder(folder)
        own = place.settings().data
        _say_terms(place.config(), console)
        source = f"{own.source}, all of it" if own is not None else f"its share of {place.config().data.source}"
        report_line = f"records: {source}; budget and what is spent: `fedpt-secure ledger show {place.ledger}`"
        console.print(report_line, markup=False, highlight=False, soft_wrap=True)
        with shown_on(console) as progress:
            serve_client(place, ask_passphrase=_ask_passphrase, progress=progress, stop=stop, note=progress.note)


@federation.command()
def run(folder: Path = typer.Argument(..., help="The server's folder."), json_output: bool = JSON) -> None:
    """Start the federation's run, or go on with it, and wait for its end. `federation server` must be running.

    Ctrl-C ends the watching, not the run; the same command watches again. After a failure it goes on where it stopped.

    Exit codes: 0 the run is finished, 130 not watched to its end, else why it failed, as for `train`.
    """
    console = Console(stderr=True)
    with reported(console):
        from fedpt_secure.flower.compatibility import require_installed
        from fedpt_secure.flower.services import run as run_federation
        from fedpt_secure.network.folder import ServerFolder
        from fedpt_secure.network.status import read_status

        place = ServerFolder(folder)
        require_installed()
        place.settings()
        _say_terms(place.config(), console)
        try:
            with _until_told() as stop, shown_on(console) as progress:
                run_federation(place, progress=progress, stop=stop)
        except KeyboardInterrupt:
            report(console, "not watched any more; the run goes on", f"fedpt-secure federation run {folder}")
            raise typer.Exit(EXIT_INTERRUPTED) from None
    claim = read_status(place.status).claim
    result = {"run_directory": str(place.run), "finished": True, "privacy": claim}
    typer.echo(json.dumps(result) if json_output else f"finished: {place.run}\nPrivacy: {claim}")


@federation.command()
def status(
    folder: Path = typer.Argument(..., help="A server's or a client's folder."),
    watch: bool = typer.Option(False, "--watch", help="A live table, until the run is over or Ctrl-C."),
    json_output: bool = JSON,
) -> None:
    """Show what a server or a client is doing: clients, phases, dropouts, epsilon spent.

    Exit codes: 0 done, 8 it has not been started yet, or its status is damaged.
    """
    with reported(Console(stderr=True)):
        from fedpt_secure.cli.federation_status import show

        with _until_told() as stop:
            show(folder, watch=watch, as_json=json_output, stop=stop)


def _say_terms(config: RunConfig, console: Console) -> None:
    """Before anything starts: what the run's settings, which somebody else may have written, do not protect."""
    warn_if_not_private(config, console)
    warn_of_trust(config, console)


def _init_network(
    folder: Path, config: RunConfig, clients: int, where: Endpoint, name: str, console: Console
) -> tuple[dict[str, Any], list[str]]:
    from fedpt_secure.flower.new_folders import dealt, make_test_network

    config = config.model_copy(update={"data": dealt(config.data, clients)})
    with shown_on(console) as progress:
        ids = _client_ids(config, clients, progress)
    made = make_test_network(folder, config, ids, where, name=name)
    places = {client: str(place.path) for client, place in made.clients.items()}
    result = {
        "server": str(made.server.path),
        "clients": places,
        "digest": made.roster.digest.hex(),
        "address": where.address,
    }
    lines = [
        f"{folder}: a server at {where.address} and {len(places)} clients",
        f"Digest of the roster: {made.roster.spoken_digest}",
        "",
        "Each in a terminal of its own:",
        f"  fedpt-secure federation server {made.server.path}",
        *(f"  fedpt-secure federation client {place}" for place in places.values()),
        f"  fedpt-secure federation run {made.server.path}",
        f"  fedpt-secure federation status {made.server.path}",
    ]
    return result, lines


def _init_server(folder: Path, config: RunConfig, where: Endpoint, name: str) -> tuple[dict[str, Any], list[str]]:
    from fedpt_secure.flower.certificates import AUTHORITY_DAYS, SERVER_DAYS
    from fedpt_secure.flower.new_folders import make_server

    made = make_server(folder, config, where, name=name)
    hand_out = [str(folder / "config.toml"), *([] if where.insecure else [str(made.tls("ca.crt"))])]
    lines = [
        f"{folder}: the server's side, at {where.address}",
        *(
            []
            if where.insecure
            else [f"Certificates: authority {AUTHORITY_DAYS} days, server {SERVER_DAYS} (`federation renew`)"]
        ),
        "",
        f"To every client, unchanged: {', '.join(hand_out)}",
        f"From every client: its ID.pub, into {made.nodes}; its ID.public.json, for the roster",
        f"  fedpt-secure keys roster *.public.json --out {folder / 'roster.json'}",
        "The roster goes to every client too; all compare its digest by telephone or in person. Then:",
        f"  fedpt-secure federation server {folder}",
        f"  fedpt-secure federation run {folder}",
    ]
    return {"server": str(folder), "address": where.address, "hand_out": hand_out}, lines


def _init_client(
    folder: Path, settings: ClientSettings, config: RunConfig, *, has_config: bool, seal: bool
) -> tuple[dict[str, Any], list[str]]:
    from fedpt_secure.federation.terms import first_budget
    from fedpt_secure.flower.new_folders import make_client

    budget = first_budget(config)
    made = make_client(
        folder,
        settings,
        budget,
        config=config if has_config else None,
        ask_passphrase=_ask_new_passphrase if seal else None,
    )
    hand_out = [str(made.public_identity), str(made.node_key)]
    wanted = [
        "roster.json",
        *([] if has_config else ["config.toml"]),
        *([] if settings.server.insecure else ["ca.crt"]),
    ]
    lines = [
        f"{folder}: the side of client {settings.client_id}, for the server at {settings.server.address}",
        f"Its records may be used up to epsilon {budget.epsilon:g}: `fedpt-secure ledger show {folder / 'ledger'}`",
        "",
        f"To the server: {', '.join(hand_out)}",
        f"From the server, into {folder}: {', '.join(wanted)}; its config.toml and yours must agree",
        f"  fedpt-secure keys verify --roster {folder / 'roster.json'} --identity {made.folder.identity}",
        "Compare the digest by telephone or in person. Then:",
        f"  fedpt-secure federation client {folder}",
    ]
    return {"client": str(folder), "hand_out": hand_out, "wanted": wanted, "budget_epsilon": budget.epsilon}, lines


def _client_settings(name: str, client_id: str, where: Endpoint, own: dict[str, Any]) -> ClientSettings:
    from fedpt_secure.network.folder import ClientSettings

    values = {"name": name, "client_id": client_id, "server": where.model_dump()} | ({"data": own} if own else {})
    return build(ClientSettings, values, command="federation init")


def _client_ids(config: RunConfig, clients: int, progress: Any) -> list[str]:
    """Who the clients are: dealt ones by number, owners by their names in the data."""
    if config.data.client_column is None:
        from fedpt_secure.data.partition import client_names

        return client_names(clients)
    from fedpt_secure.data import Cache, load_federated_text

    text = load_federated_text(config.data, seed=config.seed, cache=Cache(), progress=progress)
    names = sorted(client.client_id for client in text.clients)
    if len(names) < clients:
        raise ConfigError(f"--clients {clients} asked for, but the data has {len(names)} owners with enough records")
    return names[:clients]


@contextmanager
def _until_told() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal interrupts."""
    stop = threading.Event()

    def tell(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, tell) for number in _ENDS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask_new_passphrase() -> str:
    return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True))


def _ask_passphrase() -> str:
    if not sys.stdin.isatty():
        raise IdentityError(
            "the signing key is sealed by a passphrase, and there is no terminal to ask on",
            hint="start it on a terminal, or make the client with --no-passphrase on an encrypted disk",
        )
    return str(typer.prompt("Passphrase", hide_input=True, err=True))


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
