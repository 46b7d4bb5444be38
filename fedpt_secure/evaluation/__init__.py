"""Held-out loss of the four arms, and how well it is known."""

from fedpt_secure.evaluation.bootstrap import (
    Estimate,
    bootstrap_rng,
    fraction_improved,
    improvement_interval,
    perplexity,
    ratio_interval,
)
from fedpt_secure.evaluation.held_out import ArmsEvaluation, evaluate_arms

__all__ = [
    "ArmsEvaluation",
    "Estimate",
    "bootstrap_rng",
    "evaluate_arms",
    "fraction_improved",
    "improvement_interval",
    "perplexity",
    "ratio_interval",
]
