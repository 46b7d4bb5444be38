"""The large black box and the arithmetic by which a tuned small model steers it."""

from fedpt_secure.proxy.arithmetic import (
    restricted_logprobs,
    shifted_logprobs,
    shifted_token_logprobs,
    spread_logprobs,
    spread_token_logprobs,
    tuning_shift,
)
from fedpt_secure.proxy.black_box import BlackBoxLM, Capabilities, GuardedBlackBox, Session, guard

__all__ = [
    "BlackBoxLM",
    "Capabilities",
    "GuardedBlackBox",
    "Session",
    "guard",
    "restricted_logprobs",
    "shifted_logprobs",
    "shifted_token_logprobs",
    "spread_logprobs",
    "spread_token_logprobs",
    "tuning_shift",
]
