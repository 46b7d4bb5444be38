"""Published vectors, through the functions that the protocol calls wherever they expose the primitive."""

import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from nacl.bindings import (
    crypto_aead_chacha20poly1305_ietf_decrypt,
    crypto_aead_chacha20poly1305_ietf_encrypt,
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
    crypto_scalarmult,
)

from fedpt_secure.crypto import Identity, Roster, SignatureInvalid, UnsafePublicKey
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


def test_x25519_matches_the_second_vector_of_rfc_7748_section_5_2():
    """Its u-coordinate has the unused top bit set, an encoding that `shared_secret` refuses; the primitive masks it."""
    scalar = bytes.fromhex("4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d")
    u = bytes.fromhex("e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493")
    expected = "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957"
    assert crypto_scalarmult(scalar, u).hex() == expected
    with pytest.raises(UnsafePublicKey):
        shared_secret(scalar, u)
    canonical = u[:31] + bytes([u[31] & 0x7F])
    assert shared_secret(scalar, canonical).hex() == expected


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
        (
            "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
            "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
            "af82",
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
            "4a7c15e9716ed28dc027beceea1ec40a",
        ),
        (
            "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
            "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
            hashlib.sha512(b"abc").hexdigest(),
            "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b58909351fc9ac90b3ecfdfbc7c66431e030"
            "3dca179c138ac17ad9bef1177331a704",
        ),
    ],
    ids=["test 1", "test 2", "test 3", "SHA(abc)"],
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


@pytest.mark.parametrize(
    ("secret", "salt", "info", "expected"),
    [
        (
            b"\x0b" * 22,
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            bytes(range(80)),
            bytes(range(0x60, 0xB0)),
            bytes(range(0xB0, 0x100)),
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
            "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
        ),
        (
            b"\x0b" * 22,
            b"",
            b"",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
    ids=["A.1", "A.2", "A.3"],
)
def test_hkdf_sha256_matches_rfc_5869_appendix_a(secret, salt, info, expected):
    """The library's and the reference above."""
    length = len(expected) // 2
    assert HKDF(algorithm=hashes.SHA256(), length=length, salt=salt, info=info).derive(secret).hex() == expected
    assert _hkdf(secret, salt, info, length).hex() == expected


def test_key_derivation_is_hkdf_sha256():
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


def test_chacha20_poly1305_opens_the_message_of_rfc_8439_appendix_a_5():
    key = bytes.fromhex("1c9240a5eb55d38af333888604f6b5f0473917c1402b80099dca5cbc207075c0")
    sealed = bytes.fromhex(
        "64a0861575861af460f062c79be643bd5e805cfd345cf389f108670ac76c8cb24c6cfc18755d43eea09ee94e382d26b0"
        "bdb7b73c321b0100d4f03b7f355894cf332f830e710b97ce98c8a84abd0b948114ad176e008d33bd60f982b1ff37c855"
        "9797a06ef4f0ef61c186324e2b3506383606907b6a7c02b0f9f6157b53c867e4b9166c767b804d46a59b5216cde7a4e9"
        "9040c5a40433225ee282a1b0a06c523eaf4534d7f83fa1155b0047718cbc546a0d072b04b3564eea1b422273f548271a"
        "0bb2316053fa76991955ebd63159434ecebb4e466dae5a1073a6727627097a1049e617d91d361094fa68f0ff77987130"
        "305beaba2eda04df997b714d6c6f2c29a6ad5cb4022b02709beead9d67890cbb22392336fea1851f38"
    )
    data, nonce = bytes.fromhex("f33388860000000000004e91"), bytes.fromhex("000000000102030405060708")
    opened = crypto_aead_chacha20poly1305_ietf_decrypt(sealed, data, nonce, key).decode()
    assert opened.startswith("Internet-Drafts are draft documents valid for a maximum of six months")
    assert opened.endswith("other than as /\u201cwork in progress./\u201d")


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
