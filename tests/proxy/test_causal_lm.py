"""Batches and caches of any Transformers causal LM, absolute positions included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, Qwen3NextConfig

from fedpt_secure.errors import ModelError
from fedpt_secure.proxy.causal_lm import (
    CachedContinuation,
    context_length,
    forward_keywords,
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


@pytest.fixture(scope="module")
def windowed():
    """A model that looks back 4 tokens: were a gap left inside a row, it would look back fewer."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=4,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=2,
    )
    return MistralForCausalLM(config).eval()


def expect(running, model, rows):
    for row, ids in enumerate(rows):
        torch.testing.assert_close(running.logits[row], whole_text(model, ids)[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("picks_logits", [True, False])
def test_a_padded_row_counts_its_positions_from_its_own_first_token(gpt2, picks_logits):
    rows = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
    keywords = forward_keywords(gpt2) - (set() if picks_logits else {"logits_to_keep"})
    running = CachedContinuation(forward(gpt2), gpt2.config, rows, device=CPU, keywords=keywords)
    for step in range(4):
        expect(running, gpt2, rows)
        running.append([20 + step, 30 + step, 40 + step])
        rows = [[*ids, token + step] for ids, token in zip(rows, (20, 30, 40), strict=True)]


@pytest.mark.parametrize("name", ["gpt2", "windowed"])
@settings(max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_whatever_rows_do_each_ones_logits_are_those_of_its_whole_text(request, name, data):
    """Rows join, leave, change places, take tokens and take them back; contexts of 24 are filled to the brim."""
    model = request.getfixturevalue(name)
    text = st.lists(st.integers(0, 49), min_size=1, max_size=5)
    rows = data.draw(st.lists(text, min_size=1, max_size=3))
    running = CachedContinuation(forward(model), model.config, rows, device=CPU, keywords=forward_keywords(model))
    for _ in range(data.draw(st.integers(1, 6))):
        room = 24 - max(map(len, rows))
        action = data.draw(st.sampled_from(["append", "join", "select", "draft", "rewind"]))
        if action == "append" and room:
            tokens = data.draw(st.lists(st.integers(0, 49), min_size=len(rows), max_size=len(rows)))
            running.append(tokens)
            rows = [[*ids, token] for ids, token in zip(rows, tokens, strict=True)]
        elif action == "join":
            added = data.draw(st.lists(text, min_size=1, max_size=2))
            running.join(added)
            rows = rows + added
        elif action == "select":
            kept = data.draw(st.permutations(range(len(rows))))[: data.draw(st.integers(1, len(rows)))]
            running.select(kept)
            rows = [rows[row] for row in kept]
        elif action == "draft":
            drafts = [data.draw(st.lists(st.integers(0, 49), max_size=min(6, 24 - len(ids)))) for ids in rows]
            counts = [data.draw(st.integers(0, len(draft))) for draft in drafts]
            for ids, draft, scores in zip(rows, drafts, running.score(drafts), strict=True):
                whole = whole_text(model, ids + draft)[len(ids) - 1 :]
                torch.testing.assert_close(scores[0], whole, rtol=0, atol=1e-4)
            running.keep(counts)
            rows = [ids + draft[:count] for ids, draft, count in zip(rows, drafts, counts, strict=True)]
        elif action == "rewind" and room and min(map(len, rows)) > 1:
            counts = [data.draw(st.integers(0, len(ids) - 1)) for ids in rows]
            running.rewind(counts)
            tokens = [row + 7 for row in range(len(rows))]
            running.append(tokens)
            rows = [[*ids[: len(ids) - count], token] for ids, count, token in zip(rows, counts, tokens, strict=True)]
        assert running.lengths == list(map(len, rows))
        expect(running, model, rows)


def test_columns_that_no_row_uses_any_more_are_given_back(gpt2):
    """The longest row never keeps most of a draft, so without a copy the cache would grow past every row."""
    running = CachedContinuation(
        forward(gpt2), gpt2.config, [[1] * 10, [2]], device=CPU, keywords=forward_keywords(gpt2)
    )
    for turn in range(60):
        rows = running.lengths
        running.score([[3] * 3, [4] * 3])
        running.keep([3, 0] if turn % 2 else [0, 3])
        running.rewind([length - before for length, before in zip(running.lengths, rows, strict=True)])
        running.append([5, 5])
        running.rewind([1, 1])
    assert running._cache.columns <= 10 + 64 + 4


def test_a_model_that_keeps_a_running_state_is_refused(gpt2):
    config = Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    with pytest.raises(ModelError, match="linear_attention"):
        CachedContinuation(forward(gpt2), config, [[1]], device=CPU, keywords=frozenset())


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
    assert {"input_ids", "logits_to_keep"} <= forward_keywords(gpt2)
