"""A truncated black box completed by the small LM, over HTTP; and one without log-probabilities, by its logit bias."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fedpt_secure.errors import BlackBoxError, ConfigError, ModelError
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.proxy.adapter_pair import AdapterPair
from fedpt_secure.proxy.arithmetic import shifted_logprobs, spread_logprobs
from fedpt_secure.proxy.biased import generate_biased, shift_bias
from fedpt_secure.proxy.black_box import guard
from fedpt_secure.proxy.completed import CompletedLM, ahead
from fedpt_secure.proxy.decoding import DecodingSettings, generate
from fedpt_secure.proxy.steering import SteeringRule
from fedpt_secure.proxy.top_logprobs import TopLogprobs, complete
from fedpt_secure.proxy.top_source import RemoteLM

TEXT = [72, 105, 3, 260, 9]


@pytest.fixture
def tiny_pair(tuned_small) -> AdapterPair:
    """The whole vocabulary of the test servers, in the large one's order."""
    return AdapterPair(tuned_small(306), TokenMap.identity(SIZE))


SIZE = 298


def row_of(server, pair, text, k):
    values = torch.tensor(server.logprobs(text))
    logprobs, ids = values.topk(k)
    ((base, _),) = pair.score([text])
    top = TopLogprobs(ids.numpy(), logprobs.numpy())
    return complete(top, spread_logprobs(base[-1], pair.token_map))


@pytest.mark.parametrize("dialect", ["llama.cpp", "vllm"])
def test_scores_and_steps_are_the_api_completed_by_the_small_base(api_server, connect, tiny_pair, dialect):
    server = api_server(dialect)
    assert server.size == SIZE
    box = guard(CompletedLM(connect(server), tiny_pair, top_k=5))
    assert box.capabilities.full_vocabulary
    assert box.capabilities.exact_tokens == 5
    assert not box.capabilities.remote
    texts = [TEXT, TEXT[:2], [1], [2, 3], [4, 4, 4], [5]]
    for text, rows in zip(texts, box.score(texts), strict=True):
        expected = torch.stack([row_of(server, tiny_pair, text[:end], 5) for end in range(1, len(text) + 1)])
        torch.testing.assert_close(rows, expected, atol=1e-4, rtol=1e-4)
    session = box.start([TEXT, [1]])
    for rows in ([TEXT, [1]], [[*TEXT, 7], [1, 8]]):
        answer = session.logprobs()
        expected = torch.stack([row_of(server, tiny_pair, row, 5) for row in rows])
        torch.testing.assert_close(answer, expected, atol=1e-4, rtol=1e-4)
        session.append([7, 8])
    session.join([[2, 3]])
    session.select([2, 1])
    expected = torch.stack([row_of(server, tiny_pair, row, 5) for row in ([2, 3], [1, 8, 8])])
    torch.testing.assert_close(session.logprobs(), expected, atol=1e-4, rtol=1e-4)


def test_a_draft_is_scored_as_if_it_had_been_appended(api_server, connect, tiny_pair):
    server = api_server("vllm")
    session = guard(CompletedLM(connect(server), tiny_pair, top_k=5)).start([TEXT, [1]])
    scored = session.score_draft([[7, 8], []])
    assert [len(rows) for rows in scored] == [3, 1]
    torch.testing.assert_close(scored[0][1], row_of(server, tiny_pair, [*TEXT, 7], 5), atol=1e-4, rtol=1e-4)
    session.keep([1, 0])
    torch.testing.assert_close(session.logprobs()[0], row_of(server, tiny_pair, [*TEXT, 7], 5), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dialect", ["vllm", "other"])
def test_the_small_lms_favourites_are_exact_where_the_api_scores_tokens(api_server, connect, tiny_pair, dialect):
    server = api_server(dialect)
    box = CompletedLM(connect(server), tiny_pair, top_k=4, candidates=3)
    row = box.start([TEXT]).logprobs()[0]
    ((base, tuned),) = tiny_pair.score([TEXT])
    favourites = torch.cat([base[-1].topk(3).indices, tuned[-1].topk(3).indices])
    truth = torch.tensor(server.logprobs(TEXT)).float()
    torch.testing.assert_close(row[favourites], truth[favourites], atol=1e-3, rtol=1e-3)
    plain = CompletedLM(connect(server), tiny_pair, top_k=4).start([TEXT]).logprobs()[0]
    assert not torch.allclose(plain[favourites], truth[favourites], atol=1e-2)


def test_more_than_the_api_can_do_is_refused_with_the_alternative(api_server, connect, tiny_pair):
    llama, vllm = connect(api_server("llama.cpp")), connect(api_server("vllm"))
    with pytest.raises(BlackBoxError, match="gives 20") as caught:
        CompletedLM(vllm, tiny_pair, top_k=21)
    assert "api.top_k" in caught.value.hint
    with pytest.raises(BlackBoxError, match="scores no tokens") as caught:
        CompletedLM(llama, tiny_pair, top_k=5, candidates=1)
    assert "api.candidates" in caught.value.hint
    with pytest.raises(ConfigError, match="top_k is 0"):
        CompletedLM(vllm, tiny_pair, top_k=0)
    with pytest.raises(ModelError, match="600 large tokens"):
        CompletedLM(vllm, AdapterPair(tiny_pair._model, TokenMap([*range(305), -1], 600)), top_k=5)


def test_results_come_in_order_and_errors_are_not_swallowed():
    for at_once in (1, 4, 20):
        assert list(ahead(lambda item: item * 2, list(range(9)), at_once)) == [0, 2, 4, 6, 8, 10, 12, 14, 16]
        assert list(ahead(str, [], at_once)) == []
        with pytest.raises(ZeroDivisionError):
            list(ahead(lambda item: 1 // item, [1, 2, 0, 4], at_once))


def settings(alpha, **changes):
    return DecodingSettings(rule=SteeringRule(alpha=alpha), max_new_tokens=8, **changes)


@pytest.mark.parametrize("dialect", ["llama.cpp", "other"])
def test_a_bias_on_every_token_is_proxy_tuning(api_server, connect, tiny_pair, dialect):
    server = api_server(dialect)
    source = connect(server, **({} if dialect == "llama.cpp" else {"top_k": 0}))
    # The made-up model keeps to whole characters, because a text cannot name a fragment, and does not end.
    barred = [t for t in range(SIZE) if "\ufffd" in server.text_of(t) or t in source.vocabulary.end_ids]
    free = server.logprobs

    def whole_characters(text):
        values = free(text)
        values[barred] -= 50
        return values - np.logaddexp.reduce(values)

    server.logprobs = whole_characters
    steered = list(generate_biased(source, tiny_pair, TEXT, settings(0.5)))
    text, expected = list(TEXT), []
    for _ in range(8):
        ((base, tuned),) = tiny_pair.score([text])
        row = shifted_logprobs(
            torch.tensor(server.logprobs(text)).float(), base[-1], tuned[-1], tiny_pair.token_map, 0.5
        )
        token = int(row.argmax())
        expected.append(token)
        text.append(token)
    assert steered == expected
    plain = list(generate_biased(source, None, TEXT, settings(0.0)))
    assert plain != steered
    assert plain[0] == int(server.logprobs(TEXT).argmax())
    if dialect == "llama.cpp":
        rng = np.random.default_rng(0)
        assert steered == list(generate(RemoteLM(source), tiny_pair, TEXT, settings(0.5), rng, first_place=0))


def test_the_bias_names_the_most_moved_tokens_within_the_limits():
    base = torch.tensor([0.5, 0.3, 0.1, 0.0999, 0.0001]).log()
    tuned = torch.tensor([0.5, 0.1, 0.3, 0.0001, 0.0999]).log()
    token_map = TokenMap([10, 11, 12, 13, -1], 20)
    bias = shift_bias(base, tuned, token_map, alpha=2.0, largest_bias=3)
    assert set(bias) == {11, 12, 13}  # the unmoved token and the unknown class get none
    assert bias[11] == pytest.approx(2 * np.log(1 / 3), rel=1e-5)
    assert bias[12] == pytest.approx(2 * np.log(3), rel=1e-5)
    assert set(shift_bias(base, tuned, token_map, alpha=2.0, largest_bias=1)) == {13}
    assert shift_bias(base, tuned, token_map, alpha=90.0, largest_bias=3)[13] == -100.0
    assert shift_bias(base, base, token_map, alpha=2.0, largest_bias=3) == {}


def test_what_a_bias_cannot_do_is_refused(api_server, connect, tiny_pair):
    source = connect(api_server("llama.cpp"))
    blend = DecodingSettings(rule=SteeringRule(0.5, ((0, 0.2),)), max_new_tokens=8)
    with pytest.raises(ConfigError, match="blend"):
        generate_biased(source, tiny_pair, TEXT, blend)
    with pytest.raises(ConfigError, match="no small LM"):
        generate_biased(source, None, TEXT, settings(0.5))
    with pytest.raises(BlackBoxError, match="black box's context of 64"):
        generate_biased(source, None, [1] * 60, settings(0.0))
    source._capabilities = dataclasses.replace(source.capabilities, logit_bias=False)
    with pytest.raises(BlackBoxError, match="takes no logit bias"):
        generate_biased(source, tiny_pair, TEXT, settings(0.5))
