"""Messages that a malicious server makes up, out of those it has seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from fedpt_secure.attacks.protocol.cohort import Cohort, Round
from fedpt_secure.crypto import Identity, Roster, RoundContext, SecAggClient, SecAggServer
from fedpt_secure.crypto import messages as m
from fedpt_secure.crypto.directory import Directory
from fedpt_secure.crypto.key_agreement import KeyPair

BIG = 1 << 16
"""Room for any message of these small rounds."""


def signed_entry(
    context: RoundContext, identity: Identity, position: int, *, channel: bytes | None = None, mask: bytes | None = None
) -> bytes:
    """A directory record signed by `identity`, with keys of one's choice."""
    fields: dict[str, Any] = {
        "sender": position,
        "channel_key": channel or KeyPair(bytearray(b"c" * 32)).public,
        "mask_key": mask or KeyPair(bytearray(b"m" * 32)).public,
        "seed_commitment": bytes(32),
    }
    signature = identity.sign(m.advertisement_to_sign(context, **fields))
    return m.directory_entry(m.Advertisement(session=context.session_digest, signature=signature, **fields))


def with_entry(a_round: Round, position: int, entry: bytes) -> bytes:
    message = m.decode(a_round.directory, m.KeyDirectory, a_round.context, body_bytes=BIG)
    entries = bytearray(message.entries)
    entries[position * m.ENTRY_BYTES : (position + 1) * m.ENTRY_BYTES] = entry
    return m.encode(msgspec.structs.replace(message, entries=bytes(entries)))


def inbox_of(a_round: Round, name: str) -> m.ShareInbox:
    return m.decode(a_round.inboxes[name], m.ShareInbox, a_round.context, body_bytes=BIG)


def survivor_list(a_round: Round, positions: Iterable[int]) -> bytes:
    context = a_round.context
    return m.encode(m.Survivors(session=context.session_digest, survivors=m.encode_set(positions, context)))


def confirmation_list(a_round: Round, signatures: Mapping[int, bytes]) -> bytes:
    context = a_round.context
    return m.encode(
        m.Confirmations(
            session=context.session_digest,
            confirmed=m.encode_set(signatures, context),
            signatures=b"".join(signatures[position] for position in sorted(signatures)),
        )
    )


def statement_on(a_round: Round, cohort: Cohort, *, sharers: Iterable[int], survivors: Iterable[int]) -> bytes:
    context = a_round.context
    return m.survivors_to_sign(
        context,
        directory=Directory.from_bytes(a_round.directory, context, cohort.roster).digest,
        sharers=m.encode_set(sharers, context),
        survivors=m.encode_set(survivors, context),
    )


def round_among(cohort: Cohort, context: RoundContext, clients: dict[str, SecAggClient], roster: Roster) -> Round:
    return Round(context=context, server=SecAggServer(context=context, roster=roster), clients=clients)
