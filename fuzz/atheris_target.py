"""One target under atheris, in a process of its own; libFuzzer's options follow the name.

python -m fuzz.atheris_target context -max_total_time=60 WORK fuzz/corpus/context
"""

from __future__ import annotations

import random
import sys
import time

import atheris

from fuzz.mutations import mutate

# Only what is under test is instrumented: the libraries beneath it are somebody else's code, and slow with it.
with atheris.instrument_imports(include=["fedpt_secure.crypto", "fedpt_secure.config"]):
    from fuzz.target import SECONDS_AN_INPUT, Finding, accepts
    from fuzz.targets import TARGETS


def main(arguments: list[str]) -> None:
    """Fuzz until libFuzzer's options say stop. Does not return: libFuzzer ends the process."""
    target = TARGETS[arguments[1]]

    accepts(target, b"")  # pays for imports, which are not an input's fault

    def one_input(data: bytes) -> None:
        started = time.process_time()
        accepts(target, data)
        if time.process_time() - started > SECONDS_AN_INPUT:
            raise Finding(f"more than {SECONDS_AN_INPUT} s of processor time")

    def mutator(data: bytes, largest: int, seed: int) -> bytes:
        if seed % 2:
            return atheris.Mutate(data, largest)
        return mutate(bytes(data), random.Random(seed))[:largest]

    atheris.Setup([arguments[0], *arguments[2:]], one_input, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
