"""How three predictions become one: the shift of proxy tuning, and a blend with the tuned small LM that falls by place.

Proxy tuning (`proxy.arithmetic`) moves the large model by what tuning *changed* in the small one. At a record's first
tokens that wastes the better answer: a large model that has read nothing yet spreads its mass over the whole
vocabulary, while the tuned small LM has learned how such texts begin. There the small LM itself should be asked; later,
where the context tells the large model what it reads, hardly. With `p_linear` the shifted distribution at `alpha`,

    p(t) = (1 - s) p_linear(t) + s p_tuned(t),        s = share at the token's place,

where `p_tuned(t)` is the tuned small LM over the large vocabulary: a mapped token has its class's probability, and the
tokens of the unknown class share the class's probability in the *large* model's proportions, because the small LM
cannot tell them apart and the large one can.

The *place* of a token is its index in the record's text, 0 for the first: after the separator for a plain text, after
the prompt for a response. The rule is a handful of public constants, chosen on public text (docs/LOG.md), so that it
costs no privacy; whatever chose them by private text would.

**Computed over the small classes.** Both parts keep the large model's proportions inside a class, so the blend does
too, and the whole rule is a distribution over the small classes (`steered_classes`); the large vocabulary is read once.

**Guarantees**, each a test: the result is normalised; `SteeringRule(alpha=a)` is `shifted_logprobs` at `a`; alpha 0
without shares is the large model; share 1 is the tuned small LM; a constant added to any model's logits changes
nothing; a token that the large model excludes (-inf) stays excluded, and the share it would have got from the small LM
goes to the others in proportion.

Values are log-probabilities or logits of any leading shape `[...]`, with `V` large tokens and `v` small classes,
computed in float32 or wider and never outside log space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpt_secure.config import ProxyConfig, Shares, require_shares
from fedpt_secure.errors import ConfigError
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.proxy.arithmetic import restricted_logprobs, tuning_shift


@dataclass(frozen=True, slots=True)
class SteeringRule:
    """The public constants of a steered prediction; `SteeringRule(alpha=a)` is plain proxy tuning.

    Attributes:
        alpha: weight of the small LM's shift.
        shares: `(from_place, share)`, places ascending: from that place on, up to the next entry, the tuned small LM's
            own prediction has this share. Before the first entry, and without any, it has none.

    Raises:
        ConfigError: alpha is not a finite number, a share is not in [0, 1], or the places do not ascend from 0.
    """

    alpha: float
    shares: Shares = ()

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise ConfigError(f"alpha is {self.alpha}; it must be a finite number")
        try:
            require_shares(self.shares)
        except ValueError as error:
            raise ConfigError(f"shares: {error}") from None

    @classmethod
    def of(cls, settings: ProxyConfig, *, responses: bool) -> SteeringRule:
        """The rule that a run's settings describe, for texts or for responses to a prompt."""
        return cls(alpha=settings.alpha, shares=settings.response_shares if responses else settings.shares)

    @property
    def needs_the_small_lm(self) -> bool:
        """Whether the small LM has any say; if not, the rule is the large model alone."""
        return self.alpha != 0 or self.blends

    @property
    def blends(self) -> bool:
        """Whether the tuned small LM's own prediction has a share anywhere."""
        return any(share > 0 for _, share in self.shares)

    def at_strength(self, alpha: float) -> SteeringRule:
        """This rule with its alpha turned to another value, and the shares with it, in proportion and up to 1.

        A user's dial at decode time: 0 is the large model alone, whatever the shares are. A rule whose own alpha is 0
        has no proportion; its shares stay, except at 0.

        Raises:
            ConfigError: alpha is negative or not finite.
        """
        if not 0 <= alpha < math.inf:
            raise ConfigError(f"alpha is {alpha}; it must be a finite number of at least 0")
        if alpha == 0:
            return SteeringRule(alpha=0.0)
        factor = alpha / self.alpha if self.alpha else 1.0
        return SteeringRule(alpha, tuple((place, min(1.0, share * factor)) for place, share in self.shares))

    def share_at(self, places: Tensor) -> Tensor:
        """The tuned small LM's share at each place: int64 `[...]` gives float64 `[...]`."""
        starts = torch.tensor([start for start, _ in self.shares], dtype=torch.int64, device=places.device)
        values = torch.tensor([0.0, *(share for _, share in self.shares)], dtype=torch.float64, device=places.device)
        return values[torch.bucketize(places, starts, right=True)]


def steered_logprobs(
    large: Tensor, base: Tensor, tuned: Tensor, token_map: TokenMap, rule: SteeringRule, places: Tensor
) -> Tensor:
    """The steered distribution over the large vocabulary.

    Args:
        large: `[..., V]`, log-probabilities (or logits) of the large model; -inf excludes a token.
        base: `[..., v]`, logits or log-probabilities of the small model as pretrained.
        tuned: `[..., v]`, the same of the tuned small model.
        token_map: which large token belongs to which small class.
        rule: how they are combined.
        places: int64, broadcast over the leading shape: the place of the predicted token (module docstring).

    Returns:
        Normalised log-probabilities `[..., V]`.

    Raises:
        ModelError: a width does not fit the map, or a small prediction is not finite.
        ConfigError: a place is negative.
    """
    if not rule.needs_the_small_lm:
        return torch.log_softmax(large if large.dtype == torch.float64 else large.float(), dim=-1)
    classes = restricted_logprobs(large, token_map)
    steered = steered_classes(classes, base, tuned, token_map, rule, places)
    # A class that is excluded as a whole would be -inf - -inf; its tokens are -inf in `large` already.
    moved = torch.where(torch.isneginf(classes), 0.0, steered - classes)
    small_of_large = token_map.tensors(large.device).small_of_large
    return torch.log_softmax(large.to(classes.dtype) + moved.index_select(-1, small_of_large), dim=-1)


def steered_token_logprobs(
    large: Tensor,
    base: Tensor,
    tuned: Tensor,
    targets: Tensor,
    token_map: TokenMap,
    rules: Sequence[SteeringRule],
    places: Tensor,
) -> Tensor:
    """The steered log-probability of one token per position, for several rules at once.

    The large vocabulary is read once, whatever the number of rules.

    Args:
        large: `[..., V]`; base, tuned: `[..., v]`; places: int64 `[...]`; all as in `steered_logprobs`.
        targets: int64 `[...]`, large token ids.
        token_map: which large token belongs to which small class.
        rules: at least one.

    Returns:
        `[rules, ...]`; equal to gathering `steered_logprobs` at the targets, up to rounding.

    Raises:
        ModelError: a width does not fit the map, or a small prediction is not finite.
        ConfigError: there is no rule, or a place is negative.
    """
    if not rules:
        raise ConfigError("there is no steering rule to score", hint="alpha is missing")
    classes = restricted_logprobs(large, token_map)
    own_class = token_map.tensors(large.device).small_of_large[targets]
    own = large.gather(-1, targets[..., None]).squeeze(-1).to(classes.dtype)
    of_class = classes.gather(-1, own_class[..., None]).squeeze(-1)
    inside = torch.where(torch.isneginf(own), own, own - of_class)
    return inside + steered_class_logprobs(classes, base, tuned, own_class, token_map, rules, places)


def steered_classes(
    classes: Tensor, base: Tensor, tuned: Tensor, token_map: TokenMap, rule: SteeringRule, places: Tensor
) -> Tensor:
    """The steered distribution over the small classes: `[..., v]`, from `restricted_logprobs` and the small LM's two.

    Raises:
        ModelError: a width does not fit the map, or a small prediction is not finite.
        ConfigError: a place is negative.
    """
    _require_places(places)
    linear = torch.log_softmax(classes + rule.alpha * tuning_shift(base, tuned, token_map).to(classes.dtype), dim=-1)
    if not rule.blends:
        return linear
    share = rule.share_at(places).to(classes.dtype)[..., None]
    return torch.logaddexp(torch.log1p(-share) + linear, share.log() + _tuned_classes(classes, tuned))


def steered_class_logprobs(
    classes: Tensor,
    base: Tensor,
    tuned: Tensor,
    own_class: Tensor,
    token_map: TokenMap,
    rules: Sequence[SteeringRule],
    places: Tensor,
) -> Tensor:
    """`steered_classes` at one class per position, for several rules: int64 `[...]` gives `[rules, ...]`.

    Raises:
        ModelError: a width does not fit the map, or a small prediction is not finite.
        ConfigError: a place is negative.
    """
    _require_places(places)
    shift = tuning_shift(base, tuned, token_map).to(classes.dtype)
    blending = any(rule.blends for rule in rules)
    own_tuned = _tuned_classes(classes, tuned).gather(-1, own_class[..., None]).squeeze(-1) if blending else None
    linear: dict[float, Tensor] = {}
    for alpha in {rule.alpha for rule in rules}:
        moved = classes + alpha * shift
        linear[alpha] = moved.gather(-1, own_class[..., None]).squeeze(-1) - torch.logsumexp(moved, dim=-1)
    found = []
    for rule in rules:
        value = linear[rule.alpha]
        if rule.blends and own_tuned is not None:
            share = rule.share_at(places).to(classes.dtype)
            value = torch.logaddexp(torch.log1p(-share) + value, share.log() + own_tuned)
        found.append(value)
    return torch.stack(found)


def _tuned_classes(classes: Tensor, tuned: Tensor) -> Tensor:
    """The tuned small LM over the classes that the large model does not exclude as a whole, normalised."""
    allowed = torch.where(torch.isneginf(classes), -torch.inf, tuned.to(classes.dtype))
    return torch.log_softmax(allowed, dim=-1)


def _require_places(places: Tensor) -> None:
    if places.dtype != torch.int64 or bool((places < 0).any()):
        raise ConfigError("a place is an int64 index in the record's text, 0 for its first token")
