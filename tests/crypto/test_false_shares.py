"""Clients that lie to the server about shares: the round ends with a name, never with a wrong sum."""

import msgspec
import pytest

from fedpt_secure.crypto import (
    BelowThreshold,
    MalformedMessage,
    ProtocolStateError,
    ReconstructionFailed,
    ServerState,
    ShareRejected,
    SignatureInvalid,
)
from fedpt_secure.crypto import client as client_module
from fedpt_secure.crypto import messages as m
from fedpt_secure.crypto import server as server_module
from fedpt_secure.crypto.directory import Directory
from fedpt_secure.crypto.shamir import SHARE_BYTES


def _falsified(cohort, a_round, name, change):
    """The unmasking message of `name` with its shares changed and signed again by its own identity."""
    context = a_round.context
    message = m.decode(a_round.clients[name].unmask(a_round.confirmations), m.Unmasking, context, body_bytes=1 << 16)
    shares = change(message.shares)
    directory = Directory.from_bytes(a_round.directory, context, cohort.roster)
    to_sign = m.unmasking_to_sign(
        context,
        directory=directory.digest,
        sender=message.sender,
        sharers=m.encode_set(map(context.index_of, a_round.server.sharers), context),
        survivors=m.encode_set(map(context.index_of, a_round.server.survivors), context),
        shares=shares,
    )
    signature = cohort.identities[name].sign(to_sign)
    return m.encode(msgspec.structs.replace(message, shares=shares, signature=signature))


def _flip(owner):
    """Change the last byte of the share of the client at position `owner`."""

    def change(shares):
        altered = bytearray(shares)
        altered[owner * SHARE_BYTES + SHARE_BYTES - 1] ^= 1
        return bytes(altered)

    return change


class _EqualToAnything:
    def __eq__(self, _other):
        return True

    __hash__ = None


def _round_with_a_liar(cohort, kind, *, threshold):
    """Client 1 lies about client 0, a survivor or a dropout; everybody else answers."""
    survivors = cohort.ids if kind == "seed" else cohort.ids[1:]
    a_round = cohort.round(cohort.context(threshold=threshold)).advertise().share().mask(survivors).confirm(survivors)
    liar = cohort.ids[1]
    a_round.server.receive_unmasking(liar, _falsified(cohort, a_round, liar, _flip(0)))
    a_round.unmask(name for name in survivors if name != liar)
    return a_round, survivors


@pytest.mark.parametrize("kind", ["seed", "mask key"])
def test_one_false_share_is_outvoted_and_named_where_there_are_more_than_the_threshold(make_cohort, kind):
    cohort = make_cohort(6)
    a_round, survivors = _round_with_a_liar(cohort, kind, threshold=4)
    assert (a_round.server.aggregate() == a_round.plain_sum(survivors)).all()
    assert a_round.server.disputed_holders == (cohort.ids[1],)


def test_no_liar_is_named_where_nobody_lied(make_cohort):
    cohort = make_cohort(4)
    a_round = cohort.round().advertise().share().mask().confirm().unmask()
    a_round.server.aggregate()
    assert a_round.server.disputed_holders == ()


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("kind", ["seed", "mask key"])
def test_a_false_share_among_no_more_than_the_threshold_ends_the_round(make_cohort, monkeypatch, kind, guarded):
    """Without the check against the commitment or the public key the sum comes out, and is wrong."""
    cohort = make_cohort(4)
    a_round, survivors = _round_with_a_liar(cohort, kind, threshold=4 if kind == "seed" else 3)
    if guarded:
        with pytest.raises(ReconstructionFailed) as caught:
            a_round.server.aggregate()
        assert caught.value.owner == cohort.ids[0]
        assert cohort.ids[1] in caught.value.holders
        assert a_round.server.state is ServerState.ABORTED
        with pytest.raises(ProtocolStateError):
            a_round.server.aggregate()
        return
    monkeypatch.setattr(server_module, "self_mask_commitment", lambda *_args, **_more: _EqualToAnything())
    monkeypatch.setattr(server_module, "public_key", lambda _private: _EqualToAnything())
    assert (a_round.server.aggregate() != a_round.plain_sum(survivors)).any()


def test_a_client_that_seals_garbage_stops_its_peers_not_the_truth(make_cohort):
    """A corrupt client can end a round, and nothing more: its peers abort, the server finds too few."""
    cohort = make_cohort(4)
    a_round = cohort.round(cohort.context(threshold=3)).advertise()
    name, context = cohort.ids[0], a_round.context
    message = m.decode(a_round.clients[name].share_keys(a_round.directory), m.SealedShares, context, body_bytes=1 << 16)
    garbage = bytes(len(message.sealed))
    directory = Directory.from_bytes(a_round.directory, context, cohort.roster)
    to_sign = m.shares_to_sign(context, directory=directory.digest, sender=0, sealed=garbage)
    forged = msgspec.structs.replace(message, sealed=garbage, signature=cohort.identities[name].sign(to_sign))
    a_round.server.receive_shares(name, m.encode(forged))
    a_round.share(cohort.ids[1:])
    for peer in cohort.ids[1:]:
        with pytest.raises(ShareRejected):
            a_round.clients[peer].mask(a_round.inboxes[peer], a_round.vectors[peer])
    with pytest.raises(BelowThreshold):
        a_round.server.publish_survivors()


def test_shares_of_another_secret_than_the_committed_one_end_the_round(make_cohort, monkeypatch):
    """The owner itself lies, consistently, to all its holders."""
    cohort = make_cohort(4)
    a_round = cohort.round(cohort.context(threshold=3)).advertise()
    liar = a_round.clients[cohort.ids[0]]
    genuine = bytearray(liar._seed)
    liar._seed = bytearray(b"another".ljust(32))
    shared = liar.share_keys(a_round.directory)
    liar._seed = genuine
    a_round.server.receive_shares(cohort.ids[0], shared)
    a_round.share(cohort.ids[1:]).mask().confirm().unmask()
    with pytest.raises(ReconstructionFailed) as caught:
        a_round.server.aggregate()
    assert caught.value.owner == cohort.ids[0]


def test_a_share_outside_the_field_is_refused_at_the_door(make_cohort):
    cohort = make_cohort(3)
    a_round = cohort.round().advertise().share().mask().confirm()
    name = cohort.ids[0]
    message = _falsified(cohort, a_round, name, lambda shares: b"\xff" * SHARE_BYTES + shares[SHARE_BYTES:])
    with pytest.raises(MalformedMessage, match="no share of"):
        a_round.server.receive_unmasking(name, message)


@pytest.mark.parametrize("change", [lambda shares: b"", lambda shares: shares[SHARE_BYTES:], lambda s: s + s])
def test_another_number_of_shares_is_refused(make_cohort, change):
    """Among them: two shares of every peer, for which the format has no room."""
    cohort = make_cohort(3)
    a_round = cohort.round().advertise().share().mask().confirm()
    with pytest.raises(MalformedMessage):
        a_round.server.receive_unmasking(cohort.ids[0], _falsified(cohort, a_round, cohort.ids[0], change))


def test_shares_released_for_another_survivor_list_are_refused(make_cohort, monkeypatch):
    """The kind of a share follows from the list.

    Under another list the same bytes would be taken for the other kind.
    """
    cohort = make_cohort(4)
    a_round = cohort.round(cohort.context(threshold=3)).advertise().share().mask().confirm()
    name = cohort.ids[0]
    client = a_round.clients[name]
    monkeypatch.setattr(client_module.SecAggClient, "_check_confirmations", lambda *_: None)
    client._survivors = (0, 1, 2)
    with pytest.raises(SignatureInvalid):
        a_round.server.receive_unmasking(name, client.unmask(a_round.confirmations))


def test_owners_that_deal_false_shares_cannot_silence_those_they_dealt_them_to(make_cohort, monkeypatch):
    """Client 0 deals client 1 a false share, client 3 deals client 2 one. Both are outvoted, and the sum is exact.

    Were client 1 not heard any more after the first, client 3's seed could not be rebuilt: five of the six shares are
    needed, and client 2's is false. The shares do not say who lied, so both holders are only called disputed.
    """
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=5)).advertise()
    genuine, framed = client_module.split, {0: 1, 3: 2}
    for position, name in enumerate(cohort.ids):

        def dealing(*arguments, position=position, **settings):
            shares = genuine(*arguments, **settings)
            if position in framed:
                shares[framed[position]][-1] ^= 1
            return shares

        monkeypatch.setattr(client_module, "split", dealing)
        a_round.server.receive_shares(name, a_round.clients[name].share_keys(a_round.directory))
    a_round.close("share")
    total = a_round.mask().confirm().unmask().server.aggregate()
    assert (total == a_round.plain_sum(cohort.ids)).all()
    assert a_round.server.disputed_holders == (cohort.ids[1], cohort.ids[2])


def test_two_false_shares_of_one_owner_end_the_round(make_cohort, monkeypatch):
    """One is outvoted, two are not: the owner and the holders whose shares were used are named."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=4)).advertise().share().mask().confirm()
    for name in cohort.ids[1:3]:
        a_round.server.receive_unmasking(name, _falsified(cohort, a_round, name, _flip(0)))
    a_round.unmask([cohort.ids[0], *cohort.ids[3:]])
    with pytest.raises(ReconstructionFailed) as caught:
        a_round.server.aggregate()
    assert caught.value.owner == cohort.ids[0]
    assert set(caught.value.holders) == set(cohort.ids[:4])
