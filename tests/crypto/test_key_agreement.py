import pytest

from fedpt_secure.crypto import UnsafePublicKey
from fedpt_secure.crypto.key_agreement import (
    KeyPair,
    check_public_key,
    pair_mask_key,
    seal_key,
    self_mask_commitment,
    self_mask_key,
    shared_secret,
)

P = 2**255 - 19
LOW_ORDER = [
    0,
    1,
    P - 1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
]
ENCODINGS = [u + shift for u in LOW_ORDER for shift in (0, P) if u + shift < 2**255]


@pytest.mark.parametrize("u", ENCODINGS + [u + 2**255 for u in ENCODINGS], ids=hex)
def test_low_order_points_are_refused_in_every_encoding(u):
    public = u.to_bytes(32, "little")
    with pytest.raises(UnsafePublicKey):
        check_public_key(public)
    with pytest.raises(UnsafePublicKey):
        shared_secret(b"\x11" * 32, public)


def test_low_order_points_are_refused_by_their_zero_secret_too(monkeypatch):
    """The table of points is not the only guard: with it gone, the zero result of X25519 is noticed."""
    monkeypatch.setattr("fedpt_secure.crypto.key_agreement.check_public_key", lambda public: None)
    for u in ENCODINGS:
        with pytest.raises(UnsafePublicKey):
            shared_secret(b"\x11" * 32, u.to_bytes(32, "little"))


def test_a_second_encoding_of_an_honest_key_is_refused():
    public = int.from_bytes(KeyPair(bytearray(b"k" * 32)).public, "little")
    check_public_key(public.to_bytes(32, "little"))
    second = (public + 2**255).to_bytes(32, "little")
    with pytest.raises(UnsafePublicKey):
        check_public_key(second)
    with pytest.raises(UnsafePublicKey):
        shared_secret(b"\x11" * 32, second)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_key_of_another_length_is_refused(length):
    with pytest.raises(UnsafePublicKey):
        check_public_key(b"\x09" * length)


PAIR = {
    "session_digest": b"s" * 32,
    "directory_digest": b"d" * 32,
    "model_digest": b"m" * 32,
    "one": "alice",
    "other": "bob",
}


def test_both_ends_derive_the_same_mask_key():
    alice, bob = KeyPair(bytearray(b"a" * 32)), KeyPair(bytearray(b"b" * 32))
    at_alice = pair_mask_key(shared_secret(alice.private, bob.public), **PAIR)
    at_bob = pair_mask_key(shared_secret(bob.private, alice.public), **PAIR | {"one": "bob", "other": "alice"})
    assert at_alice == at_bob


@pytest.mark.parametrize("name", list(PAIR))
def test_the_mask_key_depends_on_everything_it_is_bound_to(name):
    other = "eve" if isinstance(PAIR[name], str) else b"x" * 32
    secret = bytearray(b"z" * 32)
    assert pair_mask_key(secret, **PAIR) != pair_mask_key(secret, **PAIR | {name: other})


def test_each_direction_of_a_pair_has_its_own_sealing_key():
    secret = bytearray(b"z" * 32)
    session = {"session_digest": b"s" * 32, "directory_digest": b"d" * 32}
    there = seal_key(secret, sender="alice", receiver="bob", **session)
    back = seal_key(secret, sender="bob", receiver="alice", **session)
    assert there != back


def test_the_commitment_to_a_seed_is_not_its_mask_key_and_depends_on_seed_session_and_owner():
    seed = bytearray(b"z" * 32)
    commitment = self_mask_commitment(seed, session_digest=b"s" * 32, owner="alice")
    key = self_mask_key(
        seed, session_digest=b"s" * 32, directory_digest=b"d" * 32, model_digest=b"m" * 32, owner="alice"
    )
    others = {
        self_mask_commitment(bytearray(b"y" * 32), session_digest=b"s" * 32, owner="alice"),
        self_mask_commitment(seed, session_digest=b"t" * 32, owner="alice"),
        self_mask_commitment(seed, session_digest=b"s" * 32, owner="bob"),
    }
    assert len({commitment, key, *others}) == 5
