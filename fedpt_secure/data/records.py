"""Text by client: what every later part of a run works on."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedpt_secure.errors import DataError


@dataclass(frozen=True, slots=True)
class Record:
    """One unit of protection: the example whose presence the privacy statement is about.

    Attributes:
        text: what the loss is computed on.
        prompt: for prompt/response pairs, context without loss; empty for plain text.
    """

    text: str
    prompt: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """What two records are compared by: both texts without surrounding white space, nothing else changed."""
        return (self.prompt.strip(), self.text.strip())


@dataclass(frozen=True, slots=True)
class ClientText:
    """One client's records, split for good before anything is trained.

    Attributes:
        client_id: unique in the federation.
        train: at least one record; all that DP-SGD of this client ever reads.
        held_out: at least one record; read by the evaluation only.
    """

    client_id: str
    train: tuple[Record, ...]
    held_out: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Preparation:
    """What was read and what was left out on the way to the training sets. Nothing is dropped without a count.

    Attributes:
        records_read: rows, conversations' sides or passages the source gave, unusable ones included.
        unusable: reason -> number of rows left out for it (an empty cell, a cell that is not text).
        duplicates: records left out because an equal one (`Record.key`) came before.
        clients_below_minimum: clients left out for having fewer than the minimum of records.
        records_below_minimum: the records of those clients.
    """

    records_read: int = 0
    unusable: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = 0
    clients_below_minimum: int = 0
    records_below_minimum: int = 0

    def sentence(self) -> str:
        """One line for people: what was read and what was left out."""
        parts = [f"{self.records_read:,} records read"]
        parts += [f"{count:,} left out ({reason})" for reason, count in self.unusable.items()]
        if self.duplicates:
            parts.append(f"{self.duplicates:,} exact duplicates left out")
        if self.clients_below_minimum:
            parts.append(
                f"{self.clients_below_minimum:,} clients with too few records left out "
                f"({self.records_below_minimum:,} records)"
            )
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class FederatedText:
    """A whole simulated federation.

    Attributes:
        name: short name of the source.
        description: one line: what it is, its licence, what a client and a record are.
        clients: sorted by `client_id`.
        digest: SHA-256 over the canonical content (`content_digest`); a run resumes only on the same data.
        preparation: what was read and left out.
    """

    name: str
    description: str
    clients: tuple[ClientText, ...]
    digest: str
    preparation: Preparation = field(default_factory=Preparation)

    @classmethod
    def of(
        cls,
        name: str,
        description: str,
        clients: Iterable[ClientText],
        *,
        preparation: Preparation | None = None,
    ) -> FederatedText:
        """Sort the clients, check them, and compute the digest.

        Raises:
            DataError: no clients, a client named twice, or a client without training or held-out records.
        """
        ordered = tuple(sorted(clients, key=lambda client: client.client_id))
        if not ordered:
            raise DataError(f"{name} has no clients", hint="check the source and the minimum of records per client")
        for before, after in itertools.pairwise(ordered):
            if before.client_id == after.client_id:
                raise DataError(f"{name} names the client {after.client_id!r} twice; ids must be unique")
        for client in ordered:
            if not client.train or not client.held_out:
                raise DataError(
                    f"client {client.client_id!r} of {name} has {len(client.train)} training and "
                    f"{len(client.held_out)} held-out records; both must be at least 1"
                )
        return cls(name, description, ordered, content_digest(ordered), preparation or Preparation())

    @property
    def client_ids(self) -> tuple[str, ...]:
        """All ids, sorted."""
        return tuple(client.client_id for client in self.clients)

    def client(self, client_id: str) -> ClientText:
        """The client of that id.

        Raises:
            DataError: there is none; the hint names the closest ids.
        """
        for client in self.clients:
            if client.client_id == client_id:
                return client
        close = difflib.get_close_matches(client_id, self.client_ids, n=3, cutoff=0.4) or self.client_ids[:3]
        raise DataError(
            f"unknown client {client_id!r}: {self.name} has {len(self.clients)} clients and this is none of them",
            hint=f"did you mean one of: {', '.join(close)}",
        )


def content_digest(clients: Iterable[ClientText]) -> str:
    """SHA-256, in hex, over ids, records and the split, in the order given.

    Each client is one line of ASCII JSON, so that no two different federations have the same bytes.
    """
    digest = hashlib.sha256(b"fedpt-secure/federated-text/v1\n")
    for client in clients:
        line = [
            client.client_id,
            [[record.prompt, record.text] for record in client.train],
            [[record.prompt, record.text] for record in client.held_out],
        ]
        digest.update(json.dumps(line, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()
