"""Who is there: only the roster's own client can say so, for this question only."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpt_secure.crypto import Hello, Identity, MalformedMessage, MessageError, Presence, Roster, proven_id

ALICE, BOB, STRANGER = (Identity(bytes([number]) * 32) for number in (1, 2, 3))
ROSTER = Roster({"alice": ALICE.verify_key_bytes, "bob": BOB.verify_key_bytes})
HELLO = Hello(bytes(16), b"c" * 32, ROSTER.digest, b"n" * 32)
FIELDS = ("run_id", "config_digest", "roster_digest", "nonce")


def test_a_client_of_the_roster_proves_its_id():
    answer = Presence.sign(Hello.from_bytes(HELLO.to_bytes()), "alice", ALICE).to_bytes()
    assert proven_id(answer, HELLO, ROSTER) == "alice"


@pytest.mark.parametrize(("name", "identity"), [("alice", BOB), ("alice", STRANGER), ("carol", STRANGER)])
def test_nobody_proves_anothers_id(name, identity):
    with pytest.raises(MessageError):
        proven_id(Presence.sign(HELLO, name, identity).to_bytes(), HELLO, ROSTER)


@pytest.mark.parametrize("field", FIELDS)
def test_an_answer_to_another_question_proves_nothing(field):
    import msgspec

    other = msgspec.structs.replace(HELLO, **{field: b"x" * len(getattr(HELLO, field))})
    with pytest.raises(MessageError):
        proven_id(Presence.sign(other, "alice", ALICE).to_bytes(), HELLO, ROSTER)


@pytest.mark.parametrize("field", FIELDS)
def test_a_hello_with_a_field_of_another_size_is_malformed(field):
    import msgspec

    with pytest.raises(MalformedMessage, match=field):
        Hello.from_bytes(msgspec.structs.replace(HELLO, **{field: b"short"}).to_bytes())


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_bytes_from_anywhere_are_refused_or_canonical(content):
    for decode in (Hello.from_bytes, lambda encoded: proven_id(encoded, HELLO, ROSTER)):
        with pytest.raises(MessageError):
            decode(content)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_an_answer_with_one_changed_byte_proves_nothing(data):
    answer = bytearray(Presence.sign(HELLO, "alice", ALICE).to_bytes())
    place = data.draw(st.integers(0, len(answer) - 1))
    answer[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(MessageError):
        proven_id(bytes(answer), HELLO, ROSTER)
