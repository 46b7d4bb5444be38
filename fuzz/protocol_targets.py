"""What crosses the wire in a round: messages, contexts, packed vectors, shares, and the machines that take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import numpy as np
from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_encrypt

from fedpt_secure.crypto import (
    ClientState,
    CryptoError,
    InvalidShare,
    MalformedMessage,
    MessageError,
    ParameterError,
    ReconstructionFailed,
    RoundContext,
    packing,
    ring_dtype,
    sealing,
    shamir,
)
from fedpt_secure.crypto import messages as wire
from fedpt_secure.crypto.directory import Directory
from fedpt_secure.crypto.key_agreement import check_public_key, public_key, shared_secret
from fedpt_secure.crypto.recovery import ShareCollection
from fuzz import reference
from fuzz.golden import rounds
from fuzz.target import Finding, Target

MESSAGES: Final[dict[str, tuple[type, str]]] = {
    "advertisement": (wire.Advertisement, "advertisements"),
    "key-directory": (wire.KeyDirectory, "key_directory"),
    "sealed-shares": (wire.SealedShares, "sealed_shares"),
    "share-inbox": (wire.ShareInbox, "inboxes"),
    "masked-vector": (wire.MaskedVector, "masked_vectors"),
    "survivors": (wire.Survivors, "survivor_list"),
    "confirmation": (wire.Confirmation, "confirmations_of_clients"),
    "confirmations": (wire.Confirmations, "confirmations"),
    "unmasking": (wire.Unmasking, "unmasking_shares"),
}
_BODY_BYTES = 4096
_SHARE_RECORD = 4 + shamir.SHARE_BYTES
_MOST_SHARES = 12
_KEY, _DATA = bytes(range(32)), b"transcript"
_SECRET = b"a secret that four holders share"
_COEFFICIENTS = (int.from_bytes(_SECRET, "big"), 3**160, 5**110)


def _message(kind: type, data: bytes) -> bytes:
    first, second = rounds()
    try:
        decoded = wire.decode(data, kind, first.context, body_bytes=_BODY_BYTES)
    except MessageError:
        decoded = wire.decode(data, kind, second.context, body_bytes=_BODY_BYTES)
    return wire.encode(decoded)


def _message_seeds(kind: str) -> list[bytes]:
    return [message for golden in rounds() for message in golden.messages(kind)[:2]]


def _context(data: bytes) -> bytes:
    return RoundContext.from_bytes(data).to_bytes()


def _set(data: bytes) -> bytes:
    context = rounds()[0].context
    return wire.encode_set(wire.decode_set(data, context), context)


def _directory(data: bytes) -> bytes:
    first, second = rounds()
    try:
        return Directory.from_bytes(data, first.context, first.roster).to_bytes()
    except MessageError:
        return Directory.from_bytes(data, second.context, second.roster).to_bytes()


def _packing(data: bytes) -> bytes:
    """First byte: ring bits. Second: elements. The rest is the packed vector."""
    if len(data) < 2:
        raise MalformedMessage("no header")
    bits, length, packed = 16 + data[0] % 49, max(data[1], 1), data[2:]
    slow = reference.unpack_slowly(packed, length, bits)
    try:
        vector = packing.unpack(packed, length, bits)
    except MalformedMessage:
        if slow is not None:
            raise Finding(f"{length} elements of {bits} bits are refused") from None
        raise
    if slow is None or vector.tolist() != slow:
        raise Finding(f"{length} elements of {bits} bits are read as something else")
    total = np.arange(length, dtype=ring_dtype(bits))
    packing.add_packed(total, packed, bits)
    word = 1 << 8 * total.dtype.itemsize
    if total.tolist() != [(place + value) % word for place, value in enumerate(slow)]:
        raise Finding(f"{length} elements of {bits} bits are added as something else")
    if reference.pack_slowly(slow, bits) != packed:
        raise Finding("the slow packer is wrong")
    return data[:2] + packing.pack(vector, bits)


def _packing_seeds() -> list[bytes]:
    seeds = []
    for bits, length in ((16, 5), (17, 9), (20, 8), (23, 1), (32, 4), (33, 7), (48, 3), (63, 5), (64, 3)):
        values = [(place * 0x9E3779B97F4A7C15 + 1) % (1 << bits) for place in range(length)]
        seeds.append(bytes([bits - 16, length]) + reference.pack_slowly(values, bits))
    return seeds


def _share(data: bytes) -> bytes:
    return shamir.decode_share(data).to_bytes(shamir.SHARE_BYTES, "big")


def _shamir(data: bytes) -> bytes:
    """First byte: threshold. Then records of a point, four bytes, and a share."""
    threshold, body = (data[0] if data else 0), data[1 : 1 + _MOST_SHARES * _SHARE_RECORD]
    records = [body[start : start + _SHARE_RECORD] for start in range(0, len(body), _SHARE_RECORD)]
    shares = {int.from_bytes(record[:4], "big"): record[4:] for record in records}
    expected = _reconstruct_slowly(shares, threshold)
    try:
        secret: bytes | None = bytes(shamir.reconstruct(shares, threshold=threshold))
    except (InvalidShare, ParameterError):
        secret = None
    if secret != expected:
        raise Finding(f"{len(shares)} shares with threshold {threshold} give another secret than Lagrange's formula")
    return data


def _reconstruct_slowly(shares: dict[int, bytes], threshold: int) -> bytes | None:
    used = {point: shares[point] for point in sorted(shares)[:threshold]}
    values = {point: int.from_bytes(share, "big") for point, share in used.items()}
    if not 1 <= threshold <= len(shares) or 0 in used:
        return None
    if any(len(used[point]) != 33 or value >= reference.PRIME for point, value in values.items()):
        return None
    value = reference.interpolate_at_zero(values)
    return value.to_bytes(32, "big") if value < 1 << 256 else None


def _true_share(point: int) -> bytes:
    value = sum(coefficient * point**power for power, coefficient in enumerate(_COEFFICIENTS)) % reference.PRIME
    return value.to_bytes(shamir.SHARE_BYTES, "big")


def _shamir_seeds() -> list[bytes]:
    def record(point: int) -> bytes:
        return point.to_bytes(4, "big") + _true_share(point)

    return [
        bytes([3]) + record(1) + record(2) + record(4),
        bytes([3]) + record(7) + record(2**32 - 1) + record(65536) + record(9),
        bytes([2]) + record(1) + record(2),
        bytes([1]) + record(0),
    ]


def _recovery(data: bytes) -> bytes:
    """Records of a holder's position, one byte, and its share of the first client's secret; the last word counts."""
    context = rounds()[0].context
    collection = ShareCollection(context)
    filed: dict[int, bytes] = {}
    size = 1 + shamir.SHARE_BYTES
    for start in range(0, len(data), size):
        holder = data[start] % len(context.cohort)
        collection.add({0: data[start + 1 : start + size]}, holder=holder)
        filed[holder] = data[start + 1 : start + size]
    true = sum(share == _true_share(holder + 1) for holder, share in filed.items())
    try:
        secret = collection.rebuild(0, lambda secret: secret == _SECRET)
    except ReconstructionFailed:
        if true >= context.threshold:
            raise Finding(f"{true} true shares among {len(filed)} do not give the secret") from None
        raise
    if secret != _SECRET:
        raise Finding("a false secret was taken for genuine")
    return data


def _recovery_seeds() -> list[bytes]:
    records = [bytes([holder]) + _true_share(holder + 1) for holder in range(4)]
    false = bytes([1]) + _true_share(9)
    return [
        b"".join(records),
        b"".join(records[1:]),
        records[0] + false + records[2] + records[3],
        b"".join(records[:2]),
    ]


def _sealing(data: bytes) -> bytes:
    """First byte even: the rest is a sealed pair as it came. Odd: the rest is what its true sender sealed."""
    sealed = data[1:]
    if data[:1] and data[0] % 2:
        sealed = crypto_aead_xchacha20poly1305_ietf_encrypt(data[1:], _DATA, bytes(24), _KEY)
    mask_key_share, seed_share = sealing.unseal(_KEY, sealed, data=_DATA, sender="a")
    again = sealing.seal(_KEY, mask_key_share, seed_share, data=_DATA)
    return data[:1] + (again if data[0] % 2 == 0 else bytes(mask_key_share) + bytes(seed_share))


def _sealing_seeds() -> list[bytes]:
    one, other = bytearray(_true_share(1)), bytearray(_true_share(2))
    return [b"\x00" + sealing.seal(_KEY, one, other, data=_DATA), b"\x01" + bytes(one) + bytes(other)]


def _public_key(data: bytes) -> bytes:
    check_public_key(data)
    if not any(shared_secret(_KEY, data)):
        raise Finding("an accepted key gives a secret of zeros")
    return data


def _public_key_seeds() -> list[bytes]:
    twist = (2).to_bytes(32, "little")
    return [
        public_key(_KEY),
        twist,
        bytes(32),
        (2**255 - 19).to_bytes(32, "little"),
        (2**255 - 20).to_bytes(32, "little"),
    ]


def _server(data: bytes) -> bytes:
    """First byte: phase. Second: whose message is replaced. The rest is that message; all others are the vectors'."""
    golden = rounds()[0]
    if len(data) < 2:
        raise MalformedMessage("no header")
    replaced, whose, server = data[0] % 5, data[1], golden.server()
    unaltered = False
    for phase, (receive, sent, close) in enumerate(golden.server_phases()):
        for place, (name, message) in enumerate(sent.items()):
            given = message
            if phase == replaced and place == whose % len(sent):
                given, unaltered = data[2:], data[2:] == message
            try:
                receive(server, name, given)
            except MessageError:
                if given is message and phase <= replaced:
                    raise Finding(f"a good message was refused in phase {phase}") from None
        result = close(server)
    if unaltered and result.tolist() != golden.content["sum"]:
        raise Finding("unaltered messages give another sum")
    return data


def _server_seeds() -> list[bytes]:
    phases = [sent for _, sent, _ in rounds()[0].server_phases()]
    return [bytes([phase, place]) + list(sent.values())[place] for phase, sent in enumerate(phases) for place in (0, 2)]


def _client(data: bytes) -> bytes:
    """First byte: phase. The rest is what the server says in it; before that it says what the vectors do."""
    golden = rounds()[0]
    name = golden.context.cohort[0]
    client = golden.client(name)
    client.advertise()
    steps = golden.client_steps(name)
    replaced = data[0] % len(steps) if data else 0
    for step, message in steps[:replaced]:
        step(client, message)
    step, message = steps[replaced]
    try:
        step(client, data[1:])
    except CryptoError:
        if client.state is not ClientState.ABORTED:
            raise Finding("a client goes on after it refused what the server said") from None
        if data[1:] == message:
            raise Finding("a client refuses an honest server") from None
        raise
    return data


def _client_seeds() -> list[bytes]:
    golden = rounds()[0]
    return [bytes([phase]) + said for phase, (_, said) in enumerate(golden.client_steps(golden.context.cohort[0]))]


def _of_message(name: str) -> Target:
    kind, vectors = MESSAGES[name]
    return Target(f"messages.decode of {kind.__name__}", partial(_message, kind), partial(_message_seeds, vectors))


def _context_seeds() -> Sequence[bytes]:
    return [golden.context.to_bytes() for golden in rounds()]


_OTHERS: Final[dict[str, tuple[str, Callable[[bytes], bytes], Callable[[], Sequence[bytes]]]]] = {
    "context": ("RoundContext.from_bytes", _context, _context_seeds),
    "set": ("messages.decode_set", _set, lambda: [b"\x0f", b"\x00", b"\x05"]),
    "directory": ("Directory.from_bytes", _directory, partial(_message_seeds, "key_directory")),
    "packing": ("packing.unpack, add_packed and pack, against a slow packer", _packing, _packing_seeds),
    "share": ("shamir.decode_share", _share, lambda: [_true_share(1), (reference.PRIME - 1).to_bytes(33, "big")]),
    "shamir": ("shamir.reconstruct, against Lagrange's formula", _shamir, _shamir_seeds),
    "recovery": ("ShareCollection, with true and false shares", _recovery, _recovery_seeds),
    "sealing": ("sealing.unseal", _sealing, _sealing_seeds),
    "public-key": ("key_agreement.check_public_key", _public_key, _public_key_seeds),
    "server": ("SecAggServer in every phase, signatures believed", _server, _server_seeds),
    "client": ("SecAggClient in every phase, signatures believed", _client, _client_seeds),
}

TARGETS: Final[dict[str, Target]] = {name: _of_message(name) for name in MESSAGES} | {
    name: Target(*parts) for name, parts in _OTHERS.items()
}
