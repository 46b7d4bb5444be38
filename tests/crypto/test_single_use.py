"""Machines serve one round, one call at a time: no copies, no overlapping threads, nothing after `discard`.

A client that could be run twice from one state would sign two survivor lists, and release both shares of a peer.
"""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import msgspec
import numpy as np
import pytest

from fedpt_secure.crypto import (
    SYSTEM_RANDOM,
    ClientState,
    DuplicateMessage,
    MalformedMessage,
    ProtocolStateError,
    RoundReplayed,
    ServerState,
    TranscriptMismatch,
)
from fedpt_secure.crypto import client as client_module
from fedpt_secure.crypto import masks as masks_module
from fedpt_secure.crypto import messages as m
from fedpt_secure.crypto import server as server_module


@pytest.mark.parametrize("attempt", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_a_client_can_neither_be_copied_nor_pickled(make_cohort, attempt):
    cohort = make_cohort(3)
    a_round = cohort.round().advertise().share().mask().confirm()
    with pytest.raises(ProtocolStateError, match="neither copied nor pickled"):
        attempt(a_round.clients[cohort.ids[0]])


def test_no_repr_shows_a_secret(make_cohort):
    cohort = make_cohort(3)
    a_round = cohort.round().advertise().share()
    client = a_round.clients[cohort.ids[0]]
    secrets = [client._channel.private, client._mask.private, client._seed, *client._channel_secrets.values()]
    secrets += [share for pair in client._held_shares.values() for share in pair]
    objects = [client, client._channel, client._directory, a_round.server, cohort.identities[cohort.ids[0]]]
    for shown in map(repr, objects):
        for secret in secrets:
            assert bytes(secret).hex() not in shown
            assert repr(bytes(secret)) not in shown


def test_a_second_thread_is_turned_away_while_a_call_runs(make_cohort, monkeypatch):
    """Two survivor lists confirmed at the same time would be two signatures; the first call goes on undisturbed."""
    cohort = make_cohort(4)
    a_round = cohort.round(cohort.context(threshold=3)).advertise().share().mask()
    client = a_round.clients[cohort.ids[0]]
    inside, leave = Event(), Event()
    decode = m.decode

    def slow(*arguments, **settings):
        inside.set()
        assert leave.wait(10)
        return decode(*arguments, **settings)

    monkeypatch.setattr(client_module.messages, "decode", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.confirm, a_round.survivor_list)
        assert inside.wait(10)
        with pytest.raises(ProtocolStateError, match="another thread"):
            client.confirm(a_round.survivor_list)
        leave.set()
        assert first.result(10)
    assert client.state is ClientState.CONFIRMED


def test_discarding_waits_for_a_call_in_another_thread(make_cohort, monkeypatch):
    """Wiping keys under a call would mask the vector with keys of zeros, which everybody knows."""
    cohort = make_cohort(4)
    a_round = cohort.round().advertise().share()
    name = cohort.ids[0]
    client = a_round.clients[name]
    inside, leave, seen = Event(), Event(), []
    expand = client_module.apply_masks

    def slow(*arguments, **settings):
        inside.set()
        assert leave.wait(10)
        seen.append(any(client._seed))
        return expand(*arguments, **settings)

    monkeypatch.setattr(client_module, "apply_masks", slow)
    with ThreadPoolExecutor(2) as pool:
        masking = pool.submit(client.mask, a_round.inboxes[name], a_round.vectors[name])
        assert inside.wait(10)
        discarding = pool.submit(client.discard)
        leave.set()
        assert masking.result(10)
        discarding.result(10)
    assert seen == [True]
    assert client.state is ClientState.ABORTED


@pytest.mark.parametrize("phase", ["share", "mask"])
def test_a_call_that_was_discarded_from_within_gives_nothing_out(make_cohort, phase, monkeypatch):
    """As by a signal handler, which runs in the middle of the call, in its own thread."""
    cohort = make_cohort(4)
    name = cohort.ids[0]
    a_round = cohort.round().advertise()
    if phase == "mask":
        a_round.share()
    client = a_round.clients[name]
    target = "split" if phase == "share" else "self_mask"
    genuine = getattr(client_module, target)

    def interrupted(*arguments, **settings):
        client.discard()
        return genuine(*arguments, **settings)

    monkeypatch.setattr(client_module, target, interrupted)
    with pytest.raises(ProtocolStateError, match="discarded while this call ran"):
        a_round.answer(phase, name, a_round.server_message(phase, name))
    assert client.state is ClientState.ABORTED
    assert not client._held_shares


def test_a_call_from_within_a_call_is_refused(make_cohort):
    """A random generator that calls back, for instance; the lock lets its own thread in, the state does not."""
    cohort = make_cohort(3)
    calls = []

    def calling_back(length):
        if calls:
            calls.pop().advertise()
        return SYSTEM_RANDOM(length)

    a_round = cohort.round(random_bytes=calling_back).advertise()
    client = a_round.clients[cohort.ids[0]]
    calls.append(client)
    with pytest.raises(ProtocolStateError, match="aborted"):
        client.share_keys(a_round.directory)
    assert client.state is ClientState.ABORTED


class _Interrupted(BaseException):
    """What is no `Exception`, as `KeyboardInterrupt`."""


@pytest.mark.parametrize(
    ("phase", "target"),
    [
        ("advertise", "self_mask_commitment"),
        ("share", "seal"),
        ("mask", "pack"),
        ("confirm", "messages"),
        ("unmask", "messages"),
    ],
)
def test_any_exception_in_any_phase_wipes_the_client(make_cohort, monkeypatch, phase, target):
    """Every secret that existed before the call is zeros after it, and no later call works."""
    cohort = make_cohort(4)
    a_round = cohort.round()
    for done in ("advertise", "share", "mask", "confirm", "unmask"):
        if done == phase:
            break
        getattr(a_round, done)()
    client, name = a_round.clients[cohort.ids[0]], cohort.ids[0]
    secrets = [client._channel.private, client._mask.private, client._seed, *client._channel_secrets.values()]
    secrets += [share for pair in client._held_shares.values() for share in pair]

    def fails(*_arguments, **_settings):
        raise _Interrupted

    owner, attribute = (client_module.messages, "decode") if target == "messages" else (client_module, target)
    monkeypatch.setattr(owner, attribute, fails)
    with pytest.raises(_Interrupted):
        a_round.answer(phase, name, a_round.server_message(phase, name))
    assert client.state is ClientState.ABORTED
    assert not any(any(secret) for secret in secrets)
    assert not client._held_shares
    monkeypatch.undo()
    with pytest.raises(ProtocolStateError):
        a_round.answer(phase, name, a_round.server_message(phase, name))


def test_shares_that_were_not_sealed_any_more_are_wiped_too(make_cohort, monkeypatch):
    cohort = make_cohort(4)
    made = []
    genuine = client_module.split

    def remembering(*arguments, **settings):
        made.append(genuine(*arguments, **settings))
        return made[-1]

    def fails(*_arguments, **_settings):
        raise _Interrupted

    a_round = cohort.round().advertise()
    monkeypatch.setattr(client_module, "split", remembering)
    monkeypatch.setattr(client_module, "seal", fails)
    with pytest.raises(_Interrupted):
        a_round.clients[cohort.ids[0]].share_keys(a_round.directory)
    assert len(made) == 2
    assert not any(any(share) for shares in made for share in shares)


def test_nothing_leaves_before_the_register_has_the_release(make_cohort):
    """A register that cannot write, or says no, keeps the shares in."""
    cohort = make_cohort(3)

    class Refusing:
        def begin(self, context):
            pass

        def release(self, context):
            raise RoundReplayed("opened before")

    a_round = cohort.round(register=Refusing()).advertise().share().mask().confirm()
    client = a_round.clients[cohort.ids[0]]
    shares = [share for pair in client._held_shares.values() for share in pair]
    with pytest.raises(RoundReplayed):
        client.unmask(a_round.confirmations)
    assert client.state is ClientState.ABORTED
    assert not any(any(share) for share in shares)


def test_released_shares_are_wiped_from_the_client(make_cohort):
    cohort = make_cohort(3)
    a_round = cohort.round().advertise().share().mask().confirm()
    client = a_round.clients[cohort.ids[0]]
    shares = [share for pair in client._held_shares.values() for share in pair]
    assert shares
    a_round.unmask()
    assert not any(any(share) for share in shares)


def test_a_vector_that_was_added_in_part_ends_the_round(make_cohort, monkeypatch):
    """Out of memory halfway: were the server to go on, the vector would be in the sum once and a half after a retry."""
    cohort = make_cohort(3)
    a_round = cohort.round().advertise().share()
    name = cohort.ids[0]
    sent = a_round.clients[name].mask(a_round.inboxes[name], a_round.vectors[name])

    def half(total, packed, ring_bits):
        total[0] += 1
        raise MemoryError

    monkeypatch.setattr(server_module, "add_packed", half)
    with pytest.raises(MemoryError):
        a_round.server.receive_masked(name, sent)
    assert a_round.server.state is ServerState.ABORTED
    monkeypatch.undo()
    with pytest.raises(ProtocolStateError):
        a_round.server.receive_masked(name, sent)


def test_the_server_adds_one_vector_at_a_time_and_each_once(make_cohort, monkeypatch):
    """The same message from four threads, and everybody else's at the same time: no vector is lost or twice in."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(vector_length=1000)).advertise().share()
    sent = {name: a_round.clients[name].mask(a_round.inboxes[name], a_round.vectors[name]) for name in cohort.ids}
    genuine, running = server_module.add_packed, []

    def slow(*arguments):
        running.append(1)
        assert len(running) == 1
        Event().wait(0.01)
        genuine(*arguments)
        running.pop()

    monkeypatch.setattr(server_module, "add_packed", slow)

    def hand_in(name):
        try:
            a_round.server.receive_masked(name, sent[name])
        except DuplicateMessage:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        accepted = sum(pool.map(hand_in, [name for name in cohort.ids for _ in range(4)]))
    assert accepted == 6
    a_round.survivor_list = a_round.server.publish_survivors()
    total = a_round.confirm().unmask().server.aggregate()
    assert (total == a_round.plain_sum(cohort.ids)).all()


def test_a_finished_server_forgets_shares_and_sealed_pairs(make_cohort):
    cohort = make_cohort(4)
    a_round = cohort.round(cohort.context(threshold=3)).advertise().share()
    assert not a_round.server._sealed
    server = a_round.mask().confirm().unmask().server
    assert server._shares._shares
    server.aggregate()
    assert not server._shares._shares


def test_an_aborted_server_forgets_the_sum_and_the_sealed_pairs(make_cohort):
    cohort = make_cohort(4)
    a_round = cohort.round(cohort.context(threshold=3)).advertise()
    for name in cohort.ids[:2]:
        a_round.server.receive_shares(name, a_round.clients[name].share_keys(a_round.directory))
    with pytest.raises(Exception, match="shared keys"):
        a_round.server.route_shares()
    assert not a_round.server._sealed
    assert a_round.server._total is None


def test_a_masked_vector_for_other_sharers_leaves_the_sum_as_it_was(make_cohort):
    cohort = make_cohort(5)
    a_round = cohort.round(cohort.context(threshold=3)).advertise().share()
    name = cohort.ids[0]
    inbox = m.decode(a_round.inboxes[name], m.ShareInbox, a_round.context, body_bytes=1 << 16)
    fewer = msgspec.structs.replace(
        inbox, sharers=m.encode_set(range(4), a_round.context), sealed=inbox.sealed[: 3 * len(inbox.sealed) // 4]
    )
    sent = a_round.clients[name].mask(m.encode(fewer), a_round.vectors[name])
    with pytest.raises(TranscriptMismatch):
        a_round.server.receive_masked(name, sent)
    assert not np.any(a_round.server._total)


@pytest.mark.parametrize(
    ("state", "call"),
    [
        (ClientState.SHARED, lambda client, vector: client.mask(b"", vector)),
        (ClientState.MASKED, lambda client, vector: client.confirm(b"")),
        (ClientState.CONFIRMED, lambda client, vector: client.unmask(b"")),
    ],
)
def test_no_later_phase_runs_without_a_directory(make_cohort, state, call):
    """States and what they imply are kept apart; should they ever disagree, it is a typed error."""
    cohort = make_cohort(3)
    client = cohort.client(cohort.ids[0], cohort.context())
    client._state = state
    with pytest.raises(ProtocolStateError, match="no key directory"):
        call(client, np.zeros(5, dtype=np.uint32))


def test_no_later_phase_of_a_server_runs_without_a_directory_or_a_sum(make_cohort):
    cohort = make_cohort(3)
    a_round = cohort.round()
    a_round.server._state = ServerState.SHARING
    with pytest.raises(ProtocolStateError, match="not published"):
        a_round.server.receive_shares(cohort.ids[0], b"")
    a_round = cohort.round().advertise().share()
    a_round.server._total = None
    with pytest.raises(ProtocolStateError, match="no sum"):
        a_round.server.receive_masked(cohort.ids[0], b"")


@pytest.mark.parametrize("dropped", [False, True])
def test_the_server_wipes_the_secrets_that_it_rebuilds(make_cohort, monkeypatch, dropped):
    cohort = make_cohort(4)
    rebuilt = []
    genuine = server_module.ShareCollection.rebuild

    def remembering(*arguments):
        rebuilt.append(genuine(*arguments))
        return rebuilt[-1]

    monkeypatch.setattr(server_module.ShareCollection, "rebuild", remembering)
    survivors = cohort.ids[1:] if dropped else cohort.ids
    a_round = cohort.round(cohort.context(threshold=3)).advertise().share().mask(survivors).confirm(survivors)
    a_round.unmask(survivors).server.aggregate()
    assert len(rebuilt) == 4
    assert not any(any(secret) for secret in rebuilt)


def test_a_masked_vector_stays_in_the_ring(make_cohort):
    """Bits above the ring would be cut off by packing; the sum of what is sent must be what was masked."""
    cohort = make_cohort(3)
    a_round = cohort.round(cohort.context(ring_bits=20, vector_length=64)).advertise().share()
    seen = []
    genuine = client_module.pack

    def looking(vector, ring_bits):
        seen.append(int(vector.max()))
        return genuine(vector, ring_bits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_module, "pack", looking)
        a_round.mask()
    assert max(seen) < 1 << 20


def test_a_signed_vector_that_does_not_unpack_is_ignored_and_may_be_sent_again(make_cohort):
    """Its unused bits are set. Were it counted all the same, the sum would be said to hold a client it does not."""
    cohort = make_cohort(3)
    a_round = cohort.round(cohort.context(ring_bits=17, vector_length=3)).advertise().share()
    name, context = cohort.ids[0], a_round.context
    sent = a_round.clients[name].mask(a_round.inboxes[name], a_round.vectors[name])
    message = m.decode(sent, m.MaskedVector, context, body_bytes=100)
    vector = bytes(message.vector[:-1]) + bytes([message.vector[-1] | 0x80])
    to_sign = m.masked_to_sign(
        context,
        directory=a_round.server._directory.digest,
        sender=message.sender,
        sharers=message.sharers,
        vector=vector,
    )
    signature = cohort.identities[name].sign(to_sign)
    wrong = msgspec.structs.replace(message, vector=memoryview(vector), signature=signature)
    with pytest.raises(MalformedMessage, match="unused bits"):
        a_round.server.receive_masked(name, m.encode(wrong))
    assert not np.any(a_round.server._total)
    a_round.server.receive_masked(name, sent)
    total = a_round.mask(cohort.ids[1:]).confirm().unmask().server.aggregate()
    assert (total == a_round.plain_sum(cohort.ids)).all()


def test_the_secret_of_a_pair_is_wiped_once_its_mask_key_is_derived(make_cohort, monkeypatch):
    secrets, genuine = [], masks_module.shared_secret

    def remembering(*arguments):
        secrets.append(genuine(*arguments))
        return secrets[-1]

    monkeypatch.setattr(masks_module, "shared_secret", remembering)
    make_cohort(3).round().advertise().share().mask()
    assert len(secrets) == 6
    assert not any(any(secret) for secret in secrets)
