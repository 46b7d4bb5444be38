"""What the steps on a masked vector cost beside one mask: rounding, packing, hashing, framing."""

from __future__ import annotations

import os

import numpy as np
from secagg_timing import interleaved

from fedpt_secure.crypto import FixedPointEncoding, Identity
from fedpt_secure.crypto.labels import Label, digest
from fedpt_secure.crypto.messages import MaskedVector, encode
from fedpt_secure.crypto.packing import add_packed, pack
from fedpt_secure.crypto.prg import apply_masks

_MASKS = 16


def measure_costs(elements: int, rounds: int) -> dict[str, float]:
    """Seconds of each step on one thread, for one vector of a 32-bit ring; best of `rounds`, in turn."""
    encoding = FixedPointEncoding(ring_bits=32, bound=1.0, cohort=1000)
    values = np.linspace(-1, 1, elements, dtype=np.float32)
    vector = encoding.encode(values)
    packed = pack(vector, 32)
    total = np.zeros(elements, dtype=np.uint32)
    masks = [((1, -1)[number % 2], os.urandom(32)) for number in range(_MASKS)]
    signer = Identity.generate()
    message = MaskedVector(
        session=bytes(32), sender=0, sharers=bytes(8), vector=memoryview(packed), signature=signer.sign(bytes(32))
    )
    steps = {
        "one mask": lambda: apply_masks(vector, masks),
        "rounding": lambda: encoding.encode(values),
        "packing": lambda: pack(vector, 32),
        "hashing": lambda: digest(Label.SIGN_MASKED, [packed]),
        "framing": lambda: encode(message),
        "server adds": lambda: add_packed(total, packed, 32),
    }
    seconds = dict(zip(steps, interleaved(list(steps.values()), rounds), strict=True))
    seconds["one mask"] /= _MASKS
    return seconds
