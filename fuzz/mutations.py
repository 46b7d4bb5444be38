"""Changes to an input that know a little of its structure: bytes, MessagePack, JSON, safetensors' header of JSON."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec

_EDGES = (0, 1, -1, 127, 128, 255, 256, 2**15, 2**16, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, -(2**31))
_TOKENS = (
    b"\x00",
    b"\xff",
    b"\xc0",
    b"\xc4\x00",
    b"\xc6\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\x91",
    b"[",
    b'"',
    b"\n",
)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to four changes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        structured = rng.choice((_message, _json, _safetensors, None, None))
        changed = structured(data, rng) if structured else None
        data = _bytes(data, rng) if changed is None else changed
    return data


def _bytes(data: bytes, rng: random.Random) -> bytes:
    # Headers and trailers say what the rest means; in a long input a uniform place would hardly ever hit them.
    near = min(len(data), rng.choice((64, 64, len(data), len(data))))
    place = rng.choice((rng.randrange(near + 1), len(data) - rng.randrange(near + 1)))
    length = rng.choice((1, 1, 2, 4, 8, 32, 33))
    kind = rng.randrange(7)
    if kind == 0 and data:
        place %= len(data)
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    if kind == 1:
        return data[:place] + rng.randbytes(length) + data[place + length :]
    if kind == 2:
        return data[:place] + data[place + length :]
    if kind == 3:
        return data[:place] + rng.randbytes(length) + data[place:]
    if kind == 4:
        return data[:place] + data[place : place + length] * 2 + data[place + length :]
    if kind == 5:
        return data[:place] + rng.choice(_TOKENS) + data[place:]
    return rng.choice((data[:place], data + b"\x00", data + rng.randbytes(length), data + data))


def _message(data: bytes, rng: random.Random) -> bytes | None:
    try:
        values = msgspec.msgpack.decode(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, list) or not values:
        return None
    place = rng.randrange(len(values))
    kind = rng.randrange(6)
    if kind == 0:
        del values[place]
    elif kind == 1:
        values.insert(place, values[place])
    else:
        values[place] = _other(values[place], rng)
    try:
        return msgspec.msgpack.encode(values)
    except (OverflowError, UnicodeEncodeError):
        return None


def _json(data: bytes, rng: random.Random) -> bytes | None:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not values:
        return None
    name = rng.choice(list(values))
    kind = rng.randrange(5)
    if kind == 0:
        del values[name]
    elif kind == 1:
        values[name + "s"] = values[name]
    elif isinstance(values[name], list) and values[name] and kind < 4:
        place = rng.randrange(len(values[name]))
        values[name][place : place + 1] = rng.choice(
            ([], [values[name][place]] * 2, [_other(values[name][place], rng)])
        )
    else:
        values[name] = _other(values[name], rng)
    try:
        return json.dumps(values, indent=2, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
    except TypeError:
        return None


def _safetensors(data: bytes, rng: random.Random) -> bytes | None:
    size = int.from_bytes(data[:8], "little")
    header = _json(data[8 : 8 + size], rng) if size < len(data) else None
    return None if header is None else len(header).to_bytes(8, "little") + header + data[8 + size :]


def _other(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bytes) and rng.randrange(4):
        return _bytes(value, rng)
    if isinstance(value, int) and rng.randrange(4):
        return rng.choice((value + 1, value - 1, rng.choice(_EDGES)))
    if isinstance(value, str) and value.startswith("{") and rng.randrange(2):
        return (_json(value.encode(errors="surrogatepass"), rng) or b"").decode(errors="replace")
    if isinstance(value, str) and rng.randrange(4):
        return rng.choice(
            (
                value + "x",
                value[:-1],
                value.upper(),
                value[::-1],
                "",
                "\u00e9" + value,
                "\ud800",
                "a\n",
                "BF16",
                "F8_E5M2",
            )
        )
    if isinstance(value, dict) and value and rng.randrange(4):
        name = rng.choice(list(value))
        return {**value, name: _other(value[name], rng)}
    return rng.choice((None, True, 0, 1.5, float("inf"), "", b"", [], {}, [value] * 3, str(value)))
