"""Held-out loss of the four arms, how well it is known, and the large model tuned directly as their ceiling."""

from fedpt_secure.evaluation.bootstrap import (
    Estimate,
    bootstrap_rng,
    fraction_improved,
    gap_closed,
    improvement_interval,
    perplexity,
    ratio_interval,
)
from fedpt_secure.evaluation.ceiling import Ceiling, ceiling_digest, ceiling_document, tune_ceiling
from fedpt_secure.evaluation.direct_lora import DirectSettings
from fedpt_secure.evaluation.held_out import ArmsEvaluation, black_box_losses, evaluate_arms
from fedpt_secure.evaluation.responses import ResponseTask, respond, score_responses

__all__ = [
    "ArmsEvaluation",
    "Ceiling",
    "DirectSettings",
    "Estimate",
    "ResponseTask",
    "black_box_losses",
    "bootstrap_rng",
    "ceiling_digest",
    "ceiling_document",
    "evaluate_arms",
    "fraction_improved",
    "gap_closed",
    "improvement_interval",
    "perplexity",
    "ratio_interval",
    "respond",
    "score_responses",
    "tune_ceiling",
]
