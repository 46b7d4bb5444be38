"""OpenAI's own client gets what it would get from OpenAI."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from fedpt_secure.proxy import DecodingSettings, SteeringRule, generate

PROMPT = "hey, how was your day"


def reference(large, pair, ids, *, alpha, tokens, temperature=0.0, seed=0, shares=()):
    settings = DecodingSettings(rule=SteeringRule(alpha, shares), max_new_tokens=tokens, temperature=temperature)
    return list(generate(large, pair, ids, settings, np.random.default_rng(seed), first_place=0))


@pytest.fixture
def prompt_ids(text_tokenizer):
    return [text_tokenizer.separator_id, *text_tokenizer.ids(PROMPT)]


@pytest.mark.parametrize(("alpha", "model"), [(None, "tiny"), (0.3, "tiny"), (None, "tiny:large")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_is_the_one_of_generate(client, large, pair, prompt_ids, text_tokenizer, alpha, model, temperature):
    extra = {} if alpha is None else {"alpha": alpha}
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=12, temperature=temperature, seed=7, extra_body=extra
    )
    weight = 0.0 if model == "tiny:large" else alpha or 0.75
    expected = reference(large, pair, prompt_ids, alpha=weight, tokens=12, temperature=temperature, seed=7)
    assert answer.choices[0].text == text_tokenizer.text(expected)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt_ids), 12)


def test_token_ids_are_a_prompt_and_a_list_is_a_batch(client, prompt_ids):
    text = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=5)
    ids = client.completions.create(model="tiny", prompt=prompt_ids, temperature=0, max_tokens=5)
    both = client.completions.create(model="tiny", prompt=[[504, 28], prompt_ids], temperature=0, max_tokens=5)
    assert text.choices[0].text == ids.choices[0].text == both.choices[1].text
    assert both.choices[0].text != both.choices[1].text
    assert [choice.index for choice in both.choices] == [0, 1]


def test_the_small_model_answers_under_its_own_name(client):
    models = {model.id for model in client.models.list()}
    assert models == {"tiny", "tiny:large", "tiny:small"}
    texts = {
        model: client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=8).choices[0].text
        for model in models
    }
    assert len(set(texts.values())) == 3
    assert client.models.retrieve("tiny:small").id == "tiny:small"


def test_a_stream_joins_to_the_whole_answer(client):
    wanted = {"model": "tiny", "prompt": PROMPT, "max_tokens": 10, "temperature": 0.0, "n": 2, "seed": 3}
    whole = client.completions.create(**wanted)
    texts, reasons, usage = ["", ""], {}, None
    for chunk in client.completions.create(**wanted, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == {0: "length", 1: "length"}
    assert usage.completion_tokens == whole.usage.completion_tokens == 20


def test_a_chat_is_the_template_encoded_and_streams_alike(client, large, pair, spelling, text_tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPT}]
    spelt = f"<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    ids = spelling.encode(spelt, add_special_tokens=False).ids
    whole = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=10, temperature=0)
    expected = text_tokenizer.text(reference(large, pair, ids, alpha=0.5, tokens=10, shares=((0, 0.6), (2, 0.1))))
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.prompt_tokens == len(ids)
    chunks = list(
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=10, temperature=0, stream=True)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_parts_of_a_message_are_joined(client):
    parts = [{"type": "text", "text": "hey, "}, {"type": "text", "text": "you"}]
    answers = [
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=5, temperature=0
        )
        for content in (parts, "hey, you")
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_logprobs_are_the_distributions_best(client, large, pair, prompt_ids):
    from fedpt_secure.proxy import shifted_logprobs

    answer = client.completions.create(model="tiny", prompt=prompt_ids, max_tokens=1, temperature=0, logprobs=5)
    base, tuned = next(pair.score([pair.token_map.to_small(prompt_ids)]))
    expected = shifted_logprobs(next(large.score([prompt_ids]))[-1], base[-1], tuned[-1], pair.token_map, 0.75)
    logs = answer.choices[0].logprobs
    assert sorted(logs.top_logprobs[0].values(), reverse=True) == pytest.approx(expected.topk(5).values.tolist(), 1e-4)
    assert logs.token_logprobs[0] == pytest.approx(float(expected.max()), rel=1e-4)
    assert logs.text_offset == [0]
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hey"}], max_tokens=4, logprobs=True, top_logprobs=3, seed=1
    )
    content = chat.choices[0].logprobs.content
    assert [len(entry.top_logprobs) for entry in content] == [3, 3, 3, 3]
    assert all(bytes(entry.bytes).decode(errors="replace") == entry.token for entry in content)
    assert all(entry.logprob <= 0 for entry in content)


def test_more_logprobs_than_the_cap_are_refused(client, make_run, serving, client_of):
    with pytest.raises(openai.BadRequestError, match="at most 5 tokens") as caught:
        client.completions.create(model="tiny", prompt=PROMPT, logprobs=6)
    assert (caught.value.param, caught.value.code) == ("logprobs", "logprobs_capped")
    with pytest.raises(openai.BadRequestError, match="at most 5 tokens"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hey"}], logprobs=True, top_logprobs=20
        )
    with serving(make_run(), max_logprobs=7) as raised, client_of(raised) as other:
        answer = other.completions.create(model="tiny", prompt=PROMPT, logprobs=7, max_tokens=1)
        assert len(answer.choices[0].logprobs.top_logprobs[0]) >= 5  # tokens with one text share an entry
    with serving(make_run(), max_logprobs=0) as silent, client_of(silent) as other:
        with pytest.raises(openai.BadRequestError, match="at most 0"):
            other.completions.create(model="tiny", prompt=PROMPT, logprobs=0)
        with pytest.raises(openai.BadRequestError, match="at most 0"):
            other.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hey"}], logprobs=True)


def test_a_stop_string_ends_the_answer_before_it(client):
    free = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=30).choices[0].text
    stop = free[20:24]
    answer = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=30, stop=[stop, "\0"])
    assert answer.choices[0].text == free[: free.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 30


def test_a_seed_repeats_an_answer_and_each_of_n_has_its_own(client):
    wanted = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "n": 3, "temperature": 1.5}
    first, again, other = (
        [choice.text for choice in client.completions.create(**wanted, seed=seed).choices] for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other
    assert len(set(first)) == 3
    unseeded = [client.completions.create(**wanted).choices[0].text for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_concurrent_answers_are_those_of_lone_requests(client):
    prompts = [f"number {index}, how was your" for index in range(8)]

    def ask(prompt):
        answer = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=6)
        return answer.choices[0].text

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, prompts))
    assert together == alone
    assert len(set(alone)) > 4


@pytest.mark.parametrize(
    ("change", "said", "param"),
    [
        ({"model": "other"}, "no such model", "model"),
        ({"temperature": -1}, "temperature", "temperature"),
        ({"temperature": 2.5}, "temperature", "temperature"),
        ({"temperature": 1e-9}, "temperature", "temperature"),
        ({"top_p": 0}, "top_p", "top_p"),
        ({"n": 0}, "n:", "n"),
        ({"n": 9}, "at most 8", "n"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens"),
        ({"max_tokens": 257}, "at most 256", "max_tokens"),
        ({"prompt": "hey " * 400, "max_tokens": 200}, "at most 512", "max_tokens"),
        ({"prompt": []}, "no prompt", "prompt"),
        ({"prompt": [[]]}, "empty", "prompt"),
        ({"prompt": [49_152]}, "not one of", "prompt"),
        ({"prompt": [-1]}, "not one of", "prompt"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "stop"),
        ({"stop": ""}, "stop", "stop"),
        ({"best_of": 3}, "best_of", None),
        ({"echo": True}, "echo", "echo"),
        ({"suffix": "end"}, "suffix", "suffix"),
        ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty"),
        ({"logit_bias": {"50": 1}}, "logit_bias", "logit_bias"),
        ({"extra_body": {"tempersture": 1}}, "unknown parameter 'tempersture'", "tempersture"),
        ({"extra_body": {"alpha": -1}}, "alpha", "alpha"),
        ({"extra_body": {"alpha": "strong"}}, "alpha", "alpha"),
        ({"model": "tiny:large", "extra_body": {"alpha": 1}}, "proxy-tuned model only", "alpha"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"seed": "one"}, "seed", "seed"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_in_openais_shape(client, change, said, param):
    wanted = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4} | change
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        client.completions.create(**wanted)
    assert said in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"
    assert (caught.value.param or "").split(".")[0] == (param or "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "name": "eve"}]}, "name"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "send one"),
        ({"top_logprobs": 2}, "logprobs = true"),
    ],
    ids=str,
)
def test_what_a_chat_cannot_do_is_said(client, change, said):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**({"model": "tiny", "messages": [{"role": "user", "content": "hey"}]} | change))
    assert said in caught.value.body["message"]


def test_unused_parameters_that_clients_send_are_taken(client):
    client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=1,
        presence_penalty=0,
        frequency_penalty=0,
        logit_bias={},
        best_of=1,
        echo=False,
        user="someone",
    )


def test_top_k_and_the_repetition_penalty_do_what_they_say(client):
    greedy = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=4).choices[0].text
    wanted = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 2.0, "seed": 1}
    assert client.completions.create(**wanted, extra_body={"top_k": 1}).choices[0].text == greedy
    assert client.completions.create(**wanted).choices[0].text != greedy
    repeating = {"model": "tiny:small", "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "logprobs": 0}
    plain = client.completions.create(**repeating).choices[0].logprobs.tokens
    varied = client.completions.create(**repeating, extra_body={"repetition_penalty": 10.0}).choices[0].logprobs.tokens
    assert len(set(plain)) < len(set(varied)) == 6
    with pytest.raises(openai.BadRequestError, match="repetition_penalty"):
        client.completions.create(**repeating, extra_body={"repetition_penalty": 0.5})


def test_a_logprob_is_never_minus_infinity():
    from fedpt_secure.serving.responses import _finite

    assert _finite(-math.inf) == -9999.0
    assert _finite(-0.5) == -0.5
