"""Identity files: secret, sealed on request, and refused unless they are exactly what was written."""

import errno
import json
import os
import stat

import msgspec
import pytest
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_decrypt

from fedpt_secure.crypto import (
    Identity,
    InsecureDeterministicBytes,
    ParameterError,
    PublicIdentity,
    Roster,
    StoredIdentity,
    create_identity,
    load_identity,
    passphrases,
    roster_of,
    strict_files,
)

WORDS = "correct horse battery"
SEED = InsecureDeterministicBytes(b"seed")(32)


KEY = "76baf5ac8d802154f2a3118c34c2f701227922611ed415dc51865892ba295d8e"
PINNED = {
    "public": {"format": "fedpt-secure public identity v1", "id": "clinic-a", "verify_key": KEY},
    "bare": {"format": "fedpt-secure secret identity v1", "id": "clinic-a", "verify_key": KEY, "seed": SEED.hex()},
    "sealed": {
        "format": "fedpt-secure sealed identity v1",
        "id": "clinic-a",
        "verify_key": KEY,
        "salt": "7fe5ff245f3786842ae1c326002d0574",
        "sealed_seed": "4cf88430689fef3cc20a805b7ffa8a40ff3ba0f39492081edb9eca82dd9f069d"
        "692b932ade19815e3a2e7fecdb0283d1",
    },
}
"""Files that version 0.1 wrote. A version that reads them no longer has to say so by another format."""


def pinned(kind):
    return json.dumps(PINNED[kind], indent=2).encode() + b"\n"


def never():
    raise AssertionError("nobody should be asked")


def new(directory, client_id="clinic-a", **changes):
    return create_identity(client_id, directory, **{"ask_passphrase": None} | changes)


@pytest.fixture(autouse=True)
def _cheap_argon2id(request, monkeypatch):
    """The real cost, half a second and 256 MiB a key, only where it is what is tested."""
    if "stated_cost" not in request.node.name:
        monkeypatch.setattr(passphrases, "_MEMORY_BYTES", 1 << 20)


@pytest.fixture
def sealed():
    return StoredIdentity.make("clinic-a", passphrase=WORDS, random_bytes=InsecureDeterministicBytes(b"seed"))


def test_what_is_written_is_what_is_loaded(tmp_path):
    made = new(tmp_path / "keys")
    own = load_identity(made.secret_path, ask_passphrase=never)
    assert (own.client_id, own.identity.verify_key_bytes) == ("clinic-a", made.public.verify_key)
    assert PublicIdentity.load(made.public_path) == made.public


def test_only_its_owner_may_read_the_secret_file_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        made = new(tmp_path / "keys")
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.secret_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(made.secret_path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_secret_file_that_others_may_open_is_refused(tmp_path, mode):
    made = new(tmp_path)
    made.secret_path.chmod(mode)
    with pytest.raises(ParameterError, match="open to other users") as caught:
        load_identity(made.secret_path, ask_passphrase=never)
    assert "chmod 600" in caught.value.hint


def test_every_identity_is_fresh(tmp_path):
    assert len({new(tmp_path / str(number)).public.verify_key for number in range(20)}) == 20


def test_nothing_is_replaced_and_nothing_is_left_behind(tmp_path):
    made = new(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError):
        new(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    made.public_path.unlink()
    with pytest.raises(FileExistsError):
        new(tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before[made.secret_path]]


def test_a_full_disk_leaves_neither_file(tmp_path, monkeypatch):
    """The disk fails as one of the two files, or the name of one, is flushed."""
    for successes in range(4):
        left = iter([None] * successes)

        def full(_descriptor, left=left):
            if next(left, "full") == "full":
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(strict_files.os, "fsync", full)
            with pytest.raises(OSError, match="No space"):
                new(tmp_path)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("client_id", "name"),
    [("../../etc/passwd", "_._.._etc_passwd"), (".hidden", "_hidden"), ("Klinik Süd", "Klinik_S_d")],
)
def test_an_id_never_leads_out_of_the_directory(tmp_path, client_id, name):
    made = new(tmp_path / "keys", client_id)
    assert made.secret_path.parent == tmp_path / "keys"
    assert made.secret_path.resolve().parent == (tmp_path / "keys").resolve()
    assert not made.secret_path.name.startswith(".")
    assert load_identity(made.secret_path, ask_passphrase=never).client_id == client_id


def test_nobody_is_asked_for_a_passphrase_in_vain(tmp_path):
    new(tmp_path)
    with pytest.raises(FileExistsError):
        new(tmp_path, ask_passphrase=never)
    with pytest.raises(ParameterError):
        new(tmp_path, "a\n", ask_passphrase=never)


@pytest.mark.parametrize("client_id", ["", "a\n", "x" * 129, "\ud800"])
def test_an_id_that_no_roster_takes_makes_no_file(tmp_path, client_id):
    with pytest.raises(ParameterError):
        new(tmp_path / "keys", client_id)
    assert not (tmp_path / "keys").exists()


def test_a_sealed_file_opens_with_its_passphrase_only(sealed):
    assert sealed.is_sealed
    assert sealed.open(lambda: WORDS).identity.verify_key_bytes == sealed.public.verify_key
    with pytest.raises(ParameterError, match="passphrase is wrong"):
        sealed.open(lambda: WORDS + "!")


def test_one_passphrase_however_its_accents_are_composed():
    composed, decomposed = "m\u00fcnchen und s\u00fcden", "mu\u0308nchen und su\u0308den"
    salt = bytes(16)
    box = passphrases.seal_with_passphrase(b"secret", composed, salt=salt, data=b"")
    assert passphrases.open_with_passphrase(box, decomposed, salt=salt, data=b"") == b"secret"


def test_files_of_version_1_are_still_read_and_written():
    bare = StoredIdentity.make("clinic-a", passphrase=None, random_bytes=InsecureDeterministicBytes(b"seed"))
    assert bare.to_json() == pinned("bare")
    assert bare.public.to_json() == pinned("public")
    own = StoredIdentity.from_json(pinned("bare")).open(never)
    assert own.identity.verify_key_bytes.hex() == KEY
    assert roster_of([PublicIdentity.from_json(pinned("public"))]).digest.hex() == (
        "9d1ef4bfbbd6004ebddff228e7fa867e0d3818161a7b15ee7f63e44ad3a6a709"
    )


def test_the_key_is_argon2id_of_the_stated_cost(sealed):
    """Opened by hand, with OpenSSL's Argon2id in the place of libsodium's; and the committed file still opens."""
    assert sealed.to_json() == pinned("sealed")
    content = PINNED["sealed"]
    derived = Argon2id(
        salt=bytes.fromhex(content["salt"]), length=32, iterations=3, lanes=1, memory_cost=256 << 10
    ).derive(WORDS.encode())
    data = json.dumps(content | {"sealed_seed": ""}, indent=2).encode() + b"\n"
    seed = crypto_aead_xchacha20poly1305_ietf_decrypt(bytes.fromhex(content["sealed_seed"]), data, bytes(24), derived)
    assert Identity(seed).verify_key_bytes == sealed.public.verify_key


@pytest.mark.parametrize("passphrase", ["", "short", "x" * 11, "x" * 1025, "\ud800" * 12])
def test_a_passphrase_not_worth_sealing_with_is_refused_and_not_quoted(passphrase):
    with pytest.raises(ParameterError) as caught:
        StoredIdentity.make("a", passphrase=passphrase)
    assert not passphrase or passphrase not in caught.value.message + caught.value.hint


@pytest.mark.parametrize("field", ["id", "verify_key", "salt", "sealed_seed"])
def test_no_field_of_a_sealed_file_can_be_altered(sealed, field):
    content = json.loads(sealed.to_json())
    value = content[field]
    if field == "verify_key":
        content[field] = Identity(b"other".ljust(32)).verify_key_bytes.hex()
    else:
        content[field] = "clinic-b" if field == "id" else value[:-1] + ("0" if value[-1] != "0" else "1")
    altered = StoredIdentity.from_json(json.dumps(content, indent=2).encode() + b"\n")
    with pytest.raises(ParameterError, match="wrong, or the file was altered"):
        altered.open(lambda: WORDS)


def test_a_bare_file_whose_keys_do_not_belong_together_is_refused(tmp_path):
    made = new(tmp_path)
    content = json.loads(made.secret_path.read_text())
    content["verify_key"] = Identity(b"other".ljust(32)).verify_key_bytes.hex()
    altered = StoredIdentity.from_json(json.dumps(content, indent=2).encode() + b"\n")
    with pytest.raises(ParameterError, match="damaged"):
        altered.open(never)


def test_no_secret_shows_in_a_repr_or_an_error(tmp_path, sealed):
    bare = StoredIdentity.make("a", passphrase=None, random_bytes=lambda size: SEED[:size])
    own = bare.open(never)
    shown = [repr(bare), str(bare), repr(bare._file), repr(own), repr(sealed), repr(own.identity), repr(vars(bare))]
    for changes in ({"seed": SEED.hex().upper()}, {"seed": SEED.hex()[:-2]}, {"more": SEED.hex()}, {"id": 3}):
        content = json.loads(bare.to_json()) | changes
        with pytest.raises(ParameterError) as caught:
            StoredIdentity.from_json(json.dumps(content, indent=2).encode() + b"\n")
        shown.append(caught.value.message + caught.value.hint + repr(caught.value.__cause__))
    with pytest.raises(ParameterError) as caught:
        sealed.open(lambda: "another passphrase")
    shown.append(repr(caught.value))
    for text in shown:
        assert SEED.hex()[:16] not in text.lower()
        assert "another passphrase" not in text
        assert repr(SEED)[2:-1] not in text


def _variants(content):
    values = json.loads(content)
    text = content.decode()
    yield b""
    yield content[:-1]
    yield content + b"\n"
    yield content.replace(b"\n", b"\r\n")
    yield b"\xef\xbb\xbf" + content
    yield json.dumps(values).encode()
    yield json.dumps(dict(reversed(values.items())), indent=2).encode() + b"\n"
    yield json.dumps(values | {"role": "admin"}, indent=2).encode() + b"\n"
    yield json.dumps(values | {"format": values["format"].replace("v1", "v2")}, indent=2).encode() + b"\n"
    yield json.dumps({key: value for key, value in values.items() if key != "id"}, indent=2).encode() + b"\n"
    # A name that appears twice is read as the first by some parsers and as the last by others.
    yield text.replace('"id"', '"id": "somebody else",\n  "id"', 1).encode()
    yield text.replace("clinic-a", "clinic\\u002da").encode()
    yield b"[" * 4000
    yield content + b" " * 5000


@pytest.mark.parametrize("kind", ["public", "bare", "sealed"])
def test_a_file_is_refused_unless_it_is_exactly_what_was_written(kind, sealed):
    bare = StoredIdentity.make("clinic-a", passphrase=None)
    content, read = {
        "public": (bare.public.to_json(), PublicIdentity.from_json),
        "bare": (bare.to_json(), StoredIdentity.from_json),
        "sealed": (sealed.to_json(), StoredIdentity.from_json),
    }[kind]
    assert read(content).to_json() == content
    for variant in _variants(content):
        with pytest.raises(ParameterError):
            read(variant)


def test_one_kind_of_file_is_not_taken_for_another(sealed):
    public, roster = sealed.public.to_json(), roster_of([sealed.public]).to_json()
    for read, wrong in (
        (PublicIdentity.from_json, (sealed.to_json(), roster)),
        (StoredIdentity.from_json, (public, roster)),
        (Roster.from_json, (public, sealed.to_json())),
    ):
        for content in wrong:
            with pytest.raises(ParameterError, match="is needed"):
                read(content)


def test_too_large_a_file_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    def parse(*_arguments, **_named):
        raise AssertionError("the input was parsed")

    path = tmp_path / "big"
    path.write_bytes(b" " * 5000)
    path.chmod(0o600)
    monkeypatch.setattr(msgspec.json, "decode", parse)
    for load in (PublicIdentity.load, lambda place: load_identity(place, ask_passphrase=never)):
        with pytest.raises(ParameterError, match="larger than 4096 bytes"):
            load(path)
    with pytest.raises(ParameterError, match="at most"):
        PublicIdentity.from_json(b" " * 5000)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place in (pipe, tmp_path, "/dev/zero"):
        with pytest.raises(ParameterError, match="no regular file"):
            PublicIdentity.load(place)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_altered_public_files_are_refused_or_are_other_canonical_files(data):
    good = StoredIdentity.make("clinic-a", passphrase=None).public.to_json()
    place = data.draw(st.integers(0, len(good) - 1))
    noise = data.draw(st.binary(min_size=1, max_size=6))
    altered = good[:place] + noise + good[place + len(noise) :]
    try:
        read = PublicIdentity.from_json(altered)
    except ParameterError:
        return
    assert read.to_json() == altered


def test_a_roster_names_every_client_once_and_every_key_once():
    one, other = (StoredIdentity.make(name, passphrase=None).public for name in ("a", "b"))
    assert dict(roster_of([other, one])) == {"a": one.verify_key, "b": other.verify_key}
    assert roster_of([one, other]).digest == roster_of([other, one]).digest
    with pytest.raises(ParameterError, match="two public identities are called 'a'"):
        roster_of([one, PublicIdentity("a", other.verify_key)])
    with pytest.raises(ParameterError, match="same key"):
        roster_of([one, PublicIdentity("b", one.verify_key)])


LOW_ORDER = [bytes(32), b"\x01" + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f"]
NON_CANONICAL = [b"\xed" + b"\xff" * 30 + b"\x7f", b"\xee" + b"\xff" * 30 + b"\x7f", b"\x01" + bytes(30) + b"\x80"]
LOW_ORDER_8 = [
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
    bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
]


@pytest.mark.parametrize("key", LOW_ORDER + NON_CANONICAL + LOW_ORDER_8, ids=lambda key: key.hex()[:8])
def test_a_key_of_low_order_or_in_a_second_encoding_is_refused(key):
    with pytest.raises(ParameterError, match="no valid Ed25519 public key"):
        PublicIdentity("a", key)


def test_a_client_accepts_only_a_roster_that_names_it_with_its_key():
    own = StoredIdentity.make("a", passphrase=None).open(never)
    key, stranger = own.identity.verify_key_bytes, Identity.generate().verify_key_bytes
    own.check_roster(Roster({"a": key, "b": stranger}))
    with pytest.raises(ParameterError, match="another key"):
        own.check_roster(Roster({"a": stranger}))
    with pytest.raises(ParameterError, match="does not name client 'a'"):
        own.check_roster(Roster({"b": stranger}))
    with pytest.raises(ParameterError, match="under 'b'"):
        own.check_roster(Roster({"b": key}))


def test_a_digest_compares_whole_or_not_at_all():
    roster = Roster({"a": Identity(b"1" * 32).verify_key_bytes})
    other = Roster({"b": Identity(b"1" * 32).verify_key_bytes})
    roster.check_digest(roster.spoken_digest)
    roster.check_digest(roster.digest.hex().upper())
    assert [len(line.split()) for line in roster.spoken_digest.splitlines()] == [4, 4, 4, 4]
    with pytest.raises(ParameterError, match="digest is") as caught:
        roster.check_digest(other.digest.hex())
    assert other.digest.hex() in caught.value.message
    for partial in ("", roster.digest.hex()[:16], roster.digest.hex() + "00", "g" * 64):
        with pytest.raises(ParameterError):
            roster.check_digest(partial)
