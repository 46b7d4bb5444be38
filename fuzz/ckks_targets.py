"""What crosses the wire under CKKS: its messages, and the ciphertexts and keys that TenSEAL reads in C++.

Ciphertexts and keys are made afresh for every run: no generator of SEAL's can be seeded, and they are large.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any, Final, get_args

import numpy as np

from fedpt_secure.crypto import ckks
from fedpt_secure.crypto import ckks_messages as wire
from fedpt_secure.crypto.ckks import CkksKey
from fedpt_secure.crypto.ckks_keys import CkksDirectory
from fedpt_secure.crypto.ckks_parameters import CkksParameters
from fedpt_secure.crypto.key_agreement import public_key
from fuzz.golden import rounds
from fuzz.target import Target

_KINDS: Final = get_args(wire.CkksMessage)
_BODY_BYTES = 4096


@cache
def _session() -> wire.CkksSession:
    """The complete graph's golden round, under the default parameters."""
    context = rounds()[0].context
    parameters = CkksParameters.fitted(cohort=len(context.cohort), bound=1.0, length=context.vector_length)
    return wire.CkksSession(context=context, parameters=parameters)


def _message(data: bytes) -> bytes:
    """First byte: the kind. The rest is the message."""
    kind = _KINDS[data[0] % len(_KINDS)] if data else _KINDS[0]
    return data[:1] + wire.encode(wire.decode(data[1:], kind, _session(), body_bytes=_BODY_BYTES))


def _field_of(annotation: str, name: str) -> object:
    sizes = {"channel_key": 32, "commitment": 32, "sealed_digest": 32, "total": 32, "signature": 64}
    if name == "session":
        return _session().digest
    return {"int": 1, "list[bytes]": [b"one", b"other"]}.get(annotation, b"\x07" * sizes.get(name, 5))


def _message_seeds() -> Sequence[bytes]:
    return [
        bytes([number])
        + wire.encode(kind(**{name: _field_of(kind.__annotations__[name], name) for name in kind.__struct_fields__}))
        for number, kind in enumerate(_KINDS)
    ]


def _directory(data: bytes) -> bytes:
    return CkksDirectory.from_bytes(data, _session(), rounds()[0].roster).to_bytes()


def _directory_seeds() -> Sequence[bytes]:
    session = _session()
    advertisements = {
        member: wire.CkksAdvertisement(
            session=session.digest,
            sender=member,
            channel_key=public_key(bytes([member + 1]) * 32),
            signature=bytes(64),
        )
        for member in range(len(session.context.cohort))
    }
    return [CkksDirectory(advertisements, session).to_bytes()]


@cache
def _adding_context() -> Any:
    return ckks._keyless(_session().parameters)


def _ciphertext(data: bytes) -> bytes:
    """As `EncryptedSum` and `CkksKey` read it; a context of its own for every input would cost thirty times as much."""
    encoded: bytes = ckks._load(_adding_context(), _session().parameters, data).serialize()
    return encoded


def _ciphertext_seeds() -> Sequence[bytes]:
    parameters = _session().parameters
    return CkksKey.generate(parameters).encrypt(np.linspace(-1, 1, parameters.length))


def _key(data: bytes) -> bytes:
    return CkksKey.from_bytes(data, _session().parameters).to_bytes()


def _key_seeds() -> Sequence[bytes]:
    return [CkksKey.generate(_session().parameters).to_bytes()]


def _answer(data: bytes) -> bytes:
    return wire.answer_to_bytes(wire.answer_from_bytes(data, _session().parameters))


def _answer_seeds() -> Sequence[bytes]:
    return [bytes(range(wire.ANSWER_BYTES * _session().parameters.length))]


TARGETS: Final[dict[str, Target]] = {
    "ckks-messages": Target("ckks_messages.decode of all ten kinds", _message, _message_seeds),
    "ckks-directory": Target("CkksDirectory.from_bytes", _directory, _directory_seeds),
    "ckks-answer": Target("ckks_messages.answer_from_bytes", _answer, _answer_seeds),
}
if importlib.util.find_spec("tenseal") is not None:
    TARGETS |= {
        "ckks-ciphertext": Target("ciphertexts, read by TenSEAL", _ciphertext, _ciphertext_seeds, seeds_change=True),
        "ckks-key": Target("CkksKey.from_bytes, read by TenSEAL", _key, _key_seeds, seeds_change=True),
    }
