"""What an API without log-probabilities cannot do is refused, not left out in silence."""

from __future__ import annotations

import pytest

from fedpt_secure.errors import ConfigError
from fedpt_secure.federation.continuation import _require_what_a_bias_can_do
from fedpt_secure.proxy import DecodingSettings, SteeringRule


@pytest.mark.parametrize(
    ("changes", "speculate"),
    [({"top_k": 3}, False), ({"repetition_penalty": 1.2}, False), ({"stop": ("x",)}, False), ({}, True)],
)
def test_settings_that_a_logit_bias_cannot_follow_are_refused(changes, speculate):
    plain = {"rule": SteeringRule(0.5), "max_new_tokens": 4, "temperature": 0.7, "top_p": 0.9}
    _require_what_a_bias_can_do(DecodingSettings(**plain), speculate=False)
    with pytest.raises(ConfigError, match="no log-probabilities"):
        _require_what_a_bias_can_do(DecodingSettings(**plain, **changes), speculate=speculate)
