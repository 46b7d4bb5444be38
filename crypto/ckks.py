"""CKKS sums by TenSEAL: a key, ciphertexts of real vectors, their addition, and a decryption that may be published.

This is the one module that imports TenSEAL, and it does so only when it is used. Encryption is symmetric, since
everybody who encrypts holds the key: its errors are some 70 times smaller than under a public key. Bytes from
outside get to TenSEAL through `_load` and `CkksKey.from_bytes` only, after the caller has checked whose they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedpt_secure.crypto.ckks_parameters import CkksParameters
from fedpt_secure.crypto.errors import CkksUnavailable, EncodingError, KeyRejected, MalformedMessage
from fedpt_secure.crypto.prg import Keystream

INSTALL_HINT: Final = 'pip install "fedpt-secure[ckks]"'

_CIPHERTEXT_POLYNOMIALS: Final = 2
_UNIFORM_BYTES: Final = 8


def require_tenseal() -> Any:
    """The TenSEAL module.

    Raises:
        CkksUnavailable: it is not installed.
    """
    try:
        return importlib.import_module("tenseal")
    except ImportError:
        raise CkksUnavailable(
            "the aggregator 'ckks' needs TenSEAL, which is not installed", hint=INSTALL_HINT
        ) from None


class EncryptedSum:
    """A running sum of ciphertexts, one per `slots` coordinates, held by somebody without the key.

    Its size does not depend on how many vectors it holds.

    Raises:
        CkksUnavailable: TenSEAL is not installed.
    """

    def __init__(self, parameters: CkksParameters) -> None:
        self._parameters = parameters
        self._context = _keyless(parameters)
        self._total: list[Any] = []

    def add(self, ciphertexts: Sequence[bytes]) -> None:
        """Add one vector's ciphertexts.

        Raises:
            MalformedMessage: one of them is no fresh ciphertext under these parameters; the sum is unchanged.
        """
        loaded = [_load(self._context, self._parameters, ciphertext) for ciphertext in ciphertexts]
        if len(loaded) != self._parameters.ciphertexts:
            raise MalformedMessage(f"{len(loaded)} ciphertexts; a vector has {self._parameters.ciphertexts}")
        if not self._total:
            self._total = loaded
            return
        for total, ciphertext in zip(self._total, loaded, strict=True):
            total.add_(ciphertext)

    def to_bytes(self) -> list[bytes]:
        """The serialised ciphertexts of the sum; none if nothing was added."""
        return [total.serialize() for total in self._total]


class CkksKey:
    """The secret key of one round, which encrypts and decrypts.

    SEAL draws it, and the randomness of ciphertexts, from its own generator (Blake2xb), seeded by the operating system.
    TenSEAL keeps it in memory that Python cannot overwrite; it is gone when the object is.

    Raises:
        CkksUnavailable: TenSEAL is not installed.
    """

    def __init__(self, parameters: CkksParameters, context: Any) -> None:
        self._parameters = parameters
        self._context = context

    @classmethod
    def generate(cls, parameters: CkksParameters) -> CkksKey:
        """A fresh key."""
        return cls(parameters, _fresh_context(parameters))

    @classmethod
    def from_bytes(cls, encoded: bytes, parameters: CkksParameters) -> CkksKey:
        """The key that `to_bytes` encoded.

        SEAL checks that its words lie below the primes, not that it is a ternary polynomial: who deals a key can deal
        a bad one, as it could hand out a good one.

        Raises:
            KeyRejected: not the one encoding of a key under these parameters.
        """
        if len(encoded) > parameters.largest_key_bytes:
            raise KeyRejected(f"a CKKS key has at most {parameters.largest_key_bytes} bytes, not {len(encoded)}")
        prefix, suffix = _framing(parameters)
        content = prefix + _field(_PRIVATE, _field(_SECRET_KEY, encoded)) + suffix
        try:
            key = cls(parameters, require_tenseal().Context.load(content, 1))
            again = key.to_bytes()
        except (RuntimeError, ValueError) as error:
            raise KeyRejected(f"no CKKS key under these parameters: {error}") from None
        if again != encoded:
            raise KeyRejected("a CKKS key is not in its canonical encoding")
        return key

    def to_bytes(self) -> bytes:
        """SEAL's serialisation of the secret key alone."""
        prefix, suffix = _framing(self._parameters)
        content = self._context.serialize(
            save_public_key=False, save_secret_key=True, save_galois_keys=False, save_relin_keys=False
        )
        return _unfield(_SECRET_KEY, _unfield(_PRIVATE, content[len(prefix) : len(content) - len(suffix)]))

    def encrypt(self, values: npt.NDArray[np.float64]) -> list[bytes]:
        """Fresh ciphertexts of a vector `[length]`, the last one filled up with zeros.

        Raises:
            EncodingError: another shape or dtype, or a value that is not finite or beyond the bound.
        """
        parameters = self._parameters
        check_values(values, parameters)
        padded = np.zeros(parameters.ciphertexts * parameters.slots)
        padded[: parameters.length] = values
        chunks = padded.reshape(parameters.ciphertexts, parameters.slots)
        return [require_tenseal().ckks_vector(self._context, chunk).serialize() for chunk in chunks]

    def decrypt(self, ciphertexts: Sequence[bytes]) -> npt.NDArray[np.float64]:
        """The values `[length]` behind ciphertexts, with all of the scheme's error in them.

        **Assumptions** They stay with holders of the key. The error depends on the key: values of this precision and
        the ciphertexts give it away (Li and Micciancio 2020). Only what `flooded` makes of them may be published.

        Raises:
            MalformedMessage: these are no ciphertexts of a vector under these parameters.
        """
        if len(ciphertexts) != self._parameters.ciphertexts:
            raise MalformedMessage(f"{len(ciphertexts)} ciphertexts; a vector has {self._parameters.ciphertexts}")
        decoded = [_load(self._context, self._parameters, ciphertext).decrypt() for ciphertext in ciphertexts]
        values: npt.NDArray[np.float64] = np.asarray(decoded, dtype=np.float64).reshape(-1)[: self._parameters.length]
        return values


def check_values(values: npt.NDArray[Any], parameters: CkksParameters) -> None:
    """Accept a vector that may be encrypted.

    Raises:
        EncodingError: another shape or dtype, or a value that is not finite or beyond the bound.
    """
    if values.shape != (parameters.length,) or values.dtype != np.float64:
        raise EncodingError(
            f"a vector to encrypt is float64 and [{parameters.length}], not {values.dtype} and {list(values.shape)}"
        )
    if not np.abs(values).max() <= parameters.bound:
        raise EncodingError(
            f"a coordinate is not finite or beyond the bound of {parameters.bound:g}", hint="clip the vector first"
        )


def flooded(values: npt.NDArray[np.float64], parameters: CkksParameters, *, key: bytes) -> npt.NDArray[np.int32]:
    """A decrypted sum as it may be published: Gaussian noise added, rounded to multiples of `parameters.step`.

    **Guarantees** Whatever the sum's ciphertexts and the key, the result is within 2^-flooding_bits of the exact sum's,
    with the same noise, in statistical distance (`CkksParameters.flooding_deviation`; docs/ckks.md), for a key of the
    noise that nobody who sees the result knows. Equal inputs give equal results, so that several holders of the key
    answer alike and their noise does not average out. The rounding hides the floats behind the noise.

    Args:
        key: 32 bytes, for this one call.

    Raises:
        EncodingError: no sum of that many vectors within the bound has these values.
    """
    noise = _gaussian(Keystream(key), values.size) * parameters.flooding_deviation
    largest = parameters.cohort * parameters.bound + parameters.error_bound
    if not np.abs(values).max() <= largest:
        raise EncodingError(
            f"a decrypted sum has a coordinate that is not finite or beyond {largest:g}",
            hint="a client did not keep to the bound, or the ciphertexts are not of this key",
        )
    limit = np.iinfo(np.int32).max
    steps = np.clip(np.rint((values + noise) / parameters.step), -limit, limit)
    answer: npt.NDArray[np.int32] = steps.astype(np.int32)
    return answer


def unflooded(answer: npt.NDArray[np.int32], parameters: CkksParameters) -> npt.NDArray[np.float64]:
    """The published sum `[length]` as real numbers, each within `parameters.error_bound` of the exact one."""
    values: npt.NDArray[np.float64] = answer.astype(np.float64) * parameters.step
    return values


def _gaussian(stream: Keystream, count: int) -> npt.NDArray[np.float64]:
    """Standard normal variates by Box and Muller's method from 53-bit uniforms."""
    pairs = -(-count // 2)
    words = np.frombuffer(stream.read(2 * _UNIFORM_BYTES * pairs), dtype="<u8") >> np.uint64(11)
    uniforms = (words.astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniforms[:pairs]))
    angle = 2.0 * np.pi * uniforms[pairs:]
    return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:count]


def _load(context: Any, parameters: CkksParameters, encoded: bytes) -> Any:
    """One ciphertext from bytes, accepted only if it has the shape, level and scale of a fresh one or a sum of such.

    SEAL bounds what it allocates by the context, checks that its header fits the input and that every word lies below
    its prime. TenSEAL's own fields around it (sizes, scale) it does not check, and reads memory by them.
    """
    if len(encoded) > parameters.largest_ciphertext_bytes:
        raise MalformedMessage(
            f"a ciphertext has at most {parameters.largest_ciphertext_bytes} bytes, not {len(encoded)}"
        )
    try:
        vector = require_tenseal().ckks_vector_from(context, encoded)
        parts = vector.ciphertext()
    except (RuntimeError, ValueError) as error:
        raise MalformedMessage(f"no ciphertext under these parameters: {error}") from None
    if len(parts) != 1 or vector.size() != parameters.slots:
        raise MalformedMessage(f"a ciphertext of {parameters.slots} coordinates was expected")
    (part,) = parts
    if (
        part.size() != _CIPHERTEXT_POLYNOMIALS
        or part.coeff_modulus_size() != len(parameters.prime_bits) - 1
        or part.poly_modulus_degree() != parameters.degree
        or part.scale != parameters.scale
        or not part.is_ntt_form()
    ):
        raise MalformedMessage("a ciphertext has another level, scale or form than a fresh one")
    if vector.serialize() != encoded:
        raise MalformedMessage("a ciphertext is not in its canonical encoding")
    return vector


def _fresh_context(parameters: CkksParameters) -> Any:
    library = require_tenseal()
    context = library.context(
        library.SCHEME_TYPE.CKKS,
        parameters.degree,
        coeff_mod_bit_sizes=list(parameters.prime_bits),
        encryption_type=library.ENCRYPTION_TYPE.SYMMETRIC,
        n_threads=1,
    )
    context.global_scale = parameters.scale
    return context


@lru_cache(maxsize=16)
def _keyless_content(parameters: CkksParameters) -> bytes:
    content: bytes = _fresh_context(parameters).serialize(
        save_public_key=False, save_secret_key=False, save_galois_keys=False, save_relin_keys=False
    )
    return content


def _keyless(parameters: CkksParameters) -> Any:
    """A context that adds and can do nothing else."""
    return require_tenseal().Context.load(_keyless_content(parameters), 1)


# TenSEAL serialises a context as one Protocol Buffers message (its tensealcontext.proto): parameters, public part,
# private part, encryption type. Only the secret key inside the private part travels; its receiver puts it between its
# own parameters, so that a dealer can set nothing else.
_PRIVATE: Final = b"\x1a"
_SECRET_KEY: Final = b"\x0a"
_ENCRYPTION_TYPE_BYTES: Final = 2


def _framing(parameters: CkksParameters) -> tuple[bytes, bytes]:
    """What stands before and after the private part."""
    content = _keyless_content(parameters)
    return content[:-_ENCRYPTION_TYPE_BYTES], content[-_ENCRYPTION_TYPE_BYTES:]


def _field(tag: bytes, content: bytes) -> bytes:
    """A length-delimited field: tag, length as a base-128 varint, content."""
    length, size = bytearray(), len(content)
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return tag + bytes(length) + content


def _unfield(tag: bytes, field: bytes) -> bytes:
    """The content of a field that is all there is."""
    start = len(tag)
    while field[start] & 0x80:
        start += 1
    content = field[start + 1 :]
    if _field(tag, content) != field:
        raise RuntimeError("TenSEAL serialises contexts in another way than version 0.3")
    return content
