"""What every position of a rehearsal says about steering rules, as a few numbers a position.

A rule of the family is a function of log-probabilities of the token that came, so that thousands of rules can be
compared without a model: `choose_shares.py` reads what this writes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.proxy.steering import SteeringRule, steered_class_logprobs

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
MIXTURES = ((0.9, 0.25), (0.9, 0.5), (0.8, 0.25), (0.8, 0.5), (0.7, 0.5), (0.5, 0.5))
"""(w, a) of the log-linear rule `w L + (1 - w) T + a (T - B)`."""
TEMPERATURES = (0.9, 1.1)
TOP = 100
ROWS = 256


def positions(
    inside: Tensor, outside: Tensor, target: Tensor, base: Tensor, tuned: Tensor, own: Tensor, mask: Tensor, mapping
) -> dict[str, np.ndarray]:
    """Arrays `[positions]` by name.

    Args:
        inside: `[positions, v]`, the large model's log-probabilities of mapped tokens, -inf at the unknown class, which
            is the last one.
        outside: `[positions]`, its log-mass of the unknown class; target: of the token that came.
        base, tuned: `[positions, v]`, log-probabilities.
        own: int64 `[positions]`, the small class of the token that came.
        mask: bool `[records, length]`, which positions are judged.
        mapping: `[v]`, large id of each small class.

    Returns:
        `record`, `place`, `large`, `tuned`, `linear-A`, `mixture-W-A`, `temperature-T`, `top`, and the features
        `entropy-large`, `entropy-tuned`, `divergence` (large from base), `overlap` (of large and tuned).
    """
    token_map = TokenMap(mapping, 49_152)
    record = mask.nonzero()[:, 0]
    place = torch.cat([torch.arange(int(row.sum())) for row in mask])
    parts: list[dict[str, Tensor]] = []
    for first in range(0, len(own), ROWS):
        rows = slice(first, first + ROWS)
        classes = inside[rows].float()
        classes[:, -1] = outside[rows]
        parts.append(_part(classes, base[rows], tuned[rows], own[rows], token_map))
        # Inside the unknown class the large model's proportions hold, whatever the rule.
        within = torch.where(own[rows] == classes.shape[1] - 1, target[rows] - outside[rows], 0.0)
        for name in parts[-1]:
            if not name.startswith(("entropy", "divergence", "overlap")):
                parts[-1][name] = parts[-1][name] + within
    joined = {name: torch.cat([part[name] for part in parts]).numpy().astype(np.float32) for name in parts[0]}
    return joined | {"record": record.numpy(), "place": place.numpy(), "large": target.numpy()}


def _part(classes: Tensor, base: Tensor, tuned: Tensor, own: Tensor, token_map: TokenMap) -> dict[str, Tensor]:
    def at(logprobs: Tensor) -> Tensor:
        return (logprobs.gather(1, own[:, None]).squeeze(1) - logprobs.logsumexp(1)).float()

    places = torch.zeros_like(own)
    rules = [SteeringRule(alpha) for alpha in ALPHAS] + [SteeringRule(0.0, ((0, 1.0),))]
    steered = steered_class_logprobs(classes, base, tuned, own, token_map, rules, places)
    found = {f"linear-{alpha:g}": row for alpha, row in zip(ALPHAS, steered, strict=False)} | {"tuned": steered[-1]}
    shift = tuned - base
    for weight, alpha in MIXTURES:
        found[f"mixture-{weight:g}-{alpha:g}"] = at(weight * classes + (1 - weight) * tuned + alpha * shift)
    for temperature in TEMPERATURES:
        found[f"temperature-{temperature:g}"] = at((classes + 0.5 * shift) / temperature)
    kept = torch.zeros_like(classes).scatter_(1, classes.topk(TOP, dim=1).indices, 1.0)
    found["top"] = at(classes + 0.5 * shift * kept)
    large, small = classes.exp(), tuned.exp()
    found["entropy-large"] = -(large * classes).sum(1)
    found["entropy-tuned"] = -(small * tuned).sum(1)
    found["divergence"] = (large * (classes - base)).sum(1)
    found["overlap"] = torch.minimum(large, small).sum(1)
    return found
