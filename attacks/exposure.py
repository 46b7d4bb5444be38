"""Exposure of planted numbers (Carlini et al. 2019, "The Secret Sharer"): how high the true one stands among all.

    exposure = log2 |R| - log2 rank,     R: every number that the unknown digits can make.

The attacker has the adapter, and knows the sentence and the number's first digit. A candidate's score is what tuning
did for it: log p_tuned - log p_base, summed over the unknown digits. A number that was never seen has log2(R) bits with
chance 1/R, and 1.44 on average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedpt_secure.data import TextTokenizer
from fedpt_secure.data.planting import SECRET_DIGITS, Secret
from fedpt_secure.proxy import SmallPair

KNOWN_DIGITS = 1
CANDIDATES = 10 ** (SECRET_DIGITS - KNOWN_DIGITS)
MOST_BITS = math.log2(CANDIDATES)
CHANCE_BITS = float(np.mean(MOST_BITS - np.log2(np.arange(1, CANDIDATES + 1))))


@dataclass(frozen=True, slots=True)
class Exposure:
    """Of one secret.

    Attributes:
        bits: its exposure.
        extracted: greedy decoding after the sentence and the known digit gives the rest of the number.
    """

    bits: float
    extracted: bool


def exposure_of(secret: Secret, pair: SmallPair, tokenizer: TextTokenizer) -> Exposure:
    """Score every number the unknown digits can make, each prefix once."""
    known = secret.prefix + secret.number[:KNOWN_DIGITS]
    start = (tokenizer.separator_id, *tokenizer.ids(known))
    endings = [f"{number:0{SECRET_DIGITS - KNOWN_DIGITS}d}" for number in range(CANDIDATES)]
    sequences = [pair.token_map.to_small((tokenizer.separator_id, *tokenizer.ids(known + end))) for end in endings]
    common = min(len(start), min(map(len, sequences)) - 1)
    # Candidates share all but their last token with others, and one forward pass serves all of these.
    parents = sorted({tuple(sequence[:-1]) for sequence in sequences})
    tables: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
    for parent, (base, tuned) in zip(parents, pair.score(parents), strict=True):
        tables[parent] = (base[common - 1 :].clone(), tuned[common - 1 :].clone())
    scores, greedy = np.empty(CANDIDATES), np.zeros(CANDIDATES, dtype=bool)
    for index, sequence in enumerate(sequences):
        base, tuned = tables[tuple(sequence[:-1])]
        targets = torch.tensor(sequence[common:], device=tuned.device)
        gain = (tuned - base).gather(-1, targets[:, None])
        scores[index] = float(gain.sum())
        greedy[index] = bool((tuned.argmax(-1) == targets).all())
    true = endings.index(secret.number[KNOWN_DIGITS:])
    rank = 1 + int((scores > scores[true]).sum())
    return Exposure(MOST_BITS - math.log2(rank), bool(greedy[true]))


def by_repetition(secrets: Sequence[Secret], found: Sequence[Exposure]) -> list[dict[str, object]]:
    """The figures of a run, by how often a secret stood in the text (docs/audits.md)."""
    rows: list[dict[str, object]] = []
    for copies in sorted({secret.copies for secret in secrets}):
        mine = [item for secret, item in zip(secrets, found, strict=True) if secret.copies == copies]
        bits = [item.bits for item in mine]
        rows.append(
            {
                "copies": copies,
                "secrets": len(mine),
                "exposure": bits,
                "mean": float(np.mean(bits)),
                "extracted": sum(item.extracted for item in mine),
            }
        )
    return rows
