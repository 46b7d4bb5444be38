"""Where the randomness of the privacy mechanisms comes from.

Both the Gaussian noise and the choice of which records take part in a step must be unpredictable: whoever can
guess either can undo the protection. `SecureRandom` draws both from AES-256-CTR under a key from the operating
system. Seeds of 31 or 64 bits, as NumPy and PyTorch take them, are not used for either.
"""

from __future__ import annotations

import hashlib
import os
from typing import Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.special import ndtri

from fedpt_secure.privacy.discrete_gaussian import discrete_gaussian

FloatArray = npt.NDArray[np.float64]

GAUSSIANS_PER_DRAW = 4
"""Each normal variate is the scaled sum of this many (Holohan and Braghin 2021, "Secure random sampling in
differential privacy"): one inverse-CDF draw reaches only 2^53 values, whose gaps in floating point could tell two
neighbouring sums apart; recovering them from a sum of four is infeasible."""


class NoiseSource(Protocol):
    """Randomness for a mechanism."""

    is_private: bool
    """False where an adversary could recompute the draws; every artefact must then say so."""

    def gaussian(self, count: int, *, standard_deviation: float) -> FloatArray:
        """Draw `count` independent normal variates with mean 0."""

    def discrete_gaussian(self, count: int, *, sigma: int) -> npt.NDArray[np.int64]:
        """Draw `count` independent discrete Gaussians (`privacy.discrete_gaussian`), exactly."""

    def bernoulli(self, count: int, *, probability: float) -> npt.NDArray[np.bool_]:
        """Draw `count` independent coins that are true with the given probability."""

    def random_bytes(self, count: int) -> bytes:
        """Draw `count` bytes."""


class _KeystreamRandom:
    """Variates from one AES-256-CTR keystream. A key is used by one instance only, so no block repeats."""

    is_private = False

    def __init__(self, key: bytes) -> None:
        # The nonce may be fixed because every instance has a key of its own.
        self._keystream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def _uniform(self, count: int) -> FloatArray:
        """Uniform on the open interval (0, 1), 53 bits each; never 0 or 1, so that `ndtri` stays finite."""
        return ((self._words(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def _words(self, count: int) -> npt.NDArray[np.uint64]:
        """Uniform 64-bit words, in an array of their own."""
        return np.frombuffer(bytearray(self.random_bytes(8 * count)), dtype="<u8")

    def gaussian(self, count: int, *, standard_deviation: float) -> FloatArray:
        draws = ndtri(self._uniform(GAUSSIANS_PER_DRAW * count)).reshape(GAUSSIANS_PER_DRAW, count)
        return np.asarray(draws.sum(axis=0) * (standard_deviation / GAUSSIANS_PER_DRAW**0.5))

    def discrete_gaussian(self, count: int, *, sigma: int) -> npt.NDArray[np.int64]:
        return discrete_gaussian(count, sigma=sigma, words=self._words)

    def bernoulli(self, count: int, *, probability: float) -> npt.NDArray[np.bool_]:
        return np.asarray(self._uniform(count) < probability)

    def random_bytes(self, count: int) -> bytes:
        return self._keystream.update(bytes(count))


class SecureRandom(_KeystreamRandom):
    """Cryptographic randomness under a fresh 256-bit key from the operating system.

    **Guarantees** Two instances never share a stream, also across forks of a resumed run, because nothing of an
    instance is ever stored.

    **Assumptions** `os.urandom` is unpredictable; AES-256 is a pseudorandom permutation. The Gaussian is a
    floating-point one: |z| is at most 2 * 8.3 standard deviations, and the missing tail mass is below 2^-52 a draw.
    """

    is_private = True

    def __init__(self) -> None:
        super().__init__(os.urandom(32))


class InsecureDeterministicRandom(_KeystreamRandom):
    """Randomness that anybody who knows the seed can recompute. For debugging; protects nothing."""

    def __init__(self, seed: int, *purpose: str | int) -> None:
        label = "\x00".join(["fedpt-secure insecure deterministic", str(seed), *map(str, purpose)])
        super().__init__(hashlib.sha256(label.encode()).digest())
