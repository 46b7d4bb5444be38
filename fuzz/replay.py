"""The committed inputs of each target, and their replay without a fuzzer.

python -m fuzz.replay        writes the seeds of every target again, after the formats have changed
"""

from __future__ import annotations

import hashlib
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fuzz.mutations import mutate
from fuzz.target import SECONDS_AN_INPUT, Finding, Target, accepts
from fuzz.targets import TARGETS

CORPUS: Final = Path(__file__).with_name("corpus")


@dataclass(frozen=True, slots=True)
class Replay:
    """What became of the inputs of one target."""

    inputs: int
    accepted: int


def inputs_of(name: str, target: Target) -> list[bytes]:
    """The inputs in a target's folder, and its seeds in today's formats."""
    committed = [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
    return committed + [seed for seed in target.seeds() if seed not in committed]


def replay(name: str, target: Target, *, mutations: int) -> Replay:
    """Run a target on its inputs and on changed ones, the same in every call where the seeds are.

    Raises:
        Finding: an input breaks the property, comes out as an untyped exception, or takes too long. The message holds
            the input, in hexadecimal.
    """
    inputs = accepted = 0
    for number, seed in enumerate(inputs_of(name, target)):
        rng = random.Random(f"{name} {number}")
        for data in (seed, *(mutate(seed, rng) for _ in range(mutations))):
            started = time.process_time()
            try:
                accepted += accepts(target, data)
            except Exception as error:
                raise Finding(f"{name}: {type(error).__name__}: {error}; input {data.hex()}") from error
            # The first input of a process also pays for imports.
            if inputs and time.process_time() - started > SECONDS_AN_INPUT:
                raise Finding(f"{name}: more than {SECONDS_AN_INPUT} s of processor time; input {data.hex()}")
            inputs += 1
    return Replay(inputs, accepted)


def file_name(data: bytes) -> str:
    """What an input is called in its target's folder."""
    return hashlib.sha256(data).hexdigest()[:16]


def write() -> None:
    """Add the seeds of every target to its folder."""
    for name, target in TARGETS.items():
        for seed in () if target.seeds_change else target.seeds():
            (CORPUS / name).mkdir(parents=True, exist_ok=True)
            (CORPUS / name / file_name(seed)).write_bytes(seed)


if __name__ == "__main__":
    write()
