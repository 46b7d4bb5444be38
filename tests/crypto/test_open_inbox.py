"""What others may have done wrong comes out before a client computes, and spends, what it would release."""

from __future__ import annotations

import pytest

from fedpt_secure.crypto import ClientState, ProtocolStateError, ShareRejected, TranscriptMismatch


@pytest.fixture
def shared(make_cohort):
    cohort = make_cohort(4)
    return cohort.ids[0], cohort.round(cohort.context(threshold=3)).advertise().share()


def test_a_round_whose_inboxes_are_opened_first_gives_the_same_sum(make_cohort):
    cohort = make_cohort(4)
    a_round = cohort.round(cohort.context(threshold=3)).advertise().share()
    for name, client in a_round.clients.items():
        client.open_inbox(a_round.inboxes[name])
    a_round.mask().confirm().unmask()
    total = sum(vector.astype(object) for vector in a_round.vectors.values()) % (1 << a_round.context.ring_bits)
    assert (a_round.server.aggregate() == total).all()


def test_a_share_that_does_not_open_ends_the_round_before_any_vector(shared):
    name, a_round = shared
    client = a_round.clients[name]
    spoiled = bytearray(a_round.inboxes[name])
    spoiled[-1] ^= 1
    with pytest.raises(ShareRejected):
        client.open_inbox(bytes(spoiled))
    assert client.state is ClientState.ABORTED


def test_the_vector_goes_with_the_inbox_that_was_opened(shared):
    name, a_round = shared
    client = a_round.clients[name]
    client.open_inbox(a_round.inboxes[name])
    other = bytearray(a_round.inboxes[name])
    other[-1] ^= 1
    with pytest.raises(TranscriptMismatch, match="another inbox"):
        client.mask(bytes(other), a_round.vectors[name])
    assert client.state is ClientState.ABORTED


def test_an_inbox_is_opened_once_and_in_its_turn(make_cohort, shared):
    name, a_round = shared
    client = a_round.clients[name]
    client.open_inbox(a_round.inboxes[name])
    with pytest.raises(ProtocolStateError, match="opened before"):
        client.open_inbox(a_round.inboxes[name])
    cohort = make_cohort(4)
    early = cohort.round().advertise().clients[cohort.ids[0]]
    with pytest.raises(ProtocolStateError):
        early.open_inbox(b"")
