"""Batches and caches of any Transformers causal LM, absolute positions included."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedpt_secure.proxy.causal_lm import (
    CachedContinuation,
    context_length,
    keeps_last_logits,
    log_distribution,
    score_batches,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpt2():
    """A model whose position embeddings are absolute: a row shifted by its padding would answer differently."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    return GPT2LMHeadModel(config).eval()


def whole_text(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def forward(model):
    def run(**inputs):
        with torch.no_grad():
            return model(**inputs)

    return run


@pytest.mark.parametrize("last_only", [True, False])
def test_a_padded_row_counts_its_positions_from_its_own_first_token(gpt2, last_only):
    rows = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
    running = CachedContinuation(forward(gpt2), gpt2.config, rows, device=CPU, last_only=last_only)
    for step in range(4):
        for row, ids in enumerate(rows):
            torch.testing.assert_close(running.logits[row], whole_text(gpt2, ids)[-1], rtol=0, atol=1e-4)
        running.append([20 + step, 30 + step, 40 + step])
        rows = [[*ids, token + step] for ids, token in zip(rows, (20, 30, 40), strict=True)]


def test_batches_hold_at_most_the_token_budget_padding_included_and_keep_the_order(gpt2):
    shapes = []

    def counting(**inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return forward(gpt2)(**inputs)

    sequences = [[1] * length for length in (3, 3, 9, 2, 2, 2, 20, 1)]
    answers = list(score_batches(counting, sequences, batch_tokens=12, device=CPU))
    assert shapes == [(2, 3), (1, 9), (3, 2), (1, 20), (1, 1)]
    for answer, ids in zip(answers, sequences, strict=True):
        torch.testing.assert_close(answer, whole_text(gpt2, ids), rtol=0, atol=1e-4)


def test_no_batch_is_computed_before_its_first_answer_is_wanted(gpt2):
    calls = []

    def counting(**inputs):
        calls.append(1)
        return forward(gpt2)(**inputs)

    answers = score_batches(counting, [[1], [2], [3]], batch_tokens=1, device=CPU)
    assert calls == []
    next(answers)
    assert calls == [1]


def test_long_answers_are_normalised_in_chunks_over_the_real_tokens_only():
    logits = torch.randn(600, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = log_distribution(logits, 10)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, logits[:, :10].float().log_softmax(-1))


def test_the_context_is_the_models_own(gpt2):
    assert context_length(gpt2.config) == 24
    assert keeps_last_logits(gpt2)
