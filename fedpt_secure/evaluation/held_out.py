"""Held-out loss of the four arms: large base, small base, small tuned, and the large one under each steering rule.

All arms are judged on the same large tokens at the same positions. The small arms are made proper distributions over
the large vocabulary by spreading the unknown class evenly over the tokens outside the map
(`proxy.arithmetic.spread_logprobs`): what a small LM cannot name costs it the full price, so the four losses compare.

Held-out text is private data. What is computed here may be reported; where it also *chooses* something (an alpha, a
checkpoint), that choice costs privacy budget this module does not account for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedpt_secure.data.examples import Example
from fedpt_secure.errors import BlackBoxError, DataError
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.progress import SILENT, Progress
from fedpt_secure.proxy.arithmetic import spread_token_logprobs
from fedpt_secure.proxy.black_box import BlackBoxLM, guard
from fedpt_secure.proxy.small_pair import SmallPair
from fedpt_secure.proxy.steering import SteeringRule, steered_token_logprobs

FloatVector = npt.NDArray[np.float64]

# Small enough that the temporaries stay in cache and are reused; buffers of 128 rows cost 2-3 times as much on a CPU.
_ROWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class ArmsEvaluation:
    """Sums over the judged tokens of each record, in the order of the examples.

    Attributes:
        tokens: `[records]`, how many tokens of a record are judged; at least 1.
        large_base: `[records]`, the negative log-likelihood of those tokens under the black box alone, in nats.
        small_base: the same under the small LM as pretrained.
        small_tuned: the same under the tuned small LM.
        proxy_tuned: rule -> the same under the steered black box.
    """

    tokens: npt.NDArray[np.int64]
    large_base: FloatVector
    small_base: FloatVector
    small_tuned: FloatVector
    proxy_tuned: Mapping[SteeringRule, FloatVector]

    def loss(self, nll: FloatVector) -> float:
        """Loss per token in nats of one arm: total negative log-likelihood over total tokens."""
        return float(nll.sum() / self.tokens.sum())


def evaluate_arms(
    examples: Sequence[Example],
    black_box: BlackBoxLM,
    pair: SmallPair,
    rules: Sequence[SteeringRule],
    progress: Progress = SILENT,
) -> ArmsEvaluation:
    """Score examples under all arms, in one pass over the large model whatever the number of rules.

    Each record is judged as a sequence of its own, so the sums do not depend on the other records or their order,
    beyond float32 rounding.

    Args:
        examples: at least one; each with a token to judge.
        black_box: the large model; must score whole texts over the full vocabulary.
        pair: base and tuned small LM; only the tuned side differs between rounds.
        rules: how the small LM steers, at least one. A token's place is counted from the first judged token, which is
            where the text begins, or the response.
        progress: a bar that counts judged tokens.

    Raises:
        DataError: there are no examples, or one has no token to judge.
        BlackBoxError: the black box misbehaves, or gives a held-out token probability 0.
        ConfigError: there is no rule.
        ModelError: the small LM's context is too short, or its predictions are not finite.
    """
    _check(examples)
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].ids))
    # The last token of a record is only ever predicted, so no model needs to read it.
    sequences = [examples[index].ids[:-1] for index in order]
    tokens = np.array([len(example.ids) - example.loss_from for example in examples], dtype=np.int64)
    sums = np.zeros((3 + len(rules), len(examples)))
    large_answers = guard(black_box).score(sequences)
    small_answers = pair.score([pair.token_map.to_small(sequence) for sequence in sequences])
    with progress.task("held-out loss", int(tokens.sum()), unit="tokens") as task:
        for index, large, (base, tuned) in zip(order, large_answers, small_answers, strict=True):
            example = examples[index]
            # Views from here on: a dense answer is the largest thing in memory.
            judged = [side.to(large.device)[example.loss_from - 1 :] for side in (large, base, tuned)]
            targets = torch.tensor(example.ids[example.loss_from :], device=large.device)
            places = torch.arange(len(targets), device=large.device)
            _check_support(judged[0], targets)
            for first in range(0, len(targets), _ROWS_AT_ONCE):
                rows = slice(first, first + _ROWS_AT_ONCE)
                big, plain, tuning = (side[rows] for side in judged)
                sums[:, index] -= _token_logprobs(
                    big, plain, tuning, targets[rows], pair.token_map, rules, places[rows]
                )
            task.advance(len(targets))
    return ArmsEvaluation(
        tokens=tokens,
        large_base=sums[0],
        small_base=sums[1],
        small_tuned=sums[2],
        proxy_tuned=dict(zip(rules, sums[3:], strict=True)),
    )


def black_box_losses(
    examples: Sequence[Example], black_box: BlackBoxLM, progress: Progress = SILENT, *, name: str = "held-out loss"
) -> FloatVector:
    """Negative log-likelihood of each record's judged tokens under one black box, in nats: float64 `[records]`.

    The same figure as `ArmsEvaluation.large_base`, for a model that stands alone (the directly tuned one).

    Args:
        examples: at least one; each with a token to judge.
        black_box: must score whole texts over the full vocabulary.
        progress: a bar that counts judged tokens.
        name: of the bar.

    Raises:
        DataError: there are no examples, or one has no token to judge.
        BlackBoxError: the black box misbehaves, or gives a held-out token probability 0.
    """
    _check(examples)
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].ids))
    sums = np.zeros(len(examples))
    answers = guard(black_box).score([examples[index].ids[:-1] for index in order])
    total = sum(len(example.ids) - example.loss_from for example in examples)
    with progress.task(name, total, unit="tokens") as task:
        for index, answer in zip(order, answers, strict=True):
            example = examples[index]
            judged = answer[example.loss_from - 1 :]
            targets = torch.tensor(example.ids[example.loss_from :], device=judged.device)
            _check_support(judged, targets)
            sums[index] = -float(judged.gather(-1, targets[:, None]).double().sum())
            task.advance(len(targets))
    return sums


def _token_logprobs(
    large: Tensor,
    base: Tensor,
    tuned: Tensor,
    targets: Tensor,
    token_map: TokenMap,
    rules: Sequence[SteeringRule],
    places: Tensor,
) -> FloatVector:
    """Sums over positions: large base, small base, small tuned, the large one by rule; float64 `[3 + rules]`."""
    per_token = torch.cat(
        [
            large.gather(-1, targets[:, None]).T,
            spread_token_logprobs(base, targets, token_map)[None],
            spread_token_logprobs(tuned, targets, token_map)[None],
            steered_token_logprobs(large, base, tuned, targets, token_map, rules, places),
        ]
    )
    sums: FloatVector = per_token.double().sum(dim=-1).cpu().numpy()
    return sums


def _check(examples: Sequence[Example]) -> None:
    if not examples:
        raise DataError("there is no held-out record to evaluate on", hint="raise data.held_out_fraction")
    for index, example in enumerate(examples):
        if not 1 <= example.loss_from < len(example.ids):
            raise DataError(
                f"held-out record {index} has {len(example.ids)} tokens and is judged from position"
                f" {example.loss_from}; nothing is left to judge",
                hint="raise the context length, so that prompts leave room for a response",
            )


def _check_support(large: Tensor, targets: Tensor) -> None:
    excluded = torch.isneginf(large.gather(-1, targets[:, None]).squeeze(-1))
    if bool(excluded.any()):
        raise BlackBoxError(
            f"the black box gives token {int(targets[excluded][0])} of a held-out record probability 0,"
            " so its loss is infinite",
            hint="use an API that returns the full vocabulary without excluding tokens",
        )
