"""Cached decoding equals a slow reference without any cache, token for token."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from fedpt_secure.errors import BlackBoxError, ConfigError, ModelError
from fedpt_secure.proxy.decoding import generate as generate_from
from fedpt_secure.proxy.sampling import DecodingSettings
from fedpt_secure.proxy.steering import SteeringRule, steered_logprobs

PROMPT = [0, 504, 3575, 12]
FIRST_PLACE = 3
ALONE, LINEAR = SteeringRule(alpha=0.0), SteeringRule(alpha=0.5)


def generate(large, pair, prompt, settings, rng, first_place=FIRST_PLACE):
    return generate_from(large, pair, prompt, settings, rng, first_place=first_place)


def slow_generate(large, pair, prompt, settings, rng, first_place=FIRST_PLACE):
    """Score the whole text anew for every token; choose by sorting and adding up, in plain Python."""
    ids = list(prompt)
    for produced in range(settings.max_new_tokens):
        logprobs = next(large.score([ids]))[-1]
        if settings.rule.needs_the_small_lm:
            base, tuned = next(pair.score([pair.token_map.to_small(ids)]))
            place = torch.tensor(first_place + produced)
            logprobs = steered_logprobs(logprobs, base[-1], tuned[-1], pair.token_map, settings.rule, place)
        values = logprobs.double().tolist()
        ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
        token = ranked[0]
        if settings.temperature:
            weights = [math.exp(values[i] / settings.temperature) for i in ranked]
            total, kept, mass = math.fsum(weights), 0, 0.0
            while kept < len(ranked) and mass < settings.top_p:
                mass += weights[kept] / total
                kept += 1
            draw, running = rng.random() * mass, 0.0
            for rank in sorted(range(kept), key=lambda rank: ranked[rank]):
                token = ranked[rank]
                running += weights[rank] / total
                if running > draw:
                    break
        if token in large.vocabulary.end_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("rule", [ALONE, LINEAR, SteeringRule(1.0, ((0, 0.2), (5, 1.0), (7, 0.1)))], ids=str)
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_cached_decoding_is_the_slow_reference_token_for_token(large, pair, rule, temperature, top_p):
    settings = DecodingSettings(rule=rule, max_new_tokens=7, temperature=temperature, top_p=top_p)
    fast = list(generate(large, pair, PROMPT, settings, np.random.default_rng(1)))
    assert fast == slow_generate(large, pair, PROMPT, settings, np.random.default_rng(1))
    assert len(fast) == 7


def test_the_small_lm_changes_the_choice_and_alpha_zero_does_not_run_it(large, pair):
    settings = DecodingSettings(rule=SteeringRule(alpha=1.0), max_new_tokens=12)
    alone = dataclasses.replace(settings, rule=ALONE)
    rng = np.random.default_rng(0)
    without = list(generate(large, None, PROMPT, alone, rng))
    assert without == list(generate(large, pair, PROMPT, alone, rng))
    assert without != list(generate(large, pair, PROMPT, settings, rng))


def test_the_place_of_the_first_new_token_decides_which_share_it_gets(large, pair):
    """Share 1 at place 3 alone: the first token is the tuned small LM's there, and the large model's elsewhere."""
    rule = SteeringRule(0.0, ((3, 1.0), (4, 0.0)))
    settings = DecodingSettings(rule=rule, max_new_tokens=1)
    (there,), (elsewhere,) = (list(generate(large, pair, PROMPT, settings, None, place)) for place in (3, 4))
    _, tuned = next(pair.score([pair.token_map.to_small(PROMPT)]))
    assert pair.token_map.to_small([there]) == [int(tuned[-1].argmax())]
    assert elsewhere == int(next(large.score([PROMPT]))[-1].argmax())
    assert there != elsewhere
    with pytest.raises(ConfigError, match="first_place is -1"):
        generate(large, pair, PROMPT, settings, None, -1)


def test_it_ends_before_an_end_token_which_is_not_yielded(large, pair):
    class Scripted:
        """Says 11, 12, then the end token."""

        capabilities = large.capabilities
        vocabulary = large.vocabulary

        def start(self, prompts):
            class Running:
                step = 0

                def logprobs(self):
                    answer = torch.full((1, 49_152), -math.inf)
                    answer[0, (11, 12, 2)[self.step]] = 0.0
                    return answer

                def append(self, ids):
                    self.step += 1

            return Running()

    settings = DecodingSettings(rule=LINEAR, max_new_tokens=10)
    assert list(generate(Scripted(), pair, PROMPT, settings, np.random.default_rng(0))) == [11, 12]


def test_what_cannot_work_is_refused_before_the_first_token(large, pair):
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="no small LM"):
        generate(large, None, PROMPT, DecodingSettings(rule=LINEAR, max_new_tokens=1), rng)
    with pytest.raises(BlackBoxError, match="black box's context of 64"):
        generate(large, pair, PROMPT, DecodingSettings(rule=LINEAR, max_new_tokens=61), rng)
    pair._config.max_position_embeddings = 10
    with pytest.raises(ModelError, match="small LM's context of 10"):
        generate(large, pair, PROMPT, DecodingSettings(rule=LINEAR, max_new_tokens=7), rng)
