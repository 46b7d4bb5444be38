"""What a malicious server tries until it has masked vectors. Each attack returns whether it had what it wants.

With the client's checks in place every one of them ends there, with an error of the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from fedpt_secure.attacks.protocol.cohort import Cohort, Cohorts, Round
from fedpt_secure.attacks.protocol.forging import BIG, inbox_of, round_among, signed_entry, with_entry
from fedpt_secure.crypto import (
    ClientPolicy,
    Identity,
    MemoryRoundRegister,
    Roster,
    SecAggClient,
    key_agreement,
)
from fedpt_secure.crypto import client as _client
from fedpt_secure.crypto import messages as m
from fedpt_secure.crypto.directory import Directory
from fedpt_secure.crypto.key_agreement import KeyPair, pair_mask_key, self_mask_key, shared_secret
from fedpt_secure.crypto.neighbours import mask_sign, share_point
from fedpt_secure.crypto.packing import unpack
from fedpt_secure.crypto.prg import apply_masks
from fedpt_secure.crypto.sealing import SEALED_BYTES
from fedpt_secure.crypto.shamir import SHARE_BYTES, reconstruct

client_module: Any = _client
"""Looked up at each use: a broken build may have other functions in it."""


def sybil_roster(make_cohort: Cohorts) -> object:
    """A round of one client and three that the server made up. Wanted: the sum less the server's own vectors."""
    cohort = make_cohort(4)
    victim = cohort.ids[0]
    made_up = {name: Identity.generate() for name in cohort.ids[1:]}
    roster = Roster(
        {victim: cohort.roster[victim]} | {name: identity.verify_key_bytes for name, identity in made_up.items()}
    )
    context = cohort.context(roster_digest=roster.digest)
    clients = {victim: cohort.client(victim, context)}
    for name, identity in made_up.items():
        clients[name] = SecAggClient(
            context=context, identity=identity, client_id=name, roster=roster, policy=ClientPolicy()
        )
    a_round = round_among(cohort, context, clients, roster)
    total = a_round.advertise().share().mask().confirm().unmask().server.aggregate()
    return (total - a_round.plain_sum(made_up) == a_round.vectors[victim]).all()


def invented_client(make_cohort: Cohorts) -> object:
    """A name in the cohort that the roster does not know. Wanted: a client that begins."""
    cohort = make_cohort(4)
    return cohort.client(cohort.ids[0], cohort.context(cohort=(*cohort.ids, "sybil"))).advertise()


def shrunken_cohort(make_cohort: Cohorts) -> object:
    """Only the victim and an accomplice are invited. Wanted: the sum less the accomplice's vector."""
    cohort = make_cohort(6)
    victim, accomplice = cohort.ids[:2]
    context = cohort.context(cohort=(victim, accomplice), threshold=2)
    clients = {name: cohort.client(name, context, policy=ClientPolicy(minimum_cohort=2)) for name in (accomplice,)}
    clients[victim] = cohort.client(victim, context, policy=ClientPolicy(minimum_cohort=5))
    a_round = round_among(cohort, context, clients, cohort.roster)
    total = a_round.advertise().share().mask().confirm().unmask().server.aggregate()
    return (total - a_round.vectors[accomplice] == a_round.vectors[victim]).all()


def low_threshold(make_cohort: Cohorts) -> object:
    """Two shares open everything. Wanted: a client that begins such a round."""
    cohort = make_cohort(3)
    return cohort.client(
        cohort.ids[0], cohort.context(threshold=2), policy=ClientPolicy(minimum_threshold=3)
    ).advertise()


def replayed_round(make_cohort: Cohorts) -> object:
    """A second attempt over the same updates, without the victim. Wanted: the difference of the two sums."""
    cohort = make_cohort(4)
    registers = {name: MemoryRoundRegister() for name in cohort.ids}

    def total_of(attempt: int, survivors: Sequence[str]) -> tuple[Round, Any]:
        context = cohort.context(attempt=attempt, threshold=3)
        clients = {name: cohort.client(name, context, register=registers[name]) for name in cohort.ids}
        a_round = round_among(cohort, context, clients, cohort.roster)
        a_round.advertise().share().mask(survivors).confirm(survivors).unmask(survivors)
        return a_round, a_round.server.aggregate()

    a_round, first = total_of(0, cohort.ids)
    _, second = total_of(1, cohort.ids[1:])
    return (first - second == a_round.vectors[cohort.ids[0]]).all()


def round_begun_twice(make_cohort: Cohorts) -> object:
    """The client is started again in the same attempt. Wanted: a second masked vector under other masks."""
    cohort, register = make_cohort(4), MemoryRoundRegister()
    return [cohort.client(cohort.ids[0], cohort.context(), register=register).advertise() for _ in range(2)]


def slow_attempt(make_cohort: Cohorts) -> object:
    """Two attempts are under way at once; the other one is opened first. Wanted: shares of the slow one as well."""
    cohort = make_cohort(4)
    registers = {name: MemoryRoundRegister() for name in cohort.ids}
    rounds = []
    for attempt in range(2):
        context = cohort.context(attempt=attempt)
        clients = {name: cohort.client(name, context, register=registers[name]) for name in cohort.ids}
        rounds.append(round_among(cohort, context, clients, cohort.roster))
    for a_round in rounds:
        a_round.advertise().share().mask().confirm()
    rounds[1].unmask()
    return rounds[0].clients[cohort.ids[0]].unmask(rounds[0].confirmations)


def borrowed_identity(make_cohort: Cohorts) -> object:
    """The host has one client's key and another one's name. Wanted: a client that begins."""
    cohort = make_cohort(4)
    return SecAggClient(
        context=cohort.context(),
        identity=cohort.identities[cohort.ids[1]],
        client_id=cohort.ids[0],
        roster=cohort.roster,
        policy=ClientPolicy(),
    ).advertise()


def _share_opens(a_round: Round, cohort: Cohort, directory: bytes, channel: KeyPair) -> bool:
    """Whether the server opens the pair that client 0 sealed for client 1, with the private channel key it planted."""
    context = a_round.context
    answer = m.decode(a_round.clients[cohort.ids[0]].share_keys(directory), m.SealedShares, context, body_bytes=BIG)
    seen = Directory.from_bytes(directory, context, cohort.roster)
    binding: dict[str, Any] = {
        "session_digest": context.session_digest,
        "directory_digest": seen.digest,
        "sender": cohort.ids[0],
        "receiver": cohort.ids[1],
    }
    secret = shared_secret(channel.private, seen.advertisements[0].channel_key)
    key = key_agreement.seal_key(secret, **binding)
    data = client_module.associated_data(point=2, **binding)
    return any(client_module.unseal(key, answer.sealed[:SEALED_BYTES], data=data, sender=cohort.ids[0])[0])


def forged_client(make_cohort: Cohorts) -> object:
    """An accomplice signs keys in another client's name. Wanted: shares that were meant for that client."""
    cohort = make_cohort(4)
    a_round = cohort.round().advertise()
    own = KeyPair(bytearray(b"c" * 32))
    entry = signed_entry(a_round.context, cohort.identities[cohort.ids[3]], 1, channel=own.public)
    return _share_opens(a_round, cohort, with_entry(a_round, 1, entry), own)


def duplicate_keys(make_cohort: Cohorts) -> object:
    """An accomplice advertises another client's mask key as its own. Wanted: a client that goes on with it."""
    cohort = make_cohort(4)
    a_round = cohort.round().advertise()
    honest = Directory.from_bytes(a_round.directory, a_round.context, cohort.roster).advertisements[2]
    entry = signed_entry(a_round.context, cohort.identities[cohort.ids[1]], 1, mask=honest.mask_key)
    return a_round.clients[cohort.ids[0]].share_keys(with_entry(a_round, 1, entry))


def low_order_key(make_cohort: Cohorts) -> object:
    """An accomplice's mask key is a point of low order. Wanted: the mask of the pair, without any private key."""
    cohort = make_cohort(4)
    a_round = cohort.round().advertise()
    context, victim = a_round.context, cohort.ids[0]
    entry = signed_entry(context, cohort.identities[cohort.ids[1]], 1, mask=b"\x01".ljust(32, b"\0"))
    client: Any = a_round.clients[victim]
    client.share_keys(with_entry(a_round, 1, entry))
    _, used = client_module.pair_mask(
        client._mask.private, owner=0, peer=1, directory=client._directory, context=context
    )
    guessed = pair_mask_key(
        bytearray(32),
        session_digest=context.session_digest,
        directory_digest=client._directory.digest,
        model_digest=context.model_digest,
        one=victim,
        other=cohort.ids[1],
    )
    return used == guessed


def own_keys_missing(make_cohort: Cohorts) -> object:
    """The victim is left out of the directory that it is shown.

    Without the check it finds no place for itself in the graph, and stops with a bare `KeyError`: there is no gain.
    """
    cohort = make_cohort(4)
    a_round = cohort.round(cohort.context(threshold=3)).advertise(cohort.ids[1:])
    outsider = a_round.clients[cohort.ids[0]]
    outsider.advertise()
    return outsider.share_keys(a_round.directory)


def own_keys_altered(make_cohort: Cohorts) -> object:
    """Keys that the client signed for the same session in another life. Wanted: a client that goes on."""
    cohort = make_cohort(4)
    a_round = cohort.round().advertise()
    reborn = cohort.client(cohort.ids[0], a_round.context)
    reborn.advertise()
    return reborn.share_keys(a_round.directory)


def shrunken_directory(make_cohort: Cohorts) -> object:
    """Four of six in the directory, where five must be. Wanted: shares among the four."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=4, minimum_survivors=5)).advertise()
    message = m.decode(a_round.directory, m.KeyDirectory, a_round.context, body_bytes=BIG)
    fewer = msgspec.structs.replace(
        message, members=m.encode_set(range(4), a_round.context), entries=message.entries[: 4 * m.ENTRY_BYTES]
    )
    return a_round.clients[cohort.ids[0]].share_keys(m.encode(fewer))


def lonely_sharer(make_cohort: Cohorts) -> object:
    """More share holders called silent than the threshold allows. Wanted: a vector masked against too few."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=5, minimum_survivors=2)).advertise().share()
    name, inbox = cohort.ids[0], inbox_of(a_round, cohort.ids[0])
    few = msgspec.structs.replace(
        inbox, sharers=m.encode_set(range(4), a_round.context), sealed=inbox.sealed[: 3 * SEALED_BYTES]
    )
    return a_round.clients[name].mask(m.encode(few), a_round.vectors[name])


def both_kinds_by_one_record(make_cohort: Cohorts) -> object:
    """Client 0's sealed pair stands in client 4's place too, and client 4 is called lost.

    Every other client then takes client 0's mask key for client 4's and releases it along with client 0's seed. Wanted:
    client 0's vector.
    """
    cohort = make_cohort(5)
    a_round = cohort.round(cohort.context(threshold=3)).advertise().share()
    context, victim, rest = a_round.context, cohort.ids[0], cohort.ids[1:4]
    for name in rest:
        inbox = inbox_of(a_round, name)
        pairs = [inbox.sealed[start : start + SEALED_BYTES] for start in range(0, len(inbox.sealed), SEALED_BYTES)]
        a_round.inboxes[name] = m.encode(msgspec.structs.replace(inbox, sealed=b"".join([*pairs[:3], pairs[0]])))
    survivors = cohort.ids[:4]
    a_round.mask(survivors).confirm(survivors)
    seeds, keys = {}, {}
    for name in rest:
        answer = m.decode(a_round.clients[name].unmask(a_round.confirmations), m.Unmasking, context, body_bytes=BIG)
        records = list(m.split_records(answer.shares, count=5, size=SHARE_BYTES, what="shares"))
        point = share_point(context.index_of(name))
        seeds[point], keys[point] = records[0], records[4]
    directory = Directory.from_bytes(a_round.directory, context, cohort.roster)
    common = {
        "session_digest": context.session_digest,
        "directory_digest": directory.digest,
        "model_digest": context.model_digest,
    }
    private = reconstruct(keys, threshold=3)
    masks: list[tuple[Literal[1, -1], bytes]] = [
        (-1, self_mask_key(reconstruct(seeds, threshold=3), owner=victim, **common))
    ]
    for peer in range(1, 5):
        secret = shared_secret(private, directory.advertisements[peer].mask_key)
        masks.append((mask_sign(peer, 0), pair_mask_key(secret, one=victim, other=cohort.ids[peer], **common)))
    sent = m.decode(a_round.sent["mask"][victim], m.MaskedVector, context, body_bytes=BIG)
    vector = unpack(sent.vector, context.vector_length, context.ring_bits)
    apply_masks(vector, masks)
    return (vector == a_round.vectors[victim]).all()


def another_graph(make_cohort: Cohorts) -> object:
    """Shares are routed along a graph that does not come from the directory. Wanted: a client that takes them.

    The server cannot name neighbours. What it can do is to hand a client what others sealed for their own neighbours.
    """
    cohort = make_cohort(16)
    context = cohort.context(degree=4, threshold=4, minimum_survivors=12)
    a_round = cohort.round(context).advertise().share()
    graph = Directory.from_bytes(a_round.directory, context, cohort.roster).graph
    stranger = next(other for other in range(1, 16) if other not in graph.holders(0))
    name, inbox = cohort.ids[0], inbox_of(a_round, cohort.ids[0])
    foreign = inbox_of(a_round, cohort.ids[stranger]).sealed[:SEALED_BYTES]
    altered = msgspec.structs.replace(inbox, sealed=foreign + inbox.sealed[SEALED_BYTES:])
    return a_round.clients[name].mask(m.encode(altered), a_round.vectors[name])


def outsiders_among_sharers(make_cohort: Cohorts) -> object:
    """A name that is in no directory stands among the sharers. Wanted: a client that counts it."""
    cohort = make_cohort(5)
    a_round = cohort.round(cohort.context(threshold=3)).advertise(cohort.ids[:4]).share(cohort.ids[:4])
    name = cohort.ids[0]
    altered = msgspec.structs.replace(inbox_of(a_round, name), sharers=m.encode_set(range(5), a_round.context))
    return a_round.clients[name].mask(m.encode(altered), a_round.vectors[name])
