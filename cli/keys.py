"""`fedpt-secure keys new|roster|verify`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console

from fedpt_secure.cli.errors import reported
from fedpt_secure.errors import IdentityError

if TYPE_CHECKING:
    from fedpt_secure.crypto import OwnIdentity

_Loaded = TypeVar("_Loaded")

keys = typer.Typer(
    name="keys",
    help="Long-term identities of clients, and the roster by which they know each other.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

_NAMES_SHOWN = 20

JSON = typer.Option(False, "--json", help="Print the result as JSON.")


@keys.command()
def new(
    client_id: str = typer.Argument(..., metavar="ID", help="The client's name in the roster."),
    out: Path = typer.Option(Path("keys"), help="Directory for the two files; made for its owner only."),
    no_passphrase: bool = typer.Option(
        False, "--no-passphrase", help="Do not seal the secret key: for machines that start unattended."
    ),
    json_output: bool = JSON,
) -> None:
    """Make an identity: a secret file that stays here, and a public one for whoever makes the roster.

    Exit codes: 0 done, 10 files (one exists already, or cannot be written), 11 id or passphrase not acceptable.
    """
    with _reported():
        from fedpt_secure.crypto import create_identity

        ask = None if no_passphrase else partial(_ask_passphrase, confirm=True)
        made = create_identity(client_id, out, ask_passphrase=ask)
    result = {
        "id": made.public.client_id,
        "verify_key": made.public.verify_key.hex(),
        "secret_file": str(made.secret_path),
        "public_file": str(made.public_path),
        "sealed": not no_passphrase,
    }
    _show(
        result,
        f"{made.secret_path}  keep: the secret key, "
        + ("not sealed by a passphrase" if no_passphrase else "sealed by the passphrase"),
        f"{made.public_path}  hand out: for the roster",
        as_json=json_output,
    )


@keys.command()
def roster(
    public: list[Path] = typer.Argument(..., metavar="PUBLIC...", help="Public files, one a client."),
    out: Path = typer.Option(..., help="The roster to write; an existing file is never replaced."),
    json_output: bool = JSON,
) -> None:
    """Make the roster of clients from their public files, and print the digest that everybody compares.

    Exit codes: 0 done, 10 files, 11 a public file is not acceptable, or an id or a key appears twice.
    """
    with _reported():
        from fedpt_secure.crypto import PublicIdentity, roster_of

        made = roster_of([_named(path, PublicIdentity.load) for path in public])
        made.save(out)
    _show(
        {"roster": str(out), "clients": list(made), "digest": made.digest.hex()},
        f"{out}: {len(made)} clients: {_names(made)}",
        f"Digest, to be compared by telephone or in person:\n{made.spoken_digest}",
        as_json=json_output,
    )


@keys.command()
def verify(
    roster_file: Path = typer.Option(..., "--roster", help="The roster as it was received."),
    digest: str | None = typer.Option(None, help="Its digest as somebody else read it out; spaces are ignored."),
    identity: Path | None = typer.Option(None, help="Own secret file: its key must stand in the roster."),
    json_output: bool = JSON,
) -> None:
    """Check a roster: its form and keys, its digest, and that one's own key stands in it.

    Exit codes: 0 everything that was asked for holds, 10 files, 11 something does not.
    """
    with _reported():
        from fedpt_secure.crypto import Roster

        checked = _named(roster_file, Roster.load)
        if digest is not None:
            checked.check_digest(digest)
        own = None if identity is None else _named(identity, _load_own)
        if own is not None:
            own.check_roster(checked)
    result = {
        "roster": str(roster_file),
        "clients": list(checked),
        "digest": checked.digest.hex(),
        "digest_compared": digest is not None,
        "own_id": None if own is None else own.client_id,
    }
    _show(
        result,
        f"{roster_file}: a valid roster of {len(checked)} clients: {_names(checked)}",
        "The digest is the expected one."
        if digest is not None
        else f"Digest, still to be compared by telephone or in person:\n{checked.spoken_digest}",
        *([] if own is None else [f"Your key stands in it, as {own.client_id}."]),
        as_json=json_output,
    )


@contextmanager
def _reported() -> Iterator[None]:
    with reported(Console(stderr=True)):
        from fedpt_secure.crypto import CryptoError

        try:
            yield
        except CryptoError as error:
            raise IdentityError(error.message, hint=error.hint) from error


def _named(path: Path, load: Callable[[Path], _Loaded]) -> _Loaded:
    """What `load` reads, with the file's name before whatever is wrong with it."""
    from fedpt_secure.crypto import CryptoError

    try:
        return load(path)
    except CryptoError as error:
        raise IdentityError(f"{path}: {error.message}", hint=error.hint) from error
    except OSError as error:
        raise IdentityError(f"{path} cannot be read: {error.strerror or error}") from error


def _load_own(path: Path) -> OwnIdentity:
    from fedpt_secure.crypto import load_identity

    return load_identity(path, ask_passphrase=_ask_passphrase)


def _ask_passphrase(*, confirm: bool = False) -> str:
    answer: str = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True)
    return answer


def _names(clients: Iterable[str]) -> str:
    names = list(clients)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _show(result: dict[str, Any], *lines: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        typer.echo("\n".join(lines))
