"""An actively malicious server, one attack a test. Each must end at the client with the right error.

Where a test is parametrised by `guarded`, the check that stops the attack is also taken out, and the attack
must then succeed: otherwise the test would prove nothing about the check. What success means is spelled out
in each test; where it can be, it is the victim's vector in the clear.
"""

import msgspec
import pytest

from fedpt_secure.attacks.protocol.adversary import Adversary
from fedpt_secure.crypto import (
    BelowThreshold,
    ClientPolicy,
    ClientState,
    DuplicateKey,
    Identity,
    OwnKeysMissing,
    ParameterError,
    PolicyViolation,
    ProtocolStateError,
    Roster,
    RoundContext,
    SecAggClient,
    SecAggServer,
    ShareRejected,
    SignatureInvalid,
    SurvivorsRejected,
    TranscriptMismatch,
    UnsafePublicKey,
    WrongSession,
    key_agreement,
)
from fedpt_secure.crypto import directory as directory_module
from fedpt_secure.crypto import masks as masks_module
from fedpt_secure.crypto import messages as m
from fedpt_secure.crypto.directory import Directory
from fedpt_secure.crypto.key_agreement import KeyPair, pair_mask_key, self_mask_key, shared_secret
from fedpt_secure.crypto.neighbours import mask_sign
from fedpt_secure.crypto.packing import unpack
from fedpt_secure.crypto.prg import apply_masks
from fedpt_secure.crypto.sealing import SEALED_BYTES, associated_data, unseal
from fedpt_secure.crypto.shamir import reconstruct


def _split_lists(cohort, a_round):
    """Six clients, threshold and minimum 4.

    Every client sees a list of four that holds it, and no list is shown twice, so that the mask keys of the
    first three and the seeds of the last three are released four times each.
    """
    ids = cohort.ids
    left_out = {0: (1, 2), 1: (0, 2), 2: (0, 1), 3: (0, 1), 4: (1, 2), 5: (0, 2)}
    adversary = Adversary(a_round, cohort.roster)
    lists = {
        ids[viewer]: [name for position, name in enumerate(ids) if position not in out]
        for viewer, out in left_out.items()
    }
    signatures = {name: adversary.confirm(name, shown) for name, shown in lists.items()}
    for name, shown in lists.items():
        adversary.unmask(name, shown, {other: signatures[other] for other in shown})
    return adversary.open(ids[3:]), a_round.plain_sum(ids[3:])


@pytest.mark.parametrize("guarded", [True, False])
def test_different_survivor_lists_do_not_open_a_sum_below_the_minimum(make_cohort, monkeypatch, guarded):
    """Success: the sum of three clients where every client insists on four."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=4, minimum_survivors=4)).advertise().share().mask()
    if guarded:
        with pytest.raises(TranscriptMismatch):
            _split_lists(cohort, a_round)
        assert a_round.clients[cohort.ids[0]].state is ClientState.ABORTED
    else:
        monkeypatch.setattr(SecAggClient, "_check_confirmations", lambda *_: None)
        opened, plain = _split_lists(cohort, a_round)
        assert (opened == plain).all()


@pytest.mark.parametrize("guarded", [True, False])
def test_a_threshold_of_half_the_cohort_would_open_one_vector_to_two_lists(make_cohort, monkeypatch, guarded):
    """Two halves, each told its own list, each with enough signatures of its own. Success: the victim's vector."""
    cohort = make_cohort(6)
    victim, near, far = cohort.ids[0], cohort.ids[:3], cohort.ids[3:]
    context = cohort.context(threshold=3, minimum_survivors=3)
    if guarded:
        with pytest.raises(PolicyViolation, match="two survivor lists"):
            cohort.client(victim, context)
        return
    monkeypatch.setattr(ClientPolicy, "check", lambda *_: None)
    a_round = cohort.round(context).advertise().share().mask()
    adversary = Adversary(a_round, cohort.roster)
    for half in (near, far):
        signatures = {name: adversary.confirm(name, half) for name in half}
        for name in half:
            adversary.unmask(name, half, signatures)
    # Each half gave the seeds of its own members and the mask keys of the other's: every mask of every client is known.
    assert (adversary.open([victim]) == a_round.vectors[victim]).all()


@pytest.mark.parametrize("guarded", [True, False])
def test_a_client_asked_twice_does_not_give_both_shares_of_a_peer(make_cohort, monkeypatch, guarded):
    """First a list with everybody, then one without the victim's peers. Success: the victim's vector in the clear."""
    cohort = make_cohort(4)
    context = cohort.context(threshold=3)
    a_round = cohort.round(context).advertise().share().mask()
    adversary = Adversary(a_round, cohort.roster)
    if not guarded:
        monkeypatch.setattr(SecAggClient, "_require_state", lambda *_: None)
        monkeypatch.setattr(SecAggClient, "_erase_held_shares", lambda *_: None)

    def ask(names):
        signatures = {name: adversary.confirm(name, names) for name in names}
        for name in names:
            adversary.unmask(name, names, signatures)

    ask(cohort.ids)
    if guarded:
        with pytest.raises(ProtocolStateError):
            ask(cohort.ids[:3])
        client = a_round.clients[cohort.ids[0]]
        with pytest.raises(ProtocolStateError):
            client.unmask(b"")
        assert not client._held_shares
    else:
        for left_out in cohort.ids[1:]:
            ask([name for name in cohort.ids if name != left_out])
        victim = cohort.ids[0]
        assert (adversary.open([victim]) == a_round.vectors[victim]).all()


def _with_entry(adversary_round, position, entry):
    """The round's key directory with one entry replaced."""
    message = m.decode(adversary_round.directory, m.KeyDirectory, adversary_round.context, body_bytes=1 << 16)
    entries = bytearray(message.entries)
    entries[position * m.ENTRY_BYTES : (position + 1) * m.ENTRY_BYTES] = entry
    return m.encode(msgspec.structs.replace(message, entries=bytes(entries)))


def _advertisement(context, identity, position, *, channel=None, mask=None):
    """An advertisement signed by `identity`, with keys of one's choice."""
    fields = {
        "sender": position,
        "channel_key": channel or KeyPair(bytearray(b"c" * 32)).public,
        "mask_key": mask or KeyPair(bytearray(b"m" * 32)).public,
        "seed_commitment": bytes(32),
    }
    signature = identity.sign(m.advertisement_to_sign(context, **fields))
    return m.Advertisement(session=context.session_digest, signature=signature, **fields)


@pytest.mark.parametrize("guarded", [True, False])
def test_keys_swapped_by_the_server_are_refused(make_cohort, monkeypatch, guarded):
    """Man in the middle of all key agreements. Success: the server opens a share that was meant for somebody else."""
    cohort = make_cohort(4)
    a_round = cohort.round().advertise()
    context, (victim, impersonated) = a_round.context, cohort.ids[:2]
    own = KeyPair(bytearray(b"c" * 32))
    forged = _advertisement(context, Identity.generate(), 1, channel=own.public)
    directory = _with_entry(a_round, 1, m.directory_entry(forged))
    if guarded:
        with pytest.raises(SignatureInvalid):
            a_round.clients[victim].share_keys(directory)
        return
    monkeypatch.setattr(Roster, "verify", lambda *_: None)
    answer = m.decode(a_round.clients[victim].share_keys(directory), m.SealedShares, context, body_bytes=1 << 16)
    seen = Directory.from_bytes(directory, context, cohort.roster)
    secret = shared_secret(own.private, seen.advertisements[0].channel_key)
    binding = {
        "session_digest": context.session_digest,
        "directory_digest": seen.digest,
        "sender": victim,
        "receiver": impersonated,
    }
    shares = unseal(
        key_agreement.seal_key(secret, **binding),
        answer.sealed[:SEALED_BYTES],
        data=associated_data(point=2, **binding),
        sender=victim,
    )
    assert all(any(share) for share in shares)


def test_a_client_that_is_not_in_the_roster_cannot_be_invented(make_cohort):
    cohort = make_cohort(4)
    with pytest.raises(ParameterError, match="not in the roster"):
        cohort.client(cohort.ids[0], cohort.context(cohort=(*cohort.ids, "sybil")))


def test_another_roster_cannot_be_slipped_in(make_cohort):
    cohort = make_cohort(4)
    keys = dict(cohort.roster) | {"sybil": Identity.generate().verify_key_bytes}
    with pytest.raises(ParameterError, match="another roster"):
        cohort.client(cohort.ids[0], cohort.context(roster_digest=Roster(keys).digest))


def test_an_advertisement_signed_by_another_member_is_refused(make_cohort):
    cohort = make_cohort(4)
    a_round = cohort.round().advertise()
    accomplice = cohort.identities[cohort.ids[3]]
    forged = _advertisement(a_round.context, accomplice, 1)
    with pytest.raises(SignatureInvalid):
        a_round.clients[cohort.ids[0]].share_keys(_with_entry(a_round, 1, m.directory_entry(forged)))


@pytest.mark.parametrize("guarded", [True, False])
def test_advertisements_of_an_earlier_attempt_are_refused(make_cohort, monkeypatch, guarded):
    """Success: the client shares its secrets under keys of another attempt."""
    cohort = make_cohort(4)
    if not guarded:
        signed = m.advertisement_to_sign
        nowhere = cohort.context(attempt=99)
        monkeypatch.setattr(m, "advertisement_to_sign", lambda context, **fields: signed(nowhere, **fields))
        monkeypatch.setattr(
            directory_module, "advertisement_to_sign", lambda context, **fields: signed(nowhere, **fields)
        )
    earlier = cohort.round(cohort.context(attempt=0)).advertise()
    later = cohort.round(cohort.context(attempt=1)).advertise()
    old = Directory.from_bytes(earlier.directory, earlier.context, cohort.roster)
    replayed = _with_entry(later, 1, m.directory_entry(old.advertisements[1]))
    client = later.clients[cohort.ids[0]]
    if guarded:
        with pytest.raises(SignatureInvalid):
            client.share_keys(replayed)
        assert client.state is ClientState.ABORTED
    else:
        assert client.share_keys(replayed)


def test_messages_of_an_earlier_attempt_are_refused_in_every_phase(make_cohort):
    cohort = make_cohort(3)
    name = cohort.ids[0]
    old = cohort.round(cohort.context(attempt=0)).advertise().share().mask().confirm().unmask()
    new = cohort.round(cohort.context(attempt=1))
    server = new.server
    for phase, receive in (
        ("advertise", server.receive_advertisement),
        ("share", server.receive_shares),
        ("mask", server.receive_masked),
        ("confirm", server.receive_confirmation),
        ("unmask", server.receive_unmasking),
    ):
        with pytest.raises(WrongSession):
            receive(name, old.sent[phase][name])
        getattr(new, phase)()
    assert (server.aggregate() == new.plain_sum(cohort.ids)).all()


def test_sealed_shares_of_an_earlier_attempt_do_not_open(make_cohort):
    """The server relabels old sealed shares with the new session."""
    cohort = make_cohort(3)
    name = cohort.ids[0]
    old = cohort.round(cohort.context(attempt=0)).advertise().share()
    new = cohort.round(cohort.context(attempt=1)).advertise().share()
    inbox = m.decode(old.inboxes[name], m.ShareInbox, old.context, body_bytes=1 << 16)
    relabelled = m.encode(msgspec.structs.replace(inbox, session=new.context.session_digest))
    with pytest.raises(ShareRejected):
        new.clients[name].mask(relabelled, new.vectors[name])


def _session_without_model(monkeypatch):
    """Take the model digest out of the session digest."""
    genuine = RoundContext._digest

    def without_model(context):
        blank = object.__new__(RoundContext)
        for name in RoundContext.__slots__:
            if name != "session_digest":
                object.__setattr__(blank, name, getattr(context, name))
        object.__setattr__(blank, "model_digest", bytes(32))
        return genuine(blank)

    monkeypatch.setattr(RoundContext, "_digest", without_model)


def _mask_keys_without_model(monkeypatch):
    """Take the model digest out of the mask keys, on both sides."""
    for name in ("pair_mask_key", "self_mask_key"):
        derive = getattr(key_agreement, name)
        monkeypatch.setattr(
            masks_module,
            name,
            lambda secret, derive=derive, **binding: derive(secret, **binding | {"model_digest": bytes(32)}),
        )


def test_a_client_given_other_weights_is_in_another_session(make_cohort):
    """The server hands the victim's keys on under the session that the others expect; the signature gives it away."""
    cohort = make_cohort(4)
    context, victim = cohort.context(), cohort.ids[0]
    deceived = cohort.client(victim, cohort.context(model_digest=b"planted weights".ljust(32)))
    planted = deceived.advertise()
    a_round = cohort.round(context).advertise()
    with pytest.raises(WrongSession):
        SecAggServer(context=context, roster=cohort.roster).receive_advertisement(victim, planted)
    with pytest.raises(WrongSession):
        deceived.share_keys(a_round.directory)
    advertisement = msgspec.msgpack.decode(planted, type=m.Advertisement)
    with pytest.raises(SignatureInvalid):
        a_round.clients[cohort.ids[1]].share_keys(_with_entry(a_round, 0, m.directory_entry(advertisement)))


@pytest.mark.parametrize("masks_bind_the_model", [True, False])
def test_masks_of_clients_with_different_weights_do_not_cancel(make_cohort, monkeypatch, masks_bind_the_model):
    """Pasquini et al.

    2022: weights that silence all clients but the victim turn the sum into its update. The model digest is in
    the mask keys as well, so that the sum is noise even with the session's own binding gone. Success: the
    exact sum.
    """
    cohort = make_cohort(4)
    _session_without_model(monkeypatch)
    if not masks_bind_the_model:
        _mask_keys_without_model(monkeypatch)
    a_round = cohort.round(cohort.context())
    victim = cohort.ids[0]
    a_round.clients[victim] = cohort.client(victim, cohort.context(model_digest=b"planted weights".ljust(32)))
    total = a_round.advertise().share().mask().confirm().unmask().server.aggregate()
    assert (total == a_round.plain_sum(cohort.ids)).all() == (not masks_bind_the_model)


def test_a_directory_without_the_client_s_own_keys_is_refused(make_cohort):
    cohort = make_cohort(4)
    a_round = cohort.round(cohort.context(threshold=3)).advertise(cohort.ids[1:])
    outsider = a_round.clients[cohort.ids[0]]
    outsider.advertise()
    with pytest.raises(OwnKeysMissing):
        outsider.share_keys(a_round.directory)
    assert outsider.state is ClientState.ABORTED


def test_the_client_s_own_keys_in_another_version_are_refused(make_cohort):
    """Keys that the client signed for the same session in another life, as after a restart without a register."""
    cohort = make_cohort(4)
    context = cohort.context()
    a_round = cohort.round(context).advertise()
    reborn = cohort.client(cohort.ids[0], context)
    reborn.advertise()
    with pytest.raises(OwnKeysMissing):
        reborn.share_keys(a_round.directory)


def test_advertisements_with_a_key_of_another_client_are_refused(make_cohort):
    cohort = make_cohort(4)
    a_round = cohort.round().advertise()
    context = a_round.context
    honest = Directory.from_bytes(a_round.directory, context, cohort.roster).advertisements[0]
    accomplice = cohort.identities[cohort.ids[1]]
    for keys in (
        {"channel": honest.channel_key},
        {"mask": honest.mask_key},
        {"channel": honest.mask_key},
        {"channel": b"\x09".ljust(32, b"\0"), "mask": b"\x09".ljust(32, b"\0")},
    ):
        client = cohort.client(cohort.ids[2], context)
        client.advertise()
        copied = _advertisement(context, accomplice, 1, **keys)
        with pytest.raises(DuplicateKey):
            client.share_keys(_with_entry(a_round, 1, m.directory_entry(copied)))
        fresh = SecAggServer(context=context, roster=cohort.roster)
        fresh.receive_advertisement(cohort.ids[0], a_round.sent["advertise"][cohort.ids[0]])
        with pytest.raises(DuplicateKey):
            fresh.receive_advertisement(cohort.ids[1], m.encode(copied))


@pytest.mark.parametrize("field", ["channel", "mask"])
def test_a_low_order_key_is_refused_by_client_and_server(make_cohort, field):
    cohort = make_cohort(4)
    a_round = cohort.round().advertise()
    planted = _advertisement(a_round.context, cohort.identities[cohort.ids[1]], 1, **{field: b"\x01".ljust(32, b"\0")})
    with pytest.raises(UnsafePublicKey):
        a_round.clients[cohort.ids[0]].share_keys(_with_entry(a_round, 1, m.directory_entry(planted)))
    fresh = SecAggServer(context=a_round.context, roster=cohort.roster)
    with pytest.raises(UnsafePublicKey):
        fresh.receive_advertisement(cohort.ids[1], m.encode(planted))


def test_different_directories_keep_shares_from_opening(make_cohort):
    """Each client is shown a directory of genuine keys, but not the same one."""
    cohort = make_cohort(5)
    a_round = cohort.round(cohort.context(threshold=3)).advertise()
    message = m.decode(a_round.directory, m.KeyDirectory, a_round.context, body_bytes=1 << 16)
    smaller = m.encode(
        m.KeyDirectory(
            session=message.session,
            members=m.encode_set(range(4), a_round.context),
            entries=message.entries[: 4 * m.ENTRY_BYTES],
        )
    )
    one, other = cohort.ids[:2]
    a_round.clients[one].share_keys(smaller)
    answer = a_round.clients[other].share_keys(a_round.directory)
    sealed_for_one = m.decode(answer, m.SealedShares, a_round.context, body_bytes=1 << 16).sealed[:SEALED_BYTES]
    sealed = sealed_for_one + bytes(2 * SEALED_BYTES)
    inbox = m.ShareInbox(session=message.session, sharers=m.encode_set(range(4), a_round.context), sealed=sealed)
    with pytest.raises(ShareRejected):
        a_round.clients[one].mask(m.encode(inbox), a_round.vectors[one])


def test_shares_handed_to_the_wrong_client_or_in_another_order_do_not_open(make_cohort):
    cohort = make_cohort(4)
    a_round = cohort.round().advertise().share()
    one, other = cohort.ids[:2]
    with pytest.raises(ShareRejected):
        a_round.clients[one].mask(a_round.inboxes[other], a_round.vectors[one])
    inbox = m.decode(a_round.inboxes[other], m.ShareInbox, a_round.context, body_bytes=1 << 16)
    first, second = inbox.sealed[:SEALED_BYTES], inbox.sealed[SEALED_BYTES : 2 * SEALED_BYTES]
    swapped = msgspec.structs.replace(inbox, sealed=second + first + inbox.sealed[2 * SEALED_BYTES :])
    with pytest.raises(ShareRejected):
        a_round.clients[other].mask(m.encode(swapped), a_round.vectors[other])


def test_different_lists_of_sharers_are_noticed_before_anything_is_released(make_cohort):
    """One client is told that another never shared its keys, so that their mask would not cancel."""
    cohort = make_cohort(5)
    a_round = cohort.round(cohort.context(threshold=3)).advertise().share()
    deceived, rest = cohort.ids[0], cohort.ids[1:4]
    inbox = m.decode(a_round.inboxes[deceived], m.ShareInbox, a_round.context, body_bytes=1 << 16)
    shorter = msgspec.structs.replace(
        inbox, sharers=m.encode_set(range(4), a_round.context), sealed=inbox.sealed[: 3 * SEALED_BYTES]
    )
    sent = a_round.clients[deceived].mask(m.encode(shorter), a_round.vectors[deceived])
    with pytest.raises(TranscriptMismatch):
        a_round.server.receive_masked(deceived, sent)
    adversary = Adversary(a_round, cohort.roster)
    for name in rest:
        a_round.clients[name].mask(a_round.inboxes[name], a_round.vectors[name])
    shown = cohort.ids[:4]
    signatures = {name: adversary.confirm(name, shown) for name in shown}
    for name in shown:
        with pytest.raises(TranscriptMismatch):
            a_round.clients[name].unmask(adversary.confirmations(signatures))


def test_an_inbox_without_the_client_itself_or_with_outsiders_is_refused(make_cohort):
    cohort = make_cohort(5)
    for sharers in ((1, 2, 3), (0, 1, 2, 4)):
        a_round = cohort.round(cohort.context(threshold=3)).advertise(cohort.ids[:4]).share(cohort.ids[:4])
        name = cohort.ids[0]
        inbox = m.decode(a_round.inboxes[name], m.ShareInbox, a_round.context, body_bytes=1 << 16)
        altered = msgspec.structs.replace(inbox, sharers=m.encode_set(sharers, a_round.context))
        with pytest.raises(TranscriptMismatch):
            a_round.clients[name].mask(m.encode(altered), a_round.vectors[name])


@pytest.mark.parametrize("guarded", [True, False])
def test_a_survivor_list_below_the_minimum_is_refused(make_cohort, monkeypatch, guarded):
    """Success: the sum of two clients, where the round promises four."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=4, minimum_survivors=4)).advertise().share().mask()
    adversary = Adversary(a_round, cohort.roster)
    few = cohort.ids[:2]
    if guarded:
        with pytest.raises(BelowThreshold):
            adversary.confirm(few[0], few)
        return
    monkeypatch.setattr(SecAggClient, "_require_enough", lambda *_: None)
    monkeypatch.setattr(SecAggClient, "_check_confirmations", lambda *_: None)
    for name in cohort.ids:
        shown = sorted({*few, name})
        adversary.confirm(name, shown)
        adversary.unmask(name, shown, {})
    assert (adversary.open(few) == a_round.plain_sum(few)).all()


@pytest.mark.parametrize("guarded", [True, False])
def test_regions_of_a_sparse_graph_cannot_be_shown_different_lists(make_cohort, monkeypatch, guarded):
    """Each half of the ring gets its own list, signed by that half: enough for the neighbours of one in its middle.

    Success: both middles release shares, for different lists.
    """
    cohort = make_cohort(16)
    context = cohort.context(degree=4, threshold=4, minimum_survivors=9)
    a_round = cohort.round(context).advertise().share().mask()
    adversary = Adversary(a_round, cohort.roster)
    ring = [cohort.ids[member] for member in adversary.directory.graph._ring]
    halves = (ring[:8], ring[8:])
    if not guarded:
        monkeypatch.setattr(RoundContext, "quorum", 2)
    released = []
    for half, other in (halves, halves[::-1]):
        shown = [name for name in cohort.ids if name != other[0]]
        signatures = {name: adversary.confirm(name, shown) for name in half}
        middle = a_round.clients[half[4]]
        if guarded:
            with pytest.raises(BelowThreshold, match="8 clients confirmed"):
                middle.unmask(adversary.confirmations(signatures))
        else:
            released.append(middle.unmask(adversary.confirmations(signatures)))
    assert len(released) == (0 if guarded else 2)


def test_too_few_confirmations_release_nothing(make_cohort):
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=4)).advertise().share().mask()
    adversary = Adversary(a_round, cohort.roster)
    signatures = {name: adversary.confirm(name, cohort.ids) for name in cohort.ids}
    three = {name: signatures[name] for name in cohort.ids[:3]}
    with pytest.raises(BelowThreshold, match="3 clients confirmed"):
        a_round.clients[cohort.ids[0]].unmask(adversary.confirmations(three))


def test_confirmations_by_clients_outside_the_list_do_not_count(make_cohort):
    """An accomplice that is not on the list signs it all the same."""
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=4)).advertise().share().mask()
    context, adversary = a_round.context, Adversary(a_round, cohort.roster)
    shown, accomplice = cohort.ids[:4], cohort.ids[5]
    signatures = {name: adversary.confirm(name, shown) for name in shown[:3]}
    statement = m.survivors_to_sign(
        context,
        directory=adversary.directory.digest,
        sharers=m.encode_set(range(6), context),
        survivors=m.encode_set(range(4), context),
    )
    signatures[accomplice] = cohort.identities[accomplice].sign(statement)
    with pytest.raises(TranscriptMismatch, match="not in the survivor list"):
        a_round.clients[shown[0]].unmask(adversary.confirmations(signatures))


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"threshold": 4, "minimum_survivors": 6}, 5, "5 clients survive; the round needs 6"),
        ({"threshold": 5, "minimum_survivors": 2}, 4, "4 of this client's share holders survive; the threshold is 5"),
    ],
    ids=["minimum", "threshold"],
)
def test_threshold_and_minimum_bound_the_survivors_each_on_its_own(make_cohort, changes, size, message):
    cohort = make_cohort(7)
    a_round = cohort.round(cohort.context(**changes)).advertise().share().mask()
    with pytest.raises(BelowThreshold, match=message):
        Adversary(a_round, cohort.roster).confirm(cohort.ids[0], cohort.ids[:size])


def test_a_vector_is_not_masked_against_too_few(make_cohort):
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=4)).advertise().share()
    name = cohort.ids[0]
    inbox = m.decode(a_round.inboxes[name], m.ShareInbox, a_round.context, body_bytes=1 << 16)
    few = msgspec.structs.replace(
        inbox, sharers=m.encode_set(range(3), a_round.context), sealed=inbox.sealed[: 2 * SEALED_BYTES]
    )
    with pytest.raises(BelowThreshold, match="share holders shared keys"):
        a_round.clients[name].mask(m.encode(few), a_round.vectors[name])


def test_a_client_whose_vector_is_called_lost_does_not_help_and_stays_masked(make_cohort):
    """The delay attack.

    The server has the vector, says it has not, and learns the client's mask key from the others. The self
    mask is what stays: with it, known to this test alone, the vector is in the clear.
    """
    cohort = make_cohort(5)
    victim, rest = cohort.ids[0], cohort.ids[1:]
    a_round = cohort.round(cohort.context(threshold=4)).advertise()
    seed = bytearray(a_round.clients[victim]._seed)
    a_round.share().mask()
    adversary = Adversary(a_round, cohort.roster)
    with pytest.raises(SurvivorsRejected):
        adversary.confirm(victim, rest)
    signatures = {name: adversary.confirm(name, rest) for name in rest}
    for name in rest:
        adversary.unmask(name, rest, signatures)
    assert not adversary.seed_shares[0]
    common = {
        "session_digest": a_round.context.session_digest,
        "directory_digest": adversary.directory.digest,
        "model_digest": a_round.context.model_digest,
    }
    sent = m.decode(a_round.sent["mask"][victim], m.MaskedVector, a_round.context, body_bytes=1 << 16)
    stripped = unpack(sent.vector, a_round.context.vector_length, 32)
    private = reconstruct(adversary.key_shares[0], threshold=4)
    for other in range(1, 5):
        secret = shared_secret(private, adversary.directory.advertisements[other].mask_key)
        key = pair_mask_key(secret, one=victim, other=cohort.ids[other], **common)
        apply_masks(stripped, [(-mask_sign(0, other), key)])
    assert (stripped != a_round.vectors[victim]).all()
    apply_masks(stripped, [(-1, self_mask_key(seed, owner=victim, **common))])
    assert (stripped == a_round.vectors[victim]).all()


def test_survivors_that_never_shared_keys_are_refused(make_cohort):
    cohort = make_cohort(6)
    a_round = cohort.round(cohort.context(threshold=4)).advertise().share(cohort.ids[:5]).mask(cohort.ids[:5])
    adversary = Adversary(a_round, cohort.roster)
    with pytest.raises(SurvivorsRejected):
        adversary.confirm(cohort.ids[0], cohort.ids)


def test_a_cohort_shrunk_by_the_server_is_refused(make_cohort):
    cohort = make_cohort(6)
    context = cohort.context(cohort=cohort.ids[:3], threshold=3)
    with pytest.raises(PolicyViolation, match="the cohort is 3"):
        cohort.client(cohort.ids[0], context, policy=ClientPolicy(minimum_cohort=5))


def test_a_directory_below_the_minimum_gets_no_shares(make_cohort):
    """Nothing is split, let alone sent, among too few."""
    cohort = make_cohort(6)
    context = cohort.context(threshold=4, minimum_survivors=5)
    a_round = cohort.round(context)
    few = {name: a_round.clients[name].advertise() for name in cohort.ids[:4]}
    entries = b"".join(
        m.directory_entry(m.decode(advertisement, m.Advertisement, context)) for advertisement in few.values()
    )
    members = m.encode_set(range(4), context)
    directory = m.KeyDirectory(session=context.session_digest, members=members, entries=entries)
    with pytest.raises(BelowThreshold, match="4 clients advertised keys"):
        a_round.clients[cohort.ids[0]].share_keys(m.encode(directory))
    assert not a_round.clients[cohort.ids[0]]._held_shares


def test_after_an_abort_nothing_can_be_had_from_the_client(make_cohort):
    cohort = make_cohort(4)
    a_round = cohort.round().advertise().share().mask()
    client = a_round.clients[cohort.ids[0]]
    shares = [share for pair in client._held_shares.values() for share in pair]
    with pytest.raises(Exception, match="Survivors"):
        client.confirm(b"garbage")
    assert client.state is ClientState.ABORTED
    assert not any(any(share) for share in shares)
    for call in (
        client.advertise,
        lambda: client.share_keys(a_round.directory),
        lambda: client.mask(a_round.inboxes[cohort.ids[0]], a_round.vectors[cohort.ids[0]]),
        lambda: client.confirm(a_round.survivor_list),
        lambda: client.unmask(b""),
    ):
        with pytest.raises(ProtocolStateError):
            call()
