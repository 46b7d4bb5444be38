"""Proxy tuning in log space: how the difference between two small models moves a large one.

Liu et al. 2024 (arXiv 2401.08565) steer a large model by `softmax(s_large + s_tuned - s_base)`, all three over one
vocabulary. Here the small models know fewer tokens: their classes are the mapped tokens and, if the map leaves any
out, one *unknown* class for all the others. With the large model's log-probabilities `L` and the *shift* of a class

    shift(c) = alpha (log p_tuned(c) - log p_base(c)),        log p_proxy(t) = L(t) + shift(class of t) - log Z.

**Why tokens outside the map take the unknown class's shift, not 0** (`outside="unknown"`, the default). Logits are
known up to a constant, so a shift means something only as a difference between classes. The small models'
probabilities are normalised over the mapped tokens *and* the unknown class: if tuning moves mass from the mapped
tokens to the unknown class, every mapped shift falls by a common amount. Holding the outside tokens at 0 reads that
common amount as a change of the outside mass and ignores what the small model says about it; with raw logits instead
of log-probabilities it is not even defined, because a constant added to one model's logits would change the answer.
With the unknown class's own shift there is a test that 0 fails: where the large model agrees with the small base
(class by class), alpha = 1 gives exactly the small tuned model's class probabilities. Among themselves the outside
tokens keep the large model's proportions, in both rules. `outside="zero"` is kept for comparison.

Guarantees, with either rule: adding a constant to the small logits changes nothing; alpha = 0, or base equal to
tuned, gives the large model back; with identical vocabularies the formula is Liu et al.'s. Proxy tuning adds no
privacy: the full proxied and large distributions together reveal the small tuned model exactly (docs/proxy.md).

All functions take log-probabilities or logits of any leading shape `[...]`, with `V` large tokens and `v` small
classes, compute in float32 or wider, and never leave log space. The small models' values must be finite; the large
model's may be -inf (a token the API excludes stays excluded).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fedpt_secure.errors import ConfigError, ModelError
from fedpt_secure.lm.token_map import TokenMap

OutsideRule = Literal["unknown", "zero"]


def shifted_logprobs(
    large: Tensor,
    base: Tensor,
    tuned: Tensor,
    token_map: TokenMap,
    alpha: float,
    *,
    outside: OutsideRule = "unknown",
) -> Tensor:
    """The proxied distribution over the large vocabulary.

    Args:
        large: `[..., V]`, log-probabilities (or logits) of the large model.
        base: `[..., v]`, logits or log-probabilities of the small model as pretrained.
        tuned: `[..., v]`, the same of the tuned small model.
        token_map: which large token belongs to which small class.
        alpha: strength; 0 is the large model alone, 1 the formula of the paper.
        outside: the shift of tokens outside the map (module docstring).

    Returns:
        Normalised log-probabilities `[..., V]`.

    Raises:
        ModelError: a width does not fit the map.
        ConfigError: alpha is not a finite number.
    """
    _check_widths(token_map, large=large)
    _check_alphas([alpha])
    shift = tuning_shift(base, tuned, token_map, outside=outside)
    small_of_large = token_map.tensors(large.device).small_of_large
    return torch.log_softmax(_wide(large) + alpha * shift.index_select(-1, small_of_large), dim=-1)


def shifted_token_logprobs(
    large: Tensor,
    base: Tensor,
    tuned: Tensor,
    targets: Tensor,
    token_map: TokenMap,
    alphas: Sequence[float],
    *,
    outside: OutsideRule = "unknown",
) -> Tensor:
    """The proxied log-probability of one token per position, for several alphas at once.

    The normaliser needs the small classes only: `Z = sum over classes of P_large(class) exp(shift(class))`. So the
    large vocabulary is read once, whatever the number of alphas.

    Args:
        large: `[..., V]`, *normalised* log-probabilities of the large model.
        base: `[..., v]`, logits or log-probabilities.
        tuned: `[..., v]`, logits or log-probabilities.
        targets: int64 `[...]`, large token ids.
        token_map: which large token belongs to which small class.
        alphas: strengths, at least one.
        outside: the shift of tokens outside the map (module docstring).

    Returns:
        `[alphas, ...]`; equal to gathering `shifted_logprobs` at the targets, up to rounding.

    Raises:
        ModelError: a width does not fit the map.
        ConfigError: an alpha is not a finite number, or there is none.
    """
    _check_alphas(alphas)
    shift = tuning_shift(base, tuned, token_map, outside=outside)
    classes = restricted_logprobs(large, token_map)
    own = _wide(large).gather(-1, targets[..., None]).squeeze(-1)
    own_class = token_map.tensors(large.device).small_of_large[targets]
    own_shift = shift.gather(-1, own_class[..., None]).squeeze(-1)
    return torch.stack([own + alpha * own_shift - torch.logsumexp(classes + alpha * shift, dim=-1) for alpha in alphas])


def tuning_shift(base: Tensor, tuned: Tensor, token_map: TokenMap, *, outside: OutsideRule = "unknown") -> Tensor:
    """`log p_tuned - log p_base` per small class, `[..., v]`; 0 at the unknown class under `outside="zero"`.

    Raises:
        ModelError: a width does not fit the map, or a value is not finite.
    """
    for name, values in (("base", base), ("tuned", tuned)):
        if values.shape[-1] != token_map.small_vocabulary_size:
            raise ModelError(
                f"the {name} small model gave {values.shape[-1]} values a position;"
                f" the token map has {token_map.small_vocabulary_size} small tokens",
                hint="cut a padded output layer to the real tokens first",
            )
    shift = torch.log_softmax(_wide(tuned), dim=-1) - torch.log_softmax(_wide(base), dim=-1)
    if not bool(torch.isfinite(shift).all()):
        raise ModelError(
            "the small model's predictions are not finite",
            hint="its weights are damaged or the training diverged; lower the learning rate",
        )
    if outside == "zero" and token_map.unknown_id is not None:
        shift[..., token_map.unknown_id] = 0.0
    return shift


def restricted_logprobs(large: Tensor, token_map: TokenMap) -> Tensor:
    """The large model's log-probabilities of the small classes, `[..., v]`.

    A mapped token keeps its own; the unknown class gets the sum over all tokens outside the map, added up directly: the
    difference `1 - mapped mass` would lose all digits where that mass is near 1.
    """
    _check_widths(token_map, large=large)
    large = _wide(large)
    index = token_map.tensors(large.device)
    classes = large.index_select(-1, index.large_of_small)
    if token_map.unknown_id is not None:
        classes[..., token_map.unknown_id] = torch.logsumexp(large.index_select(-1, index.outside), dim=-1)
    return classes


def spread_logprobs(small: Tensor, token_map: TokenMap) -> Tensor:
    """A small model as a proper distribution over the large vocabulary, `[..., V]`.

    The unknown class's mass is spread evenly over the tokens outside the map: the small model cannot tell them apart,
    so this is what it predicts, and its loss per large token is comparable with the other models'.

    Args:
        small: `[..., v]`, logits or log-probabilities.
        token_map: which large token belongs to which small class.

    Raises:
        ModelError: the width does not fit the map.
    """
    return _spread(small, token_map).index_select(-1, token_map.tensors(small.device).small_of_large)


def spread_token_logprobs(small: Tensor, targets: Tensor, token_map: TokenMap) -> Tensor:
    """`spread_logprobs` at one large token per position: `[..., v]` and int64 `[...]` give `[...]`."""
    own_class = token_map.tensors(small.device).small_of_large[targets]
    return _spread(small, token_map).gather(-1, own_class[..., None]).squeeze(-1)


def _spread(small: Tensor, token_map: TokenMap) -> Tensor:
    if small.shape[-1] != token_map.small_vocabulary_size:
        raise ModelError(
            f"the small model gave {small.shape[-1]} values a position;"
            f" the token map has {token_map.small_vocabulary_size} small tokens",
            hint="cut a padded output layer to the real tokens first",
        )
    per_token = torch.log_softmax(_wide(small), dim=-1)
    if token_map.unknown_id is not None:
        per_token[..., token_map.unknown_id] -= math.log(token_map.outside.size)
    return per_token


def _check_widths(token_map: TokenMap, *, large: Tensor) -> None:
    if large.shape[-1] != token_map.large_vocabulary_size:
        raise ModelError(
            f"the large model gave {large.shape[-1]} values a position;"
            f" the token map was made for {token_map.large_vocabulary_size} large tokens",
            hint="cut a padded output layer to the real tokens first",
        )


def _check_alphas(alphas: Sequence[float]) -> None:
    wrong = [alpha for alpha in alphas if not math.isfinite(alpha)]
    if wrong or not alphas:
        raise ConfigError(f"alpha is {wrong[0] if wrong else 'missing'}; it must be a finite number")


def _wide(values: Tensor) -> Tensor:
    """Float32, or float64 where that came in."""
    return values if values.dtype == torch.float64 else values.float()
