import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpt_secure.crypto import MalformedMessage, MessageError, WrongSession
from fedpt_secure.crypto import messages as m

KINDS = [
    m.Advertisement,
    m.KeyDirectory,
    m.SealedShares,
    m.ShareInbox,
    m.MaskedVector,
    m.Survivors,
    m.Confirmation,
    m.Confirmations,
    m.Unmasking,
]


@pytest.fixture(scope="module")
def context(make_cohort):
    return make_cohort(5).context()


def _sample(kind, context):
    sizes = {"session": 32, "channel_key": 32, "mask_key": 32, "seed_commitment": 32, "signature": 64}
    values = {}
    for field in msgspec.structs.fields(kind):
        if field.name == "sender":
            values[field.name] = 3
        elif field.name == "session":
            values[field.name] = context.session_digest
        else:
            values[field.name] = b"\x01" * sizes.get(field.name, 20)
    return kind(**values)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_message_survives_its_bytes(kind, context):
    message = _sample(kind, context)
    assert m.encode(m.decode(m.encode(message), kind, context)) == m.encode(message)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_other_kind_of_message_is_refused(kind, context):
    encoded = m.encode(_sample(kind, context))
    for other in KINDS:
        if other is not kind:
            with pytest.raises(MalformedMessage):
                m.decode(encoded, other, context)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_only_the_canonical_encoding_is_accepted(kind, context):
    encoded = m.encode(_sample(kind, context))
    values = msgspec.msgpack.decode(encoded)
    padded_array = b"\xdc" + (len(values)).to_bytes(2, "big") + encoded[1:]
    assert msgspec.msgpack.decode(padded_array) == values
    bad = [
        encoded + b"\0",
        encoded[:-1],
        b"",
        padded_array,
        msgspec.msgpack.encode([*values, 1]),
        msgspec.msgpack.encode(values[:-1]),
        msgspec.msgpack.encode(dict(enumerate(values))),
        msgspec.msgpack.encode([str(values[0]), *values[1:]]),
        b"\xdd\xff\xff\xff\xff" + encoded[1:],
        b"\x91" * 100_000,
    ]
    for candidate in bad:
        with pytest.raises(MalformedMessage):
            m.decode(candidate, kind, context, body_bytes=1 << 20)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_message_of_another_session_is_told_apart(kind, context, make_cohort):
    encoded = m.encode(_sample(kind, context))
    for other in (make_cohort(5).context(round_index=1), make_cohort(5).context(model_digest=b"x" * 32)):
        with pytest.raises(WrongSession):
            m.decode(encoded, kind, other)


@pytest.mark.parametrize("field", ["session", "channel_key", "mask_key", "seed_commitment", "signature"])
def test_fields_of_fixed_size_have_that_size(field, context):
    message = _sample(m.Advertisement, context)
    for wrong in (b"", b"\x01" * 31, b"\x01" * 65):
        with pytest.raises(MalformedMessage):
            m.decode(m.encode(msgspec.structs.replace(message, **{field: wrong})), m.Advertisement, context)


@pytest.mark.parametrize("sender", [-1, 5, 2**63])
def test_a_sender_outside_the_cohort_is_refused(sender, context):
    message = msgspec.structs.replace(_sample(m.Confirmation, context), sender=sender)
    with pytest.raises(MalformedMessage):
        m.decode(m.encode(message), m.Confirmation, context)


def test_input_beyond_the_expected_size_is_refused_before_it_is_parsed(context, monkeypatch):
    def parse(*_args, **_kwargs):
        raise AssertionError("the input was parsed")

    monkeypatch.setattr(msgspec.msgpack, "decode", parse)
    with pytest.raises(MalformedMessage, match="at most"):
        m.decode(bytes(10_000), m.Survivors, context)


@pytest.mark.parametrize("wrong", [None, "text", bytearray(b"x"), memoryview(b"x"), 3])
def test_what_is_no_bytes_object_is_refused(wrong, context):
    with pytest.raises(MalformedMessage):
        m.decode(wrong, m.Survivors, context)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_no_bytes_make_a_decoder_fail_otherwise_than_by_its_own_error(data, make_cohort):
    context = make_cohort(5).context()
    kind = data.draw(st.sampled_from(KINDS))
    good = m.encode(_sample(kind, context))
    noise = data.draw(
        st.one_of(
            st.binary(max_size=300),
            st.tuples(st.integers(0, len(good) - 1), st.binary(min_size=1, max_size=9)).map(
                lambda edit: good[: edit[0]] + edit[1] + good[edit[0] + len(edit[1]) :]
            ),
        )
    )
    try:
        decoded = m.decode(noise, kind, context)
    except MessageError:
        return
    assert m.encode(decoded) == noise


@settings(deadline=None, max_examples=100)
@given(st.sets(st.integers(0, 12)))
def test_sets_survive_their_bitmaps(members):
    context = _context_of(13)
    assert m.decode_set(m.encode_set(members, context), context) == tuple(sorted(members))


@pytest.mark.parametrize("bitmap", [b"", b"\x01", b"\x01\x00\x00", b"\x00\x20", b"\xff\xff"])
def test_bitmaps_of_another_size_or_beyond_the_cohort_are_refused(bitmap):
    with pytest.raises(MalformedMessage):
        m.decode_set(bitmap, _context_of(13))


def _context_of(size):
    from fedpt_secure.crypto import RoundContext

    return RoundContext(
        run_id=bytes(16),
        round_index=0,
        cohort=tuple(f"{number:03d}" for number in range(size)),
        roster_digest=bytes(32),
        model_digest=bytes(32),
        vector_length=1,
        threshold=size,
        minimum_survivors=2,
    )


def test_records_of_another_total_size_are_refused():
    assert list(m.split_records(b"aabb", count=2, size=2, what="pairs")) == [b"aa", b"bb"]
    for wrong in (b"", b"aab", b"aabbc"):
        with pytest.raises(MalformedMessage):
            m.split_records(wrong, count=2, size=2, what="pairs")
