"""The committed vectors: the protocol still speaks them, and a second reading of `docs/protocol.md` gives them too."""

import hashlib
import hmac
import importlib.util
import json
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_decrypt, crypto_scalarmult
from nacl.signing import SigningKey

FOLDER = Path(__file__).parent.parent / "vectors"
CONTENT = json.loads((FOLDER / "secagg_v1.json").read_text())
ROUNDS = list(CONTENT["rounds"].values())
PRIME = 2**256 + 297


def test_the_protocol_still_gives_every_committed_byte():
    """A difference here is a new protocol version, not a file to be written again."""
    spec = importlib.util.spec_from_file_location("generate_secagg", FOLDER / "generate_secagg.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert json.loads(json.dumps(generator.build())) == CONTENT


class SecondImplementation:
    """The protocol as `docs/protocol.md` tells it, without a line of the package."""

    def __init__(self, vectors):
        self.vectors = vectors
        self.names = vectors["context"]["cohort"]
        self.context = vectors["context"]
        self.session = self.digest("SESSION", *self.session_parts())

    def hex(self, *path):
        value = self.vectors
        for name in path:
            value = value[name]
        return bytes.fromhex(value)

    def message(self, *path):
        return msgspec.msgpack.decode(self.hex("messages", *path))

    @staticmethod
    def digest(label, *parts):
        framed = b"".join(len(part).to_bytes(8, "big") + part for part in (CONTENT["labels"][label].encode(), *parts))
        return hashlib.sha256(framed).digest()

    def derive(self, label, secret, *parts):
        key = hmac.new(self.session, secret, hashlib.sha256).digest()
        return hmac.new(key, self.digest(label, *parts) + b"\x01", hashlib.sha256).digest()

    @staticmethod
    def keystream(key, length):
        return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(length))

    def session_parts(self):
        numbers = ("vector_length", "ring_bits", "threshold", "minimum_survivors", "degree")
        return (
            CONTENT["protocol_version"].to_bytes(8, "big"),
            CONTENT["suite"].encode(),
            bytes.fromhex(self.context["run_id"]),
            self.context["round_index"].to_bytes(8, "big"),
            self.context["attempt"].to_bytes(8, "big"),
            bytes.fromhex(self.context["roster_digest"]),
            bytes.fromhex(self.context["model_digest"]),
            *((self.context[name] or 0).to_bytes(8, "big") for name in numbers),
            *(name.encode() for name in self.names),
        )

    @property
    def directory(self):
        _, _, members, entries = self.message("key_directory")
        return self.digest("DIRECTORY", self.session, members, entries)

    def public_keys(self, number):
        entry = self.message("key_directory")[3][number * 160 : (number + 1) * 160]
        return entry[:32], entry[32:64], entry[64:96], entry[96:]

    def drawn(self, number):
        stream = self.keystream(self.hex("random_keys", self.names[number]), 96)
        return stream[:32], stream[32:64], stream[64:]

    def holders(self, number):
        return self.vectors["derived"]["holders"][str(number)]

    def expand(self, key):
        word = 4 if self.context["ring_bits"] <= 32 else 8
        stream = self.keystream(key, word * self.context["vector_length"])
        return [int.from_bytes(stream[at : at + word], "little") for at in range(0, len(stream), word)]

    def masked(self, number):
        """The masked vector of one survivor, from its own secrets and the public keys."""
        _, mask, seed = self.drawn(number)
        own, model = self.names[number].encode(), bytes.fromhex(self.context["model_digest"])
        masks = [(1, self.derive("SELF_MASK", seed, model, self.directory, own))]
        for peer in self.holders(number):
            if peer == number:
                continue
            secret = crypto_scalarmult(mask, self.public_keys(peer)[1])
            ids = sorted((own, self.names[peer].encode()))
            masks.append((1 if number < peer else -1, self.derive("PAIR_MASK", secret, model, self.directory, *ids)))
        total = list(self.vectors["vectors"][self.names[number]])
        for sign, key in masks:
            pairs = zip(total, self.expand(key), strict=True)
            total = [(one + sign * other) % 2 ** self.context["ring_bits"] for one, other in pairs]
        return total


@pytest.mark.parametrize("vectors", ROUNDS, ids=list(CONTENT["rounds"]))
def test_a_second_implementation_reads_the_same_round(vectors):
    reader = SecondImplementation(vectors)
    assert reader.session.hex() == vectors["context"]["session_digest"]
    assert reader.directory.hex() == vectors["derived"]["directory_digest"]
    for number, name in enumerate(reader.names):
        _, session, sender, channel, mask, commitment, signature = reader.message("advertisements", name)
        assert (session, sender) == (reader.session, number)
        signed = reader.digest("SIGN_ADVERTISEMENT", session, number.to_bytes(8, "big"), channel, mask, commitment)
        key = SigningKey(reader.hex("identity_seeds", name)).verify_key
        key.verify(signed, signature)
        assert commitment == reader.derive("SELF_COMMITMENT", reader.drawn(number)[2], name.encode())
        assert (channel, mask, commitment, signature) == reader.public_keys(number)


@pytest.mark.parametrize("vectors", ROUNDS, ids=list(CONTENT["rounds"]))
def test_a_second_implementation_masks_the_same_vectors(vectors):
    reader = SecondImplementation(vectors)
    bits, length = vectors["context"]["ring_bits"], vectors["context"]["vector_length"]
    for name in vectors["messages"]["masked_vectors"]:
        number = reader.names.index(name)
        _, session, sender, sharers, packed, signature = reader.message("masked_vectors", name)
        digits = int.from_bytes(packed, "little")
        assert [digits >> bits * place & (1 << bits) - 1 for place in range(length)] == reader.masked(number)
        signed = reader.digest("SIGN_MASKED", session, reader.directory, sender.to_bytes(8, "big"), sharers, packed)
        SigningKey(reader.hex("identity_seeds", name)).verify_key.verify(signed, signature)


@pytest.mark.parametrize("vectors", ROUNDS, ids=list(CONTENT["rounds"]))
def test_a_second_implementation_opens_the_same_shares(vectors):
    """The first client's secrets are rebuilt from what it sealed for its neighbours and kept for itself."""
    reader = SecondImplementation(vectors)
    _, _, _, sealed, _ = reader.message("sealed_shares", reader.names[0])
    others = [holder for holder in reader.holders(0) if holder != 0]
    shares = {}
    for place, holder in enumerate(others):
        channel, _, _ = reader.drawn(holder)
        secret = crypto_scalarmult(channel, reader.public_keys(0)[0])
        names = (reader.names[0].encode(), reader.names[holder].encode())
        key = reader.derive("SEAL_KEY", secret, reader.directory, *names)
        point = (holder + 1).to_bytes(8, "big")
        data = reader.digest("SEAL_DATA", reader.session, reader.directory, *names, point)
        pair = crypto_aead_xchacha20poly1305_ietf_decrypt(sealed[place * 82 : place * 82 + 82], data, bytes(24), key)
        shares[holder + 1] = (int.from_bytes(pair[:33], "big"), int.from_bytes(pair[33:], "big"))
    points = list(shares)[: vectors["context"]["threshold"]]
    rebuilt = [0, 0]
    for point in points:
        weight = 1
        for other in points:
            if other != point:
                weight = weight * other * pow(other - point, -1, PRIME) % PRIME
        rebuilt = [(value + weight * share) % PRIME for value, share in zip(rebuilt, shares[point], strict=True)]
    _, mask, seed = reader.drawn(0)
    assert [value.to_bytes(32, "big") for value in rebuilt] == [mask, seed]


@pytest.mark.parametrize("vectors", ROUNDS, ids=list(CONTENT["rounds"]))
def test_the_committed_sum_is_that_of_the_survivors(vectors):
    modulus = 2 ** vectors["context"]["ring_bits"]
    survivors = [vectors["vectors"][name] for name in vectors["messages"]["masked_vectors"]]
    assert vectors["sum"] == [sum(column) % modulus for column in zip(*survivors, strict=True)]
