"""The audit's part `server_view`: what the server gets out of what it receives, and whether its masked vectors tell."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from fedpt_secure.attacks.findings import Check, Finding
from fedpt_secure.attacks.matching import matching_curves
from fedpt_secure.attacks.settings import TimeBudget
from fedpt_secure.attacks.span import span_check
from fedpt_secure.attacks.subject import Subject
from fedpt_secure.attacks.uniformity import difference, uniformity_p_values
from fedpt_secure.crypto import CryptoError
from fedpt_secure.crypto import messages as m
from fedpt_secure.crypto.packing import unpack
from fedpt_secure.data import Record
from fedpt_secure.errors import RunDirectoryError
from fedpt_secure.federation import load_releases, load_server_view
from fedpt_secure.privacy import clipped_sum
from fedpt_secure.progress import Progress

MOST_CANDIDATES, FEWEST_CANDIDATES = 1000, 32
TRIALS = 60
_OTHER_TEXTS = 48
_PREFIX = "my door code is "
_MOST_ELEMENTS = 500_000


def audit_server_view(
    subject: Subject, budget: TimeBudget, progress: Progress, rng: np.random.Generator, *, alpha: float
) -> Finding:
    """Candidate matching on the run's small LM, the span check, and statistics of the recorded masked vectors."""
    result: dict[str, Any] = {"matching": _matching(subject, budget, progress, rng), "span": span_check(rng)}
    transcript = _transcript(subject, alpha)
    result["transcript"] = transcript
    checks = [_matching_check(result["matching"])]
    if transcript["recorded"]:
        sentence = (
            f"{transcript['vectors']} masked vectors of the server's transcript ({transcript['elements']} elements) "
            + (
                f"do not look uniform: {', '.join(transcript['alarms'][:4])}"
                if transcript["alarms"]
                else "look uniform"
            )
        )
        checks.append(Check("masked vectors", bool(transcript["alarms"]), True, alpha, sentence))
    return Finding(result, tuple(checks))


def _matching(
    subject: Subject, budget: TimeBudget, progress: Progress, rng: np.random.Generator
) -> list[dict[str, Any]]:
    others = subject.members()
    chosen = [others[index] for index in rng.permutation(len(others))[:_OTHER_TEXTS]]
    began = time.monotonic()
    background = np.array([_clipped(subject, record) for record in chosen])
    each = (time.monotonic() - began) / len(chosen)
    count = budget.fit(
        "candidate matching, candidates",
        MOST_CANDIDATES,
        seconds_each=each,
        share=0.06,
        minimum=FEWEST_CANDIDATES,
        consequence="no more than log2 of {count} bits can be recovered",
    )
    numbers = rng.permutation(10_000)[:count]
    with progress.task("candidate matching", count, unit="candidates") as task:
        rows = []
        for number in numbers:
            rows.append(_clipped(subject, Record(f"{_PREFIX}{number:04d}")))
            task.advance()
    return matching_curves(np.array(rows), background, trials=TRIALS, rng=rng)


def _clipped(subject: Subject, record: Record) -> npt.NDArray[np.float64]:
    clip_norm = subject.config.privacy.clip_norm
    small = subject.models.small
    before = small.adapter_vector()
    small.load_adapter_vector(np.zeros_like(before))
    try:
        return clipped_sum(small, [subject.small_example(record)], clip_norm=clip_norm).vector / clip_norm
    finally:
        small.load_adapter_vector(before)


def _matching_check(rows: list[dict[str, Any]]) -> Check:
    def of(what: str, clients: int, sigma: float = 0.0) -> float:
        return float(
            next(r["bits"]["value"] for r in rows if (r["what"], r["clients"], r["sigma"]) == (what, clients, sigma))
        )

    sentence = (
        f"of {rows[0]['most_bits']:.1f} bits a server recovers {of('bare', 1):.1f} from a bare update, "
        f"{of('masked', 1):.1f} from a masked one, {of('sum', 8):.1f} from a sum of 8, {of('noised_sum', 8, 1.0):.1f} "
        f"with noise of one clip norm (guessing: {rows[0]['chance_bits']:.2f})"
    )
    return Check("candidate matching", False, False, 0.0, sentence)


def _transcript(subject: Subject, alpha: float) -> dict[str, Any]:
    """Statistics over everything, over differences within a round, and over one client's rounds."""
    config = subject.config
    if config.federation.aggregator != "masks" or not config.audit.record_server_view:
        return {
            "recorded": False,
            "skipped": "no server view was recorded (train --record-server-view, under --aggregator masks)",
        }
    bits, samples = config.federation.ring_bits, _samples(subject)
    tests: list[dict[str, Any]] = [
        {"sample": name, "name": test, "p": value}
        for name, (sample, plain) in samples.items()
        for test, value in uniformity_p_values(sample, bits, plain).items()
    ]
    limit = alpha / len(tests)
    vectors = sum(len(load_server_view(subject.directory, index)) for index in range(config.federation.rounds))
    return {
        "recorded": True,
        "vectors": vectors,
        "elements": int(samples["masked vectors"][0].size),
        "tests": tests,
        "alarms": [f"{test['sample']}: {test['name']}" for test in tests if test["p"] < limit],
    }


_Sample = tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.float64] | None]


def _samples(subject: Subject) -> dict[str, _Sample]:
    ids = {hashlib.sha256(name.encode()).hexdigest(): name for name in subject.text.client_ids}
    everything, plain, within, between = [], [], [], []
    last: dict[str, npt.NDArray[np.unsignedinteger]] = {}
    for index in range(subject.config.federation.rounds):
        releases = load_releases(subject.directory, index)
        previous = None
        for stem, content in load_server_view(subject.directory, index).items():
            vector = _vector(content, subject.config.federation.ring_bits, f"{stem} of round {index}")
            everything.append(vector)
            plain.append(releases.get(f"client/{ids.get(stem, '')}"))
            if previous is not None and previous.size == vector.size:
                within.append(difference(previous, vector, subject.config.federation.ring_bits))
            if stem in last and last[stem].size == vector.size:
                between.append(difference(last[stem], vector, subject.config.federation.ring_bits))
            previous = last[stem] = vector
    if not everything:
        raise RunDirectoryError(
            "the run records the server's view, but none is there", hint="restore audit/server_view, or train again"
        )
    known = [
        value
        for value, vector in zip(plain, everything, strict=True)
        if value is not None and value.size == vector.size
    ]
    samples: dict[str, _Sample] = {
        "masked vectors": (
            _joined(everything),
            np.concatenate(known).astype(np.float64)[:_MOST_ELEMENTS] if len(known) == len(everything) else None,
        )
    }
    if within:
        samples["differences between clients of a round"] = (_joined(within), None)
    if between:
        samples["differences between a client's rounds"] = (_joined(between), None)
    return samples


def _joined(vectors: list[npt.NDArray[np.unsignedinteger]]) -> npt.NDArray[np.unsignedinteger]:
    return np.concatenate(vectors)[:_MOST_ELEMENTS]


def _vector(content: bytes, bits: int, what: str) -> npt.NDArray[np.unsignedinteger]:
    try:
        packed = msgspec.msgpack.decode(content, type=m.MaskedVector).vector
        return unpack(packed, len(packed) * 8 // bits, bits)
    except (msgspec.MsgspecError, CryptoError, ValueError) as error:
        raise RunDirectoryError(f"the masked vector of {what} is damaged: {error}", hint="train again") from None
