import pytest
from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_encrypt

from fedpt_secure.crypto import ShareRejected
from fedpt_secure.crypto.sealing import SEALED_BYTES, associated_data, seal, unseal

KEY = b"k" * 32
SHARES = (bytearray(b"\x00" + b"a" * 32), bytearray(b"\x00" + b"b" * 32))
BINDING = {
    "session_digest": b"s" * 32,
    "directory_digest": b"d" * 32,
    "sender": "alice",
    "receiver": "bob",
    "point": 2,
}


def test_shares_come_out_as_they_went_in():
    data = associated_data(**BINDING)
    sealed = seal(KEY, *SHARES, data=data)
    assert len(sealed) == SEALED_BYTES
    assert unseal(KEY, sealed, data=data, sender="alice") == SHARES


@pytest.mark.parametrize(
    "change",
    [
        {"session_digest": b"t" * 32},
        {"directory_digest": b"e" * 32},
        {"sender": "carol"},
        {"receiver": "carol"},
        {"point": 3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_share_opens_only_where_it_was_meant_to(change):
    sealed = seal(KEY, *SHARES, data=associated_data(**BINDING))
    with pytest.raises(ShareRejected):
        unseal(KEY, sealed, data=associated_data(**BINDING | change), sender="alice")


def test_no_altered_byte_goes_unnoticed():
    data = associated_data(**BINDING)
    sealed = seal(KEY, *SHARES, data=data)
    for position in range(SEALED_BYTES):
        altered = bytearray(sealed)
        altered[position] ^= 0x80
        with pytest.raises(ShareRejected):
            unseal(KEY, bytes(altered), data=data, sender="alice")
    for wrong in (b"", sealed[:-1], sealed + b"\0"):
        with pytest.raises(ShareRejected):
            unseal(KEY, wrong, data=data, sender="alice")


@pytest.mark.parametrize("plain", [b"", b"\xff" * 66, bytes(65), bytes(67)])
def test_a_well_sealed_non_share_is_refused(plain):
    """A malicious client can seal anything; what is no field element never enters the client's state."""
    data = associated_data(**BINDING)
    sealed = crypto_aead_xchacha20poly1305_ietf_encrypt(plain, data, bytes(24), KEY)
    with pytest.raises(ShareRejected):
        unseal(KEY, sealed, data=data, sender="mallory")
