"""Proxied losses from cached answers: the large model's and the small base's are computed once per task and split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache

from fedpt_secure.data.examples import Example
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.proxy.arithmetic import restricted_logprobs, spread_token_logprobs

ROWS = 256
_BASE_ANSWERS: dict[tuple[Path, int], Tensor] = {}
"""The small base's answers of this process by the file of the large model's; one proxy per process."""


@dataclass(frozen=True)
class Answers:
    """What models say at every judged position, positions in the order of the examples.

    Attributes:
        large: float16 `[positions, small_vocab]`; the large model's log-probabilities of the small classes.
        target: float32 `[positions]`; its log-probability of the token that came.
        base: float16 `[positions, small_vocab]`; the small base's log-probabilities.
        classes: int64 `[positions]`; the small class of the token that came.
        large_ids: int64 `[positions]`; the token that came.
        record: int64 `[positions]`; the example it belongs to.
    """

    large: Tensor
    target: Tensor
    base: Tensor
    classes: Tensor
    large_ids: Tensor
    record: Tensor

    def with_base(self, base: Tensor) -> Answers:
        """The same with another small base."""
        return replace(self, base=base)

    def losses(self, values: Tensor) -> np.ndarray:
        """Sums over each record's positions, float64 `[records]`."""
        sums = torch.zeros(int(self.record.max()) + 1, dtype=torch.float64)
        return sums.index_add_(0, self.record, values.double()).numpy()


@torch.no_grad()
def large_answers(
    model: nn.Module,
    examples: Sequence[Example],
    token_map: TokenMap,
    path: Path,
    device: torch.device,
    prefix: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Score the judged positions of examples under a `LlamaForCausalLM`, in the small classes; cached at `path`.

    A `prefix` of ids is read before every example, in place of its opening separator unless it ends with one.
    """
    if path.exists():
        found = load_file(path)
        return found["large"], found["target"]
    cache = DynamicCache(config=model.config)
    skipped = 1 if prefix else 0
    if prefix:
        model.model(input_ids=torch.tensor([prefix], device=device), past_key_values=cache, use_cache=True)
    classes, target = [], []
    for example in examples:
        # With a prefix, the prediction of the first token stands at the prefix's last position: read that again.
        ids = torch.tensor([[*prefix[len(prefix) - skipped :], *example.ids[skipped:-1]]], device=device)
        if surplus := cache.get_seq_length() - (len(prefix) - skipped):
            cache.crop(-surplus)
        hidden = model.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        logprobs = model.lm_head(hidden[0, example.loss_from - 1 :]).float().log_softmax(-1)
        came = torch.tensor(example.ids[example.loss_from :], device=device)
        classes.append(restricted_logprobs(logprobs, token_map).half().cpu())
        target.append(logprobs.gather(1, came[:, None])[:, 0].cpu())
    result = {"large": torch.cat(classes), "target": torch.cat(target)}
    save_file(result, path)
    return result["large"], result["target"]


@torch.no_grad()
def small_logprobs(model: nn.Module, examples: Sequence[Example], table: Tensor, device: torch.device) -> Tensor:
    """float16 `[positions, small_vocab]` of the small LM, computed in float32."""
    parts = []
    for example in examples:
        ids = table[torch.tensor(example.ids[:-1])][None].to(device)
        logits = model(input_ids=ids, use_cache=False).logits[0, example.loss_from - 1 :]
        parts.append(logits.float().log_softmax(-1).half().cpu())
    return torch.cat(parts)


def answers(
    large: nn.Module | None,
    base: nn.Module,
    examples: Sequence[Example],
    token_map: TokenMap,
    table: Tensor,
    path: Path,
    device: torch.device,
    limit: int = 0,
) -> Answers:
    """Everything but the tuned side; `large` may be None where its answers are cached.

    With a `limit`, of so many first examples only.
    """
    if large is None and not path.exists():
        raise FileNotFoundError(f"{path}: run the subcommand `score` first")
    classes, target = large_answers(large, examples, token_map, path, device)  # type: ignore[arg-type]
    if limit:
        examples = examples[:limit]
        positions = sum(len(example.ids) - example.loss_from for example in examples)
        classes, target = classes[:positions], target[:positions]
    if (path, limit) not in _BASE_ANSWERS:
        _BASE_ANSWERS[path, limit] = small_logprobs(base, examples, table, device)
    came = torch.cat([torch.tensor(example.ids[example.loss_from :]) for example in examples])
    counts = torch.tensor([len(example.ids) - example.loss_from for example in examples])
    return Answers(
        large=classes,
        target=target,
        base=_BASE_ANSWERS[path, limit],
        classes=table[came],
        large_ids=came,
        record=torch.repeat_interleave(torch.arange(len(examples)), counts),
    )


Shift = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From float32 log-probabilities (large, base, tuned), `[rows, classes]` each, the new unnormalised class scores."""


def linear(alpha: float, *, temperature: float = 1.0, base_weight: float | None = None) -> Shift:
    """`(large + alpha tuned - beta base) / temperature`; beta is alpha unless given."""
    beta = alpha if base_weight is None else base_weight

    def scores(large: Tensor, base: Tensor, tuned: Tensor) -> Tensor:
        return (large + alpha * tuned - beta * base) / temperature

    return scores


def mixture(alpha: float, large_weight: float) -> Shift:
    """`large_weight large + (1 - large_weight) tuned + alpha (tuned - base)`: part of the tuned small LM itself."""

    def scores(large: Tensor, base: Tensor, tuned: Tensor) -> Tensor:
        return large_weight * large + (1 - large_weight) * tuned + alpha * (tuned - base)

    return scores


def blend(alpha: float, share: float) -> Shift:
    """`share` of the probability from the tuned small LM itself, the rest from the proxied large model."""

    def scores(large: Tensor, base: Tensor, tuned: Tensor) -> Tensor:
        shifted = (large + alpha * (tuned - base)).log_softmax(-1)
        return torch.logaddexp(shifted + math.log1p(-share), tuned.log_softmax(-1) + math.log(share))

    return scores


def agreement(alpha: float, strength: float) -> Shift:
    """Alpha falls with the divergence of the small base from the large model: `alpha / (1 + strength KL)`."""

    def scores(large: Tensor, base: Tensor, tuned: Tensor) -> Tensor:
        divergence = (large.exp() * (large - base)).sum(1, keepdim=True).clamp(min=0)
        return large + alpha / (1 + strength * divergence) * (tuned - base)

    return scores


def confidence(alpha: float, strength: float) -> Shift:
    """Alpha falls with the tuned small LM's entropy: `alpha exp(-strength (H - 2))`, at most 2 alpha."""

    def scores(large: Tensor, base: Tensor, tuned: Tensor) -> Tensor:
        entropy = -(tuned.exp() * tuned).sum(1, keepdim=True)
        return large + (alpha * (-strength * (entropy - 2.0)).exp()).clamp(max=2 * alpha) * (tuned - base)

    return scores


def top_k(alpha: float, k: int) -> Shift:
    """Only the large model's `k` most likely classes are shifted; the others keep their probability before norming."""

    def scores(large: Tensor, base: Tensor, tuned: Tensor) -> Tensor:
        kept = torch.zeros_like(large).scatter_(1, large.topk(k, dim=1).indices, 1.0)
        return large + alpha * kept * (tuned - base)

    return scores


def clipped_shift(alpha: float, bound: float) -> Shift:
    """The shift of each class is cut to `[-bound, bound]` nats before alpha."""

    def scores(large: Tensor, base: Tensor, tuned: Tensor) -> Tensor:
        return large + alpha * (tuned - base).clamp(-bound, bound)

    return scores


def proxied(found: Answers, tuned: Tensor, rules: dict[str, Shift]) -> dict[str, np.ndarray]:
    """Negative log-likelihood per record under each rule, float64 `[records]`."""
    return {name: found.losses(values) for name, values in proxied_tokens(found, tuned, rules).items()}


@torch.no_grad()
def proxied_tokens(found: Answers, tuned: Tensor, rules: dict[str, Shift]) -> dict[str, Tensor]:
    """Negative log-likelihood per position under each rule, float32 `[positions]`.

    Inside a class (the unknown one) tokens keep the large model's proportions.
    """
    totals = {name: torch.empty(len(found.target)) for name in rules}
    for begin in range(0, len(found.target), ROWS):
        part = slice(begin, begin + ROWS)
        large, base, after = found.large[part].float(), found.base[part].float(), tuned[part].float()
        own = found.classes[part, None]
        inside = found.target[part] - large.gather(1, own)[:, 0]
        for name, rule in rules.items():
            scores = rule(large, base, after)
            totals[name][part] = scores.logsumexp(1) - scores.gather(1, own)[:, 0] - inside
    return totals


def small_alone(found: Answers, logprobs: Tensor, token_map: TokenMap) -> np.ndarray:
    """Negative log-likelihood per record of a small LM over the large vocabulary (`evaluation.held_out`'s rule)."""
    values = torch.cat(
        [
            spread_token_logprobs(logprobs[a : a + ROWS].float(), found.large_ids[a : a + ROWS], token_map)
            for a in range(0, len(logprobs), ROWS)
        ]
    )
    return found.losses(-values)
