"""Write `secagg_v1.json`: two whole rounds with every secret, message and derived value, for a second implementation.

    python tests/vectors/generate_secagg.py

A client draws its random bytes from the AES-256-CTR keystream (counter from zero) of the key given for it, in
this order: 32 for the channel key, 32 for the mask key, 32 for the self-mask seed; then 48 for each Shamir
coefficient, highest power first, for the mask key's polynomial and then for the seed's. Nothing in this file
is secret, and nothing in it may be used in earnest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fedpt_secure.crypto import (
    PROTOCOL_VERSION,
    SUITE,
    ClientPolicy,
    Identity,
    InsecureDeterministicBytes,
    Roster,
    RoundContext,
    SecAggClient,
    SecAggServer,
    ring_dtype,
)
from fedpt_secure.crypto.directory import Directory
from fedpt_secure.crypto.key_agreement import pair_mask_key, seal_key, self_mask_key, shared_secret
from fedpt_secure.crypto.labels import Label

VECTORS = Path(__file__).with_name("secagg_v1.json")

ROUNDS: dict[str, dict[str, Any]] = {
    "complete graph, 32-bit ring, one client drops out before masking": {
        "size": 4,
        "vector_length": 6,
        "ring_bits": 32,
        "threshold": 3,
        "degree": None,
        "silent_from_masking": [2],
    },
    "4-regular graph, 20-bit ring, one client drops out before masking": {
        "size": 8,
        "vector_length": 5,
        "ring_bits": 20,
        "threshold": 3,
        "degree": 4,
        "silent_from_masking": [5],
    },
}


def build() -> dict[str, Any]:
    """The content of the file."""
    return {
        "format": "fedpt-secagg test vectors v1",
        "protocol_version": PROTOCOL_VERSION,
        "suite": SUITE,
        "labels": {label.name: label.value for label in Label},
        "rounds": {name: _round(**settings) for name, settings in ROUNDS.items()},
    }


def _round(
    *, size: int, vector_length: int, ring_bits: int, threshold: int, degree: int | None, silent_from_masking: list[int]
) -> dict[str, Any]:
    names = [f"client-{number}" for number in range(size)]
    seeds = {name: f"identity of {name}".encode().ljust(32, b"\0") for name in names}
    random_keys = {name: f"randomness of {name}".encode().ljust(32, b"\0") for name in names}
    identities = {name: Identity(seed) for name, seed in seeds.items()}
    roster = Roster({name: identity.verify_key_bytes for name, identity in identities.items()})
    context = RoundContext(
        run_id=bytes(range(16)),
        round_index=2,
        attempt=1,
        cohort=tuple(names),
        roster_digest=roster.digest,
        model_digest=bytes(range(32)),
        vector_length=vector_length,
        ring_bits=ring_bits,
        threshold=threshold,
        minimum_survivors=size - 1,
        degree=degree,
    )
    vectors = {
        name: np.array(
            [(number * 1_000_003 + place * 70_001) % (1 << ring_bits) for place in range(vector_length)],
            dtype=ring_dtype(ring_bits),
        )
        for number, name in enumerate(names)
    }
    clients = {
        name: SecAggClient(
            context=context,
            identity=identities[name],
            client_id=name,
            roster=roster,
            policy=ClientPolicy(),
            random_bytes=InsecureDeterministicBytes(random_keys[name]),
        )
        for name in names
    }
    server = SecAggServer(context=context, roster=roster)
    survivors = [name for number, name in enumerate(names) if number not in silent_from_masking]
    said: dict[str, Any] = {}

    said["advertisements"] = {name: clients[name].advertise() for name in names}
    for name, message in said["advertisements"].items():
        server.receive_advertisement(name, message)
    said["key_directory"] = server.publish_keys()
    private_keys = {name: _private_keys(random_keys[name]) for name in names}
    said["sealed_shares"] = {name: clients[name].share_keys(said["key_directory"]) for name in names}
    for name, message in said["sealed_shares"].items():
        server.receive_shares(name, message)
    said["inboxes"] = server.route_shares()
    said["masked_vectors"] = {name: clients[name].mask(said["inboxes"][name], vectors[name]) for name in survivors}
    for name, message in said["masked_vectors"].items():
        server.receive_masked(name, message)
    said["survivor_list"] = server.publish_survivors()
    said["confirmations_of_clients"] = {name: clients[name].confirm(said["survivor_list"]) for name in survivors}
    for name, message in said["confirmations_of_clients"].items():
        server.receive_confirmation(name, message)
    said["confirmations"] = server.publish_confirmations()
    said["unmasking_shares"] = {name: clients[name].unmask(said["confirmations"]) for name in survivors}
    for name, message in said["unmasking_shares"].items():
        server.receive_unmasking(name, message)
    total = server.aggregate()

    directory = Directory.from_bytes(said["key_directory"], context, roster)
    return {
        "context": {
            field.name: _readable(getattr(context, field.name)) for field in context.__dataclass_fields__.values()
        },
        "context_bytes": context.to_bytes().hex(),
        "roster_file": roster.to_json().decode(),
        "identity_seeds": {name: seed.hex() for name, seed in seeds.items()},
        "random_keys": {name: key.hex() for name, key in random_keys.items()},
        "vectors": {name: vector.tolist() for name, vector in vectors.items()},
        "messages": {name: _readable(message) for name, message in said.items()},
        "derived": {
            "directory_digest": directory.digest.hex(),
            "holders": {str(member): list(directory.graph.holders(member)) for member in directory.members},
            "keys": _derived_keys(context, directory, private_keys),
        },
        "sum": total.tolist(),
    }


def _private_keys(random_key: bytes) -> tuple[bytes, bytes, bytes]:
    draw = InsecureDeterministicBytes(random_key)
    return draw(32), draw(32), draw(32)


def _derived_keys(
    context: RoundContext, directory: Directory, private_keys: dict[str, tuple[bytes, bytes, bytes]]
) -> dict[str, str]:
    """One of each kind, between the first client and its first neighbour."""
    one, other = context.cohort[0], context.cohort[directory.graph.neighbours(0)[0]]
    channel, mask, seed = private_keys[one]
    peer = directory.advertisements[context.index_of(other)]
    common = {"session_digest": context.session_digest, "directory_digest": directory.digest}
    masks = common | {"model_digest": context.model_digest}
    keys = {
        f"seal {one} to {other}": seal_key(
            shared_secret(channel, peer.channel_key), sender=one, receiver=other, **common
        ),
        f"pair mask {one} and {other}": pair_mask_key(
            shared_secret(mask, peer.mask_key), one=one, other=other, **masks
        ),
        f"self mask {one}": self_mask_key(bytearray(seed), owner=one, **masks),
    }
    return {name: key.hex() for name, key in keys.items()}


def _readable(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: _readable(item) for name, item in value.items()}
    return msgspec.to_builtins(value)


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(build(), indent=1) + "\n")
