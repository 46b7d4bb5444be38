"""What a malicious server tries before it has a masked vector to work on, and one attack for every check of a client.

Each attack is made twice. With the check in place it must end at the client with the right error. With that one check
taken out it must succeed, which shows that the check is what stops it. `test_adversarial_server.py` has the attacks on
survivor lists and confirmations. The tables at the end say which test holds which check, and that none is left out.
"""

import ast
import inspect
import re
from pathlib import Path

import msgspec
import pytest

from fedpt_secure.crypto import (
    BelowThreshold,
    ClientPolicy,
    DuplicateKey,
    Identity,
    MemoryRoundRegister,
    OwnKeysMissing,
    ParameterError,
    PolicyViolation,
    ProtocolStateError,
    Roster,
    RoundContext,
    RoundReplayed,
    SecAggClient,
    SecAggServer,
    ShareRejected,
    SignatureInvalid,
    SurvivorsRejected,
    TranscriptMismatch,
    UnsafePublicKey,
    key_agreement,
)
from fedpt_secure.crypto import client as client_module
from fedpt_secure.crypto import directory as directory_module
from fedpt_secure.crypto import messages as m
from fedpt_secure.crypto import single_use as single_use_module
from fedpt_secure.crypto.directory import Directory
from fedpt_secure.crypto.key_agreement import KeyPair, pair_mask_key, self_mask_key, shared_secret
from fedpt_secure.crypto.neighbours import mask_sign, share_point
from fedpt_secure.crypto.packing import unpack
from fedpt_secure.crypto.prg import apply_masks
from fedpt_secure.crypto.sealing import SEALED_BYTES
from fedpt_secure.crypto.shamir import SHARE_BYTES, reconstruct

BIG = 1 << 16
"""Room for any message of these small rounds."""


def _entry_of(context, identity, position, *, channel=None, mask=None):
    """A directory record signed by `identity`, with keys of one's choice."""
    fields = {
        "sender": position,
        "channel_key": channel or KeyPair(bytearray(b"c" * 32)).public,
        "mask_key": mask or KeyPair(bytearray(b"m" * 32)).public,
        "seed_commitment": bytes(32),
    }
    signature = identity.sign(m.advertisement_to_sign(context, **fields))
    return m.directory_entry(m.Advertisement(session=context.session_digest, signature=signature, **fields))


def _with_entry(a_round, position, entry):
    message = m.decode(a_round.directory, m.KeyDirectory, a_round.context, body_bytes=BIG)
    entries = bytearray(message.entries)
    entries[position * m.ENTRY_BYTES : (position + 1) * m.ENTRY_BYTES] = entry
    return m.encode(msgspec.structs.replace(message, entries=bytes(entries)))


def _inbox(a_round, name):
    return m.decode(a_round.inboxes[name], m.ShareInbox, a_round.context, body_bytes=BIG)


def _list_of(a_round, positions):
    context = a_round.context
    return m.encode(m.Survivors(session=context.session_digest, survivors=m.encode_set(positions, context)))


def _confirmations(a_round, signatures):
    context = a_round.context
    return m.encode(
        m.Confirmations(
            session=context.session_digest,
            confirmed=m.encode_set(signatures, context),
            signatures=b"".join(signatures[position] for position in sorted(signatures)),
        )
    )


def _statement(a_round, cohort, *, sharers, survivors):
    context = a_round.context
    return m.survivors_to_sign(
        context,
        directory=Directory.from_bytes(a_round.directory, context, cohort.roster).digest,
        sharers=m.encode_set(sharers, context),
        survivors=m.encode_set(survivors, context),
    )


# Each attack takes the cohorts and returns whether it had what it wanted.


def sybil_roster(make_cohort):
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
    a_round = _round_of(cohort, context, clients, roster)
    total = a_round.advertise().share().mask().confirm().unmask().server.aggregate()
    return (total - a_round.plain_sum(made_up) == a_round.vectors[victim]).all()


def _round_of(cohort, context, clients, roster):
    a_round = cohort.round()
    return type(a_round)(context=context, server=SecAggServer(context=context, roster=roster), clients=clients)


def invented_client(make_cohort):
    """A name in the cohort that the roster does not know. Wanted: a client that begins."""
    cohort = make_cohort(4)
    return cohort.client(cohort.ids[0], cohort.context(cohort=(*cohort.ids, "sybil"))).advertise()


def shrunken_cohort(make_cohort):
    """Only the victim and an accomplice are invited. Wanted: the sum less the accomplice's vector."""
    cohort = make_cohort(6)
    victim, accomplice = cohort.ids[:2]
    context = cohort.context(cohort=(victim, accomplice), threshold=2)
    clients = {name: cohort.client(name, context, policy=ClientPolicy(minimum_cohort=2)) for name in (accomplice,)}
    clients[victim] = cohort.client(victim, context, policy=ClientPolicy(minimum_cohort=5))
    a_round = _round_of(cohort, context, clients, cohort.roster)
    total = a_round.advertise().share().mask().confirm().unmask().server.aggregate()
    return (total - a_round.vectors[accomplice] == a_round.vectors[victim]).all()


def low_threshold(make_cohort):
    """Two shares open everything. Wanted: a client that begins such a round."""
    cohort = make_cohort(3)
    return cohort.client(
        cohort.ids[0], cohort.context(threshold=2), policy=ClientPolicy(minimum_threshold=3)
    ).advertise()


def replayed_round(make_cohort):
    """A second attempt over the same updates, without the victim. Wanted: the difference of the two sums."""
    cohort = make_cohort(4)
    registers = {name: MemoryRoundRegister() for name in cohort.ids}

    def total_of(attempt, survivors):
        context = cohort.context(attempt=attempt, threshold=3)
        clients = {name: cohort.client(name, context, register=registers[name]) for name in cohort.ids}
        a_round = _round_of(cohort, context, clients, cohort.roster)
        a_round.advertise().share().mask(survivors).confirm(survivors).unmask(survivors)
        return a_round, a_round.server.aggregate()

    a_round, first = total_of(0, cohort.ids)
    _, second = total_of(1, cohort.ids[1:])
    return (first - second == a_round.vectors[cohort.ids[0]]).all()


def round_begun_twice(make_cohort):
    """The client is started again in the same attempt. Wanted: a second masked vector under other masks."""
    cohort, register = make_cohort(4), MemoryRoundRegister()
    return [cohort.client(cohort.ids[0], cohort.context(), register=register).advertise() for _ in range(2)]


def slow_attempt(make_cohort):
    """Two attempts are under way at once; the other one is opened first. Wanted: shares of the slow one as well."""
    cohort = make_cohort(4)
    registers = {name: MemoryRoundRegister() for name in cohort.ids}
    rounds = []
    for attempt in range(2):
        context = cohort.context(attempt=attempt)
        clients = {name: cohort.client(name, context, register=registers[name]) for name in cohort.ids}
        rounds.append(_round_of(cohort, context, clients, cohort.roster))
    for a_round in rounds:
        a_round.advertise().share().mask().confirm()
    rounds[1].unmask()
    return rounds[0].clients[cohort.ids[0]].unmask(rounds[0].confirmations)


def borrowed_identity(make_cohort):
    """The host has one client's key and another one's name. Wanted: a client that begins."""
    cohort = make_cohort(4)
    return SecAggClient(
        context=cohort.context(),
        identity=cohort.identities[cohort.ids[1]],
        client_id=cohort.ids[0],
        roster=cohort.roster,
        policy=ClientPolicy(),
    ).advertise()


def _share_opens(a_round, cohort, directory, channel):
    """Whether the server opens the pair that client 0 sealed for client 1, with the private channel key it planted."""
    context = a_round.context
    answer = m.decode(a_round.clients[cohort.ids[0]].share_keys(directory), m.SealedShares, context, body_bytes=BIG)
    seen = Directory.from_bytes(directory, context, cohort.roster)
    binding = {
        "session_digest": context.session_digest,
        "directory_digest": seen.digest,
        "sender": cohort.ids[0],
        "receiver": cohort.ids[1],
    }
    secret = shared_secret(channel.private, seen.advertisements[0].channel_key)
    key = key_agreement.seal_key(secret, **binding)
    data = client_module.associated_data(point=2, **binding)
    return any(client_module.unseal(key, answer.sealed[:SEALED_BYTES], data=data, sender=cohort.ids[0])[0])


def forged_client(make_cohort):
    """An accomplice signs keys in another client's name. Wanted: shares that were meant for that client."""
    cohort = make_cohort(4)
    a_round = cohort.round().advertise()
    own = KeyPair(bytearray(b"c" * 32))
    entry = _entry_of(a_round.context, cohort.identities[cohort.ids[3]], 1, channel=own.public)
    return _share_opens(a_round, cohort, _with_entry(a_round, 1, entry), own)


def duplicate_keys(make_cohort):
    """An accomplice advertises another client's mask key as its own. Wanted: a client that goes on with it."""
    cohort = make_cohort(4)
    a_round = cohort.round().advertise()
    honest = Directory.from_bytes(a_round.directory, a_round.context, cohort.roster).advertisements[2]
    entry = _entry_of(a_round.context, cohort.identities[cohort.ids[1]], 1, mask=honest.mask_key)
    return a_round.clients[cohort.ids[0]].share_keys(_with_entry(a_round, 1, entry))


def low_order_key(make_cohort):
    """An accomplice's mask key is a point of low order. Wanted: the mask of the pair, without any private key."""
    cohort = make_cohort(4)
    a_round = cohort.round().advertise()
    context, victim = a_round.context, cohort.ids[0]
    entry = _entry_of(context, cohort.identities[cohort.ids[1]], 1, mask=b"\x01".ljust(32, b"\0"))
    client = a_round.clients[victim]
    client.share_keys(_with_entry(a_round, 1, entry))
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


def own_keys_missing(make_cohort):
    """The victim is left out of the directory that it is shown.

    Without the check it finds no place for itself in the graph, and stops with a bare `KeyError`: there is no gain.
    """
    cohort = make_cohort(4)
    a_round = cohort.round(cohort.context(threshold=3)).advertise(cohort.ids[1:])
    outsider = a_round.clients[cohort.ids[0]]
    outsider.advertise()
    return outsider.share_keys(a_round.directory)


def own_keys_altered(make_cohort):
    """Keys that the client signed for the same session in another life. Wanted: a client that goes on."""
    cohort = make_cohort(4)
    a_round = cohort.round().advertise()
    reborn = cohort.client(cohort.ids[0], a_round.context)
    reborn.advertise()
    return reborn.share_keys(a_round.directory)


def shrunken_directory(make_cohort):
    """Four of six in the directory, where five must be. Wanted: shares among the four."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=4, minimum_survivors=5)).advertise()
    message = m.decode(a_round.directory, m.KeyDirectory, a_round.context, body_bytes=BIG)
    fewer = msgspec.structs.replace(
        message, members=m.encode_set(range(4), a_round.context), entries=message.entries[: 4 * m.ENTRY_BYTES]
    )
    return a_round.clients[cohort.ids[0]].share_keys(m.encode(fewer))


def lonely_sharer(make_cohort):
    """More share holders called silent than the threshold allows. Wanted: a vector masked against too few."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=5, minimum_survivors=2)).advertise().share()
    name, inbox = cohort.ids[0], _inbox(a_round, cohort.ids[0])
    few = msgspec.structs.replace(
        inbox, sharers=m.encode_set(range(4), a_round.context), sealed=inbox.sealed[: 3 * SEALED_BYTES]
    )
    return a_round.clients[name].mask(m.encode(few), a_round.vectors[name])


def _both_kinds_by_one_record(make_cohort):
    """Client 0's sealed pair stands in client 4's place too, and client 4 is called lost.

    Every other client then takes client 0's mask key for client 4's and releases it along with client 0's seed. Wanted:
    client 0's vector.
    """
    cohort = make_cohort(5)
    a_round = cohort.round(cohort.context(threshold=3)).advertise().share()
    context, victim, rest = a_round.context, cohort.ids[0], cohort.ids[1:4]
    for name in rest:
        inbox = _inbox(a_round, name)
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
    masks = [(-1, self_mask_key(reconstruct(seeds, threshold=3), owner=victim, **common))]
    for peer in range(1, 5):
        secret = shared_secret(private, directory.advertisements[peer].mask_key)
        masks.append((-mask_sign(0, peer), pair_mask_key(secret, one=victim, other=cohort.ids[peer], **common)))
    sent = m.decode(a_round.sent["mask"][victim], m.MaskedVector, context, body_bytes=BIG)
    vector = unpack(sent.vector, context.vector_length, context.ring_bits)
    apply_masks(vector, masks)
    return (vector == a_round.vectors[victim]).all()


def another_graph(make_cohort):
    """Shares are routed along a graph that does not come from the directory. Wanted: a client that takes them.

    The server cannot name neighbours. What it can do is to hand a client what others sealed for their own neighbours.
    """
    cohort = make_cohort(16)
    context = cohort.context(degree=4, threshold=4, minimum_survivors=12)
    a_round = cohort.round(context).advertise().share()
    graph = Directory.from_bytes(a_round.directory, context, cohort.roster).graph
    stranger = next(other for other in range(1, 16) if other not in graph.holders(0))
    name, inbox = cohort.ids[0], _inbox(a_round, cohort.ids[0])
    foreign = _inbox(a_round, cohort.ids[stranger]).sealed[:SEALED_BYTES]
    altered = msgspec.structs.replace(inbox, sealed=foreign + inbox.sealed[SEALED_BYTES:])
    return a_round.clients[name].mask(m.encode(altered), a_round.vectors[name])


def outsiders_among_sharers(make_cohort):
    """A name that is in no directory stands among the sharers. Wanted: a client that counts it."""
    cohort = make_cohort(5)
    a_round = cohort.round(cohort.context(threshold=3)).advertise(cohort.ids[:4]).share(cohort.ids[:4])
    name = cohort.ids[0]
    altered = msgspec.structs.replace(_inbox(a_round, name), sharers=m.encode_set(range(5), a_round.context))
    return a_round.clients[name].mask(m.encode(altered), a_round.vectors[name])


def called_lost(make_cohort):
    """The victim is asked to sign that its own vector never came. Wanted: its signature."""
    cohort = make_cohort(5)
    a_round = cohort.round(cohort.context(threshold=4)).advertise().share().mask()
    return a_round.clients[cohort.ids[0]].confirm(_list_of(a_round, range(1, 5)))


def survivors_that_never_shared(make_cohort):
    """Wanted: a signature on a list that names a client whose shares nobody holds."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=4)).advertise().share(cohort.ids[:5]).mask(cohort.ids[:5])
    return a_round.clients[cohort.ids[0]].confirm(_list_of(a_round, range(6)))


def more_dropouts_than_allowed(make_cohort):
    """Three of six are called lost, where one may be. Wanted: a signature on the list of the rest."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=2, minimum_survivors=5), policy=_LAX).advertise().share().mask()
    return a_round.clients[cohort.ids[0]].confirm(_list_of(a_round, range(3)))


def more_lost_holders_than_allowed(make_cohort):
    """Fewer holders survive than the threshold. Wanted: a signature on the list of the rest."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=5)).advertise().share().mask()
    return a_round.clients[cohort.ids[0]].confirm(_list_of(a_round, range(4)))


class _Lax(ClientPolicy):
    """A policy that lets weak rounds begin, so that the checks of later phases can be seen."""

    def check(self, context):
        pass


_LAX = _Lax()


def _confirmed(a_round, cohort, who):
    """All clients are shown everybody as survivors; the signatures of `who` are collected."""
    everybody = _list_of(a_round, range(len(cohort.ids)))
    signatures = {}
    for position, name in enumerate(cohort.ids):
        answer = m.decode(a_round.clients[name].confirm(everybody), m.Confirmation, a_round.context)
        if position in who:
            signatures[position] = answer.signature
    return signatures


def unsigned_list(make_cohort):
    """Confirmations that nobody made. Wanted: the client's shares."""
    cohort = make_cohort(4)
    a_round = cohort.round().advertise().share().mask()
    signatures = _confirmed(a_round, cohort, range(4)) | dict.fromkeys(range(1, 4), bytes(64))
    return a_round.clients[cohort.ids[0]].unmask(_confirmations(a_round, signatures))


def signatures_from_outside(make_cohort):
    """An accomplice that is not on the list signs it, to make up the number. Wanted: the client's shares."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=4)).advertise().share().mask()
    shown = _list_of(a_round, range(4))
    signatures = {}
    for position in range(3):
        answer = a_round.clients[cohort.ids[position]].confirm(shown)
        signatures[position] = m.decode(answer, m.Confirmation, a_round.context).signature
    statement = _statement(a_round, cohort, sharers=range(6), survivors=range(4))
    signatures[5] = cohort.identities[cohort.ids[5]].sign(statement)
    return a_round.clients[cohort.ids[0]].unmask(_confirmations(a_round, signatures))


def too_few_confirmations(make_cohort):
    """One region of a sparse graph has signed, with all holders of the client's shares. Wanted: its shares."""
    cohort = make_cohort(16)
    context = cohort.context(degree=4, threshold=4, minimum_survivors=9)
    a_round = cohort.round(context).advertise().share().mask()
    graph = Directory.from_bytes(a_round.directory, context, cohort.roster).graph
    return a_round.clients[cohort.ids[0]].unmask(_confirmations(a_round, _confirmed(a_round, cohort, graph.holders(0))))


def confirmations_from_far_away(make_cohort):
    """A quorum has signed, but hardly anybody that holds shares of the client's. Wanted: its shares."""
    cohort = make_cohort(16)
    context = cohort.context(degree=4, threshold=5, minimum_survivors=9)
    a_round = cohort.round(context).advertise().share().mask()
    graph = Directory.from_bytes(a_round.directory, context, cohort.roster).graph
    far = [position for position in range(16) if position not in graph.neighbours(0)]
    signatures = _confirmed(a_round, cohort, far)
    return a_round.clients[cohort.ids[0]].unmask(_confirmations(a_round, signatures))


def second_call(make_cohort):
    """The client is asked for its shares again. Wanted: a second answer."""
    cohort = make_cohort(3)
    a_round = cohort.round().advertise().share().mask().confirm().unmask()
    return a_round.clients[cohort.ids[0]].unmask(a_round.confirmations)


def _accept_any_member(remove, monkeypatch):
    """Signatures count if any member of the roster made them."""
    genuine = Roster.verify

    def verify(roster, client_id, message, signature):
        for name in roster:
            try:
                return genuine(roster, name, message, signature)
            except SignatureInvalid:
                continue
        raise SignatureInvalid("nobody signed")

    monkeypatch.setattr(Roster, "verify", verify)


def _trust_any_roster(remove, monkeypatch):
    remove(RoundContext, "check_roster", "roster.digest != self.roster_digest")
    monkeypatch.setattr(Roster, "verify", lambda *_: None)


def _multiply_low_order_points(remove, monkeypatch):
    """X25519 as RFC 7748 has it before the optional check for zero."""
    genuine = key_agreement.crypto_scalarmult

    def scalarmult(private, public):
        return bytes(32) if int.from_bytes(public, "little") < 2 else genuine(private, public)

    for module in (directory_module, key_agreement):
        monkeypatch.setattr(module, "check_public_key", lambda public: None)
    monkeypatch.setattr(key_agreement, "crypto_scalarmult", scalarmult)


def _seal_without_context(remove, monkeypatch):
    """One key for all pairs and no associated data: nothing says who sealed what for whom."""
    monkeypatch.setattr(client_module, "seal_key", lambda *_, **__: b"k" * 32)
    monkeypatch.setattr(client_module, "associated_data", lambda **_: b"")


def _check(name, condition, owner=SecAggClient):
    return lambda remove, monkeypatch: remove(owner, name, condition)


def _forget(method):
    return lambda remove, monkeypatch: monkeypatch.setattr(MemoryRoundRegister, method, lambda *_: None)


def _forget_releases(remove, monkeypatch):
    remove(MemoryRoundRegister, "_check_not_released", "(context.run_id, context.round_index) in self._released")


def _no_policy(remove, monkeypatch):
    monkeypatch.setattr(ClientPolicy, "check", lambda *_: None)


def _open_after_all(remove, monkeypatch):
    monkeypatch.setattr(SecAggClient, "_erase_held_shares", lambda *_: None)
    remove(SecAggClient, "_require_state", "self._state is not expected")


def _signatures_unread(remove, monkeypatch):
    monkeypatch.setattr(Roster, "verify", lambda *_: None)


OWN_ENTRY = "own is None or messages.directory_entry(own) != self._own_entry"
ATTACKS = {
    sybil_roster: (ParameterError, _trust_any_roster),
    invented_client: (ParameterError, _check("check_roster", "strangers", RoundContext)),
    shrunken_cohort: (PolicyViolation, _no_policy),
    low_threshold: (PolicyViolation, _no_policy),
    replayed_round: (RoundReplayed, _forget_releases),
    round_begun_twice: (RoundReplayed, _check("begin", "session in self._begun", MemoryRoundRegister)),
    slow_attempt: (RoundReplayed, _forget("release")),
    borrowed_identity: (ParameterError, _check("__init__", "roster[client_id] != identity.verify_key_bytes")),
    forged_client: (SignatureInvalid, _accept_any_member),
    duplicate_keys: (
        DuplicateKey,
        _check("check_advertisement", "len(keys) != _KEYS_A_MEMBER or keys & known_keys", directory_module),
    ),
    low_order_key: (UnsafePublicKey, _multiply_low_order_points),
    own_keys_missing: (OwnKeysMissing, None),
    own_keys_altered: (OwnKeysMissing, _check("share_keys", OWN_ENTRY)),
    shrunken_directory: (BelowThreshold, _check("_require_enough", "len(present) < minimum")),
    lonely_sharer: (BelowThreshold, _check("_require_enough", "holders < threshold")),
    _both_kinds_by_one_record: (ShareRejected, _seal_without_context),
    another_graph: (ShareRejected, _seal_without_context),
    outsiders_among_sharers: (
        TranscriptMismatch,
        _check("_open_inbox", "self._index not in sharers or not set(sharers) <= set(directory.members)"),
    ),
    called_lost: (SurvivorsRejected, _check("confirm", "self._index not in survivors")),
    survivors_that_never_shared: (
        SurvivorsRejected,
        _check("confirm", "not set(survivors) <= set(self._sharers)"),
    ),
    more_dropouts_than_allowed: (BelowThreshold, _check("_require_enough", "len(present) < minimum")),
    more_lost_holders_than_allowed: (BelowThreshold, _check("_require_enough", "holders < threshold")),
    unsigned_list: (TranscriptMismatch, _signatures_unread),
    signatures_from_outside: (
        TranscriptMismatch,
        _check("_check_confirmations", "not set(confirmed) <= set(self._survivors)"),
    ),
    too_few_confirmations: (BelowThreshold, _check("_check_confirmations", "len(confirmed) < quorum")),
    confirmations_from_far_away: (BelowThreshold, _check("_check_confirmations", "holders < threshold")),
    second_call: (ProtocolStateError, _open_after_all),
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__.strip("_"))
def test_an_attack_ends_at_the_client_with_its_error(make_cohort, attack):
    error, _ = ATTACKS[attack]
    with pytest.raises(error) as caught:
        attack(make_cohort)
    assert type(caught.value) is error
    assert any(entry.path.name == "client.py" for entry in caught.traceback)


@pytest.mark.parametrize(
    "attack",
    [attack for attack, (_, take_out) in ATTACKS.items() if take_out],
    ids=lambda attack: attack.__name__.strip("_"),
)
def test_the_attack_succeeds_once_the_check_is_taken_out(make_cohort, monkeypatch, without_check, attack):
    _, take_out = ATTACKS[attack]
    take_out(without_check, monkeypatch)
    assert attack(make_cohort)


NAMED_IN_THE_ISSUE = {
    "two survivor lists": "test_different_survivor_lists_do_not_open_a_sum_below_the_minimum",
    "asking both shares": "test_a_client_asked_twice_does_not_give_both_shares_of_a_peer",
    "swapped keys": "test_keys_swapped_by_the_server_are_refused",
    "Sybil roster": sybil_roster,
    "shrunken cohort": shrunken_cohort,
    "replayed round": replayed_round,
    "altered weights for one client": "test_masks_of_clients_with_different_weights_do_not_cancel",
    "reordered shares": _both_kinds_by_one_record,
    "forged client": forged_client,
    "threshold below the floor": low_threshold,
    "another neighbour set": another_graph,
    "a round seen before": round_begun_twice,
    "duplicate keys": duplicate_keys,
    "low-order points": low_order_key,
    "own advertisement missing": own_keys_missing,
    "own advertisement altered": own_keys_altered,
    "more dropouts than allowed": more_dropouts_than_allowed,
}

CHECKS_OF_THE_CLIENT = {
    "client_id not in context.cohort": "test_client_identity_roster_and_context_must_belong_together",
    "self._directory is None": "test_no_later_phase_runs_without_a_directory",
    "self._discarded": "test_a_call_that_was_discarded_from_within_gives_nothing_out",
    "not self._turn.acquire(blocking=False)": "test_a_second_thread_is_turned_away_while_a_call_runs",
}
"""Checks in `client.py` and `single_use.py` that no attack of a server is about, and the test that holds them."""


def _tests():
    """Every test function beside this file: its name, and whether it also runs with its check taken out."""
    found = {}
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                marks = " ".join(ast.unparse(mark) for mark in node.decorator_list)
                found[node.name] = "[True, False]" in marks
    return found


def test_every_attack_that_must_be_tried_is_tried_with_and_without_its_check():
    tests = _tests()
    for attack in NAMED_IN_THE_ISSUE.values():
        assert tests[attack] if isinstance(attack, str) else attack in ATTACKS


def test_every_check_of_the_client_has_an_attack_or_a_test():
    """A new `if ...: raise` in either fails here until something holds it."""
    checks = {
        ast.unparse(node.test)
        for module in (client_module, single_use_module)
        for node in ast.walk(ast.parse(Path(inspect.getsourcefile(module)).read_text()))
        if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise)
    }
    attacked = set(re.findall(r'_check\("\w+", "([^"]+)"', Path(__file__).read_text())) | {OWN_ENTRY}
    attacked.add("self._state is not expected")
    assert checks - attacked == set(CHECKS_OF_THE_CLIENT)
    assert set(CHECKS_OF_THE_CLIENT.values()) <= set(_tests())


def test_every_error_that_the_documentation_promises_at_the_client_is_met():
    page = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    table = page.split("## What each check defeats")[1].split("At the server")[0]
    promised = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[-2] for row in table.splitlines() if "|" in row)))
    assert promised == {error.__name__ for error, _ in ATTACKS.values()}
