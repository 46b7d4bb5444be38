"""Published vectors, through the functions that the protocol calls wherever they expose the primitive."""

import hashlib
import hmac

import pytest
from nacl.bindings import (
    crypto_aead_chacha20poly1305_ietf_encrypt,
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
)

from fedpt_secure.crypto import Identity, Roster, SignatureInvalid
from fedpt_secure.crypto.key_agreement import KeyPair, public_key, shared_secret
from fedpt_secure.crypto.labels import Label, derive_key, digest
from fedpt_secure.crypto.prg import Keystream

SUNSCREEN = (
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
    b"sunscreen would be it."
)
SUNSCREEN_DATA = bytes.fromhex("50515253c0c1c2c3c4c5c6c7")
SUNSCREEN_KEY = bytes(range(0x80, 0xA0))


@pytest.mark.parametrize(
    ("scalar", "u", "expected"),
    [
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
            "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
            "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
        ),
    ],
)
def test_x25519_matches_rfc_7748_sections_5_2_and_6_1(scalar, u, expected):
    assert shared_secret(bytes.fromhex(scalar), bytes.fromhex(u)).hex() == expected


def test_x25519_iterated_a_thousand_times_matches_rfc_7748_section_5_2():
    scalar = u = (9).to_bytes(32, "little")
    for _ in range(1000):
        scalar, u = bytes(shared_secret(scalar, u)), scalar
    assert scalar.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


def test_x25519_public_keys_match_rfc_7748_section_6_1():
    private = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    expected = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert public_key(private).hex() == expected
    assert KeyPair(bytearray(private)).public.hex() == expected


@pytest.mark.parametrize(
    ("seed", "verify_key", "message", "signature"),
    [
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
            "d25bf5f0595bbe24655141438e7a100b",
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
            "387b2eaeb4302aeeb00d291612bb0c00",
        ),
    ],
)
def test_ed25519_matches_rfc_8032_section_7_1(seed, verify_key, message, signature):
    identity = Identity(bytes.fromhex(seed))
    assert identity.verify_key_bytes.hex() == verify_key
    assert identity.sign(bytes.fromhex(message)).hex() == signature
    roster = Roster({"alice": identity.verify_key_bytes})
    roster.verify("alice", bytes.fromhex(message), bytes.fromhex(signature))
    with pytest.raises(SignatureInvalid):
        roster.verify("alice", bytes.fromhex(message) + b"x", bytes.fromhex(signature))


def _hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 in its own words, to check the library's against."""
    key = hmac.new(salt, secret, hashlib.sha256).digest()
    output, block = b"", b""
    while len(output) < length:
        block = hmac.new(key, block + info + bytes([len(output) // 32 + 1]), hashlib.sha256).digest()
        output += block
    return output[:length]


def test_key_derivation_is_hkdf_sha256_of_rfc_5869():
    """The reference above gives case A.1 of the RFC; `derive_key` gives what the reference gives."""
    okm = _hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert okm.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    secret, salt = b"s" * 32, b"t" * 32
    expected = _hkdf(secret, salt, digest(Label.PAIR_MASK, (b"one", b"other")), 32)
    assert derive_key(secret, salt=salt, label=Label.PAIR_MASK, parts=(b"one", b"other")) == expected


def test_the_keystream_is_aes_256_ctr_of_sp_800_38a_section_f_5_5():
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = int.from_bytes(bytes(range(0xF0, 0x100)), "big")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = (
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    stream = Keystream(key, first_block=counter).read(len(plain))
    assert bytes(a ^ b for a, b in zip(stream, plain, strict=True)).hex() == cipher


def test_chacha20_poly1305_matches_rfc_8439_section_2_8_2():
    nonce = bytes.fromhex("070000004041424344454647")
    sealed = crypto_aead_chacha20poly1305_ietf_encrypt(SUNSCREEN, SUNSCREEN_DATA, nonce, SUNSCREEN_KEY)
    assert sealed.hex() == (
        "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d63dbea45e8ca9671282fafb69da92728b"
        "1a71de0a9e060b2905d6a5b67ecd3b3692ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc"
        "3ff4def08e4b7a9de576d26586cec64b61161ae10b594f09e26a7e902ecbd0600691"
    )


def test_xchacha20_poly1305_matches_draft_irtf_cfrg_xchacha_section_a_3_1():
    nonce = bytes(range(0x40, 0x58))
    sealed = crypto_aead_xchacha20poly1305_ietf_encrypt(SUNSCREEN, SUNSCREEN_DATA, nonce, SUNSCREEN_KEY)
    assert sealed.hex() == (
        "bd6d179d3e83d43b9576579493c0e939572a1700252bfaccbed2902c21396cbb731c7f1b0b4aa6440bf3a82f4eda7e39"
        "ae64c6708c54c216cb96b72e1213b4522f8c9ba40db5d945b11b69b982c1bb9e3f3fac2bc369488f76b2383565d3fff9"
        "21f9664c97637da9768812f615c68b13b52ec0875924c1c7987947deafd8780acf49"
    )
    opened = crypto_aead_xchacha20poly1305_ietf_decrypt(sealed, SUNSCREEN_DATA, nonce, SUNSCREEN_KEY)
    assert opened == SUNSCREEN
