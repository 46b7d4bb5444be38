import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpt_secure.crypto import Identity, ParameterError, Roster, SignatureInvalid, identities

KEY = Identity(b"1" * 32).verify_key_bytes
OTHER_KEY = Identity(b"2" * 32).verify_key_bytes


def test_an_identity_does_not_show_its_seed():
    assert (b"1" * 32).hex() not in repr(Identity(b"1" * 32))


def test_a_roster_survives_its_file_byte_for_byte(tmp_path):
    roster = Roster({"b": KEY, "a": OTHER_KEY})
    path = tmp_path / "roster.json"
    roster.save(path)
    loaded = Roster.load(path)
    assert loaded == roster
    assert loaded.digest == roster.digest
    assert loaded.to_json() == path.read_bytes()
    assert list(loaded) == ["a", "b"]


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(min_size=1, max_size=8).filter(str.isprintable), st.integers(0, 2**32), min_size=1))
def test_any_roster_round_trips_through_json(numbers):
    try:
        keys = {name: Identity(name.encode().ljust(32, b"\0")).verify_key_bytes for name in numbers}
    except (UnicodeEncodeError, ParameterError):
        return
    roster = Roster(keys)
    assert Roster.from_json(roster.to_json()).digest == roster.digest


def test_the_digest_depends_on_every_id_and_key_but_not_on_their_order():
    one = Roster({"a": KEY, "b": OTHER_KEY})
    assert one.digest == Roster({"b": OTHER_KEY, "a": KEY}).digest
    assert len({one.digest, Roster({"a": OTHER_KEY, "b": KEY}).digest, Roster({"a": KEY}).digest}) == 3


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"": KEY},
        {"a\n": KEY},
        {"x" * 129: KEY},
        {"\ud800": KEY},
        {"a": KEY[:31]},
        {"a": bytes(32)},
        {"a": b"\x01" + bytes(31)},
        {"a": b"\xff" * 32},
        {"a": KEY, "b": KEY},
    ],
    ids=["empty", "no id", "control", "long", "surrogate", "short", "low order", "identity", "no point", "twice"],
)
def test_a_roster_refuses_what_is_no_identity(keys):
    with pytest.raises(ParameterError):
        Roster(keys)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"format": "x", "clients": []}', b"[" * 100_000])
def test_what_is_no_roster_file_is_refused(content):
    with pytest.raises(ParameterError):
        Roster.from_json(content)


def test_a_roster_file_with_repeated_ids_or_sloppy_keys_is_refused():
    entry = {"id": "a", "verify_key": KEY.hex()}
    for clients in ([entry, entry], [entry | {"verify_key": KEY.hex().upper()}], [entry | {"role": "admin"}]):
        content = json.dumps({"format": "fedpt-secure roster v1", "clients": clients}, indent=2).encode() + b"\n"
        with pytest.raises(ParameterError):
            Roster.from_json(content)


@pytest.mark.parametrize("remembered", [0, 1, 8])
def test_a_signature_counts_only_for_its_signer_message_and_roster(remembered):
    signer = Identity(b"1" * 32)
    roster = Roster({"a": KEY, "b": OTHER_KEY}, remembered=remembered)
    signature = signer.sign(b"message")
    roster.verify("a", b"message", signature)
    for name, message, candidate in (
        ("b", b"message", signature),
        ("a", b"other", signature),
        ("stranger", b"message", signature),
        ("a", b"message", signature[:-1]),
        ("a", b"message", bytes(64)),
    ):
        with pytest.raises(SignatureInvalid):
            roster.verify(name, message, candidate)


def test_remembered_signatures_are_verified_once_and_refusals_every_time(monkeypatch):
    verified = []

    def counted(key, message, signature, check=identities._require_signed):
        verified.append(message)
        check(key, message, signature)

    monkeypatch.setattr(identities, "_require_signed", counted)
    signature = Identity(b"1" * 32).sign(b"message")
    for remembered, times in ((0, 3), (8, 1)):
        roster = Roster({"a": KEY}, remembered=remembered)
        verified.clear()
        for _ in range(3):
            roster.verify("a", b"message", signature)
        assert len(verified) == times
        for _ in range(2):
            with pytest.raises(SignatureInvalid):
                roster.verify("a", b"other", signature)
        assert verified.count(b"other") == 2
