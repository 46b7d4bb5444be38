"""Whole rounds: the sum is exact, whoever drops out when; or the round ends with a typed abort."""

from itertools import product

import numpy as np
import pytest

from fedpt_secure.crypto import (
    BelowThreshold,
    ClientState,
    DuplicateMessage,
    FixedPointEncoding,
    MessageError,
    ParameterError,
    ProtocolAbort,
    ProtocolStateError,
    SecAggServer,
    ServerState,
    UnknownSender,
    ring_dtype,
)
from fedpt_secure.crypto.shamir import split

PHASES = ["advertise", "share", "mask", "confirm", "unmask"]
NEVER = len(PHASES)
RECEIVERS = {
    "advertise": "receive_advertisement",
    "share": "receive_shares",
    "mask": "receive_masked",
    "confirm": "receive_confirmation",
    "unmask": "receive_unmasking",
}


def _run(a_round, vanishes):
    """Run a round in which client i sends nothing from phase `vanishes[i]` on."""
    for number, phase in enumerate(PHASES):
        present = [name for name, when in zip(a_round.context.cohort, vanishes, strict=True) if when > number]
        getattr(a_round, phase)(present)
    return a_round.server.aggregate()


@pytest.mark.parametrize("first", range(NEVER + 1))
def test_every_dropout_pattern_of_four_clients_gives_the_exact_sum_or_a_typed_abort(make_cohort, first):
    """All 6^4 patterns: each client vanishes before one of the five phases or never; threshold 3."""
    cohort = make_cohort(4)
    context = cohort.context(vector_length=3, threshold=3)
    for rest in product(range(NEVER + 1), repeat=3):
        vanishes = (first, *rest)
        a_round = cohort.round(context)
        present = [sum(when > number for when in vanishes) for number in range(NEVER)]
        if min(present) < 3:
            with pytest.raises(BelowThreshold):
                _run(a_round, vanishes)
            assert a_round.server.state is ServerState.ABORTED
            with pytest.raises(ProtocolStateError):
                a_round.server.aggregate()
            continue
        total = _run(a_round, vanishes)
        survivors = [name for name, when in zip(cohort.ids, vanishes, strict=True) if when > 2]
        assert a_round.server.survivors == tuple(survivors)
        assert (total == a_round.plain_sum(survivors)).all()


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("spare", [1, 0])
def test_dropping_one_or_all_that_may_drop_at_one_phase_keeps_the_sum_exact(make_cohort, phase, spare):
    cohort = make_cohort(9)
    context = cohort.context(threshold=6)
    when = PHASES.index(phase)
    dropped = 1 if spare else 3
    vanishes = [when] * dropped + [NEVER] * (9 - dropped)
    a_round = cohort.round(context)
    total = _run(a_round, vanishes)
    survivors = cohort.ids[dropped:] if when <= 2 else cohort.ids
    assert (total == a_round.plain_sum(survivors)).all()


@pytest.mark.parametrize("phase", PHASES)
def test_one_dropout_more_than_allowed_aborts_at_that_phase(make_cohort, phase):
    cohort = make_cohort(9)
    when = PHASES.index(phase)
    a_round = cohort.round(cohort.context(threshold=6))
    with pytest.raises(BelowThreshold):
        _run(a_round, [when] * 4 + [NEVER] * 5)
    assert a_round.server.state is ServerState.ABORTED


def test_a_minimum_of_survivors_above_the_threshold_holds(make_cohort):
    cohort = make_cohort(6)
    context = cohort.context(threshold=4, minimum_survivors=6)
    with pytest.raises(BelowThreshold, match="the round needs 6"):
        _run(cohort.round(context), [2] + [NEVER] * 5)
    # Silence after the vectors are in costs nothing: the sum still holds all six.
    late = cohort.round(context)
    assert (_run(late, [4, 3] + [NEVER] * 4) == late.plain_sum(cohort.ids)).all()


@pytest.mark.parametrize("ring_bits", [16, 17, 24, 31, 32, 33, 48, 63, 64])
def test_the_sum_is_exact_in_every_ring(make_cohort, ring_bits):
    cohort = make_cohort(4)
    a_round = cohort.round(cohort.context(ring_bits=ring_bits, vector_length=101))
    total = _run(a_round, [NEVER, 2, NEVER, NEVER])
    assert total.dtype == ring_dtype(ring_bits)
    assert (total == a_round.plain_sum(a_round.server.survivors)).all()


@pytest.mark.parametrize("length", [1, 65_535, 65_537, 200_001])
def test_the_sum_is_exact_at_every_length_and_number_of_workers(make_cohort, length):
    cohort = make_cohort(3)
    context = cohort.context(vector_length=length, ring_bits=20)
    a_round = cohort.round(context, workers=2)
    a_round.server = SecAggServer(context=context, roster=cohort.roster, workers=2)
    assert (_run(a_round, [NEVER] * 3) == a_round.plain_sum(cohort.ids)).all()


def test_the_k_regular_graph_gives_the_same_exact_sum(make_cohort):
    cohort = make_cohort(16)
    context = cohort.context(degree=8, threshold=5, minimum_survivors=11)
    a_round = cohort.round(context)
    total = _run(a_round, [0, 2, 2, 3, 4] + [NEVER] * 11)
    assert (total == a_round.plain_sum(a_round.server.survivors)).all()
    assert len(a_round.server.survivors) == 13


def test_two_clients_can_sum(make_cohort):
    cohort = make_cohort(2)
    a_round = cohort.round(cohort.context(threshold=2))
    assert (_run(a_round, [NEVER] * 2) == a_round.plain_sum(cohort.ids)).all()


def test_real_vectors_go_in_and_their_mean_comes_out(make_cohort):
    cohort = make_cohort(5)
    context = cohort.context(vector_length=1000)
    encoding = FixedPointEncoding(ring_bits=32, bound=0.5, cohort=5)
    updates = {name: np.random.default_rng(number).normal(0, 0.1, 1000) for number, name in enumerate(cohort.ids)}
    a_round = cohort.round(context)
    a_round.vectors = {name: encoding.encode(update) for name, update in updates.items()}
    total = _run(a_round, [NEVER] * 4 + [2])
    survivors = a_round.server.survivors
    mean = encoding.decode_sum(total, survivors=len(survivors)) / len(survivors)
    exact = np.mean([np.clip(updates[name], -0.5, 0.5) for name in survivors], axis=0)
    assert np.abs(mean - exact).max() <= 1 / encoding.scale


def test_the_caller_s_vector_is_left_as_it_was(make_cohort):
    cohort = make_cohort(3)
    a_round = cohort.round().advertise().share()
    before = {name: vector.copy() for name, vector in a_round.vectors.items()}
    a_round.mask()
    assert all((a_round.vectors[name] == before[name]).all() for name in before)


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(4, dtype=np.uint32),
        np.zeros(5, dtype=np.uint64),
        np.zeros(5, dtype=np.float32),
        np.zeros((5, 1), dtype=np.uint32),
        np.full(5, 1 << 20, dtype=np.uint32),
    ],
    ids=["short", "wide", "real", "2-D", "outside the ring"],
)
def test_a_vector_that_does_not_fit_is_refused_and_may_be_corrected(make_cohort, vector):
    cohort = make_cohort(3)
    a_round = cohort.round(cohort.context(ring_bits=20)).advertise().share()
    name = cohort.ids[0]
    with pytest.raises(ParameterError):
        a_round.clients[name].mask(a_round.inboxes[name], vector)
    assert a_round.clients[name].state is ClientState.SHARED
    total = a_round.mask().confirm().unmask().server.aggregate()
    assert (total == a_round.plain_sum(cohort.ids)).all()


def test_a_client_serves_one_round_in_one_order(make_cohort):
    """Every method in every state but its own raises, and changes nothing."""
    cohort = make_cohort(3)
    a_round = cohort.round()
    client = a_round.clients[cohort.ids[0]]
    states = list(ClientState)[:5]
    short = np.zeros(1, dtype=np.uint32)
    calls = {
        "advertise": client.advertise,
        "share": lambda: client.share_keys(a_round.directory),
        "mask": lambda: client.mask(b"", a_round.vectors[cohort.ids[0]]),
        "confirm": lambda: client.confirm(a_round.survivor_list),
        "unmask": lambda: client.unmask(a_round.confirmations),
    }
    for number, phase in enumerate(PHASES):
        assert client.state is states[number]
        for other, call in calls.items():
            if other != phase:
                with pytest.raises(ProtocolStateError):
                    call()
        if phase != "mask":
            with pytest.raises(ProtocolStateError):
                client.mask(b"", short)
        assert client.state is states[number]
        getattr(a_round, phase)()
    assert client.state is ClientState.FINISHED
    for call in calls.values():
        with pytest.raises(ProtocolStateError):
            call()


def test_a_server_serves_one_round_in_one_order(make_cohort):
    cohort = make_cohort(3)
    a_round = cohort.round()
    server, name = a_round.server, cohort.ids[0]
    closing = {
        "advertise": server.publish_keys,
        "share": server.route_shares,
        "mask": server.publish_survivors,
        "confirm": server.publish_confirmations,
        "unmask": server.aggregate,
    }
    receiving = {
        "advertise": server.receive_advertisement,
        "share": server.receive_shares,
        "mask": server.receive_masked,
        "confirm": server.receive_confirmation,
        "unmask": server.receive_unmasking,
    }
    for number, phase in enumerate(PHASES):
        for other in PHASES:
            if other != phase:
                with pytest.raises(ProtocolStateError):
                    closing[other]()
                with pytest.raises(ProtocolStateError):
                    receiving[other](name, b"")
        assert server.state is list(ServerState)[number]
        getattr(a_round, phase)()
    server.aggregate()
    assert server.state is ServerState.FINISHED
    for call in closing.values():
        with pytest.raises(ProtocolStateError):
            call()


@pytest.mark.parametrize("phase", PHASES)
def test_a_second_message_of_one_client_is_refused_and_changes_nothing(make_cohort, phase):
    """A second masked vector, added, would ruin the sum; subtracted from a replay it would be a way to one vector."""
    cohort = make_cohort(4)
    a_round = cohort.round()
    receive = getattr(a_round.server, RECEIVERS[phase])

    def received_twice(name, message, receive=receive):
        receive(name, message)
        with pytest.raises(DuplicateMessage):
            receive(name, message)

    setattr(a_round.server, receive.__name__, received_twice)
    assert (_run(a_round, [NEVER] * 4) == a_round.plain_sum(cohort.ids)).all()


@pytest.mark.parametrize("phase", PHASES[:-1])
def test_who_was_silent_in_one_phase_is_not_heard_in_the_next(make_cohort, phase):
    cohort = make_cohort(4)
    number = PHASES.index(phase)
    a_round = cohort.round()
    for done in PHASES[:number]:
        getattr(a_round, done)()
    silent, rest = cohort.ids[0], cohort.ids[1:]
    getattr(a_round, phase)(rest)
    receive = {
        "advertise": a_round.server.receive_shares,
        "share": a_round.server.receive_masked,
        "mask": a_round.server.receive_confirmation,
        "confirm": a_round.server.receive_unmasking,
    }
    with pytest.raises(UnknownSender):
        receive[phase](silent, b"")
    with pytest.raises(UnknownSender):
        receive[phase]("stranger", b"")


@pytest.mark.parametrize("phase", PHASES)
def test_any_altered_byte_of_a_client_s_message_is_noticed_by_the_server(make_cohort, phase):
    """The message is ignored; the genuine one still counts, and the sum is exact."""
    cohort = make_cohort(3)
    a_round = cohort.round()
    name = RECEIVERS[phase]
    receive = getattr(a_round.server, name)

    def noisy(client_id, message):
        for position in range(len(message)):
            altered = message[:position] + bytes([message[position] ^ 1]) + message[position + 1 :]
            with pytest.raises(MessageError):
                receive(client_id, altered)
        receive(client_id, message)

    setattr(a_round.server, name, noisy)
    assert (_run(a_round, [NEVER] * 3) == a_round.plain_sum(cohort.ids)).all()


@pytest.mark.parametrize("phase", PHASES[1:])
def test_any_altered_byte_of_a_server_s_message_ends_in_a_typed_error(make_cohort, phase):
    """Altered on the way to one client: it stops, or the server hears a message that it cannot use."""
    cohort = make_cohort(3)
    name = cohort.ids[0]

    def prepared():
        a_round = cohort.round()
        for done in PHASES[: PHASES.index(phase)]:
            getattr(a_round, done)()
        return a_round

    def exchange(a_round, message):
        a_round.hand_in(phase, name, a_round.answer(phase, name, message))

    size = len(prepared().server_message(phase, name))
    for position in range(0, size, 1 if size < 200 else 7):
        a_round = prepared()
        message = a_round.server_message(phase, name)
        altered = message[:position] + bytes([message[position] ^ 1]) + message[position + 1 :]
        with pytest.raises((MessageError, ProtocolAbort)):
            exchange(a_round, altered)
    intact = prepared()
    exchange(intact, intact.server_message(phase, name))


def test_a_message_handed_in_under_another_name_is_refused(make_cohort):
    cohort = make_cohort(3)
    a_round = cohort.round()
    one, other, _ = cohort.ids
    with pytest.raises(UnknownSender):
        a_round.server.receive_advertisement(one, a_round.clients[other].advertise())


def test_discarding_wipes_every_secret_a_client_holds(make_cohort):
    cohort = make_cohort(4)
    a_round = cohort.round().advertise().share()
    client = a_round.clients[cohort.ids[0]]
    client.mask(a_round.inboxes[cohort.ids[0]], a_round.vectors[cohort.ids[0]])
    shares = [share for pair in client._held_shares.values() for share in pair]
    assert any(any(share) for share in shares)
    client.discard()
    client.discard()
    assert not any(any(share) for share in shares)
    assert client.state is ClientState.ABORTED


def test_own_secrets_are_wiped_once_the_vector_is_masked(make_cohort):
    cohort = make_cohort(4)
    a_round = cohort.round().advertise().share()
    client = a_round.clients[cohort.ids[0]]
    secrets = [client._channel.private, client._mask.private, client._seed, *client._channel_secrets.values()]
    assert all(any(secret) for secret in secrets)
    a_round.mask()
    assert not any(any(secret) for secret in secrets)
    assert not client._channel_secrets


@pytest.mark.parametrize("phases", [0, 1, 2])
def test_discarding_wipes_keys_and_seed_before_they_have_served(make_cohort, phases):
    cohort = make_cohort(4)
    a_round = cohort.round()
    for phase in PHASES[:phases]:
        getattr(a_round, phase)()
    client = a_round.clients[cohort.ids[0]]
    secrets = [client._channel.private, client._mask.private, client._seed, *client._channel_secrets.values()]
    client.discard()
    assert not any(any(secret) for secret in secrets)


def test_shares_are_wiped_once_they_are_sealed(make_cohort, monkeypatch):
    cohort = make_cohort(4)
    made = []

    def remembering(*arguments, **settings):
        made.append(split(*arguments, **settings))
        return made[-1]

    monkeypatch.setattr("fedpt_secure.crypto.client.split", remembering)
    a_round = cohort.round().advertise()
    a_round.clients[cohort.ids[0]].share_keys(a_round.directory)
    assert [[any(share) for share in shares] for shares in made] == [[True, False, False, False]] * 2


def test_a_server_refuses_another_roster_than_the_round_names(make_cohort):
    cohort = make_cohort(4)
    with pytest.raises(ParameterError, match="another roster"):
        SecAggServer(context=cohort.context(), roster=make_cohort(5).roster)


def test_discarding_a_finished_client_leaves_it_finished(make_cohort):
    cohort = make_cohort(3)
    a_round = cohort.round().advertise().share().mask().confirm().unmask()
    client = a_round.clients[cohort.ids[0]]
    client.discard()
    assert client.state is ClientState.FINISHED


def _sparse_round(cohort):
    """Sixteen clients on a sparse ring, masked; a quorum of eleven and a threshold of five among nine holders."""
    context = cohort.context(degree=8, threshold=5, minimum_survivors=11)
    return cohort.round(context).advertise().share().mask()


def test_the_server_asks_for_no_shares_without_a_quorum(make_cohort):
    """Ten confirmations, where the clients will insist on eleven; everybody's holders are among the ten."""
    cohort = make_cohort(16)
    a_round = _sparse_round(cohort)
    ring = [cohort.ids[member] for member in a_round.server._directory.graph._ring]
    silent = {ring[place] for place in (0, 3, 6, 9, 12, 14)}
    with pytest.raises(BelowThreshold, match="the round needs 11"):
        a_round.confirm(name for name in cohort.ids if name not in silent)


def test_the_server_asks_for_no_shares_when_one_client_s_holders_are_silent(make_cohort):
    """Eleven confirmations, but four holders where five are needed: the sum could not be opened."""
    cohort = make_cohort(16)
    a_round = _sparse_round(cohort)
    ring = [cohort.ids[member] for member in a_round.server._directory.graph._ring]
    silent = set(ring[:5])
    with pytest.raises(BelowThreshold, match="only 4 confirmed"):
        a_round.confirm(name for name in cohort.ids if name not in silent)


@pytest.mark.parametrize("phase", ["advertise", "share", "mask"])
def test_the_server_itself_keeps_to_the_minimum_in_every_phase(make_cohort, phase):
    """Five of six, where six must be and the threshold is four; no client is asked."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=4, minimum_survivors=6))
    for done in PHASES[: PHASES.index(phase)]:
        getattr(a_round, done)()
    for name in cohort.ids[1:]:
        a_round.hand_in(phase, name, a_round.answer(phase, name, a_round.server_message(phase, name)))
    with pytest.raises(BelowThreshold, match="5 of 6 clients"):
        a_round.close(phase)
    assert a_round.server.state is ServerState.ABORTED
