"""The engine equals a slow reference: one row, no caches, everything recomputed for every token, in plain Python."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from fedpt_secure.errors import BlackBoxError, ConfigError, ModelError
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.proxy.adapter_pair import AdapterPair
from fedpt_secure.proxy.arithmetic import spread_logprobs
from fedpt_secure.proxy.continuation_row import Request
from fedpt_secure.proxy.engine import DecodingEngine
from fedpt_secure.proxy.local_transformers import LocalTransformersLM
from fedpt_secure.proxy.restated_session import RestatedSession
from fedpt_secure.proxy.sampling import DecodingSettings
from fedpt_secure.proxy.speculation import Speculation
from fedpt_secure.proxy.steering import SteeringRule, steered_logprobs

SIZE = 298
RULES = [SteeringRule(0.0), SteeringRule(0.75), SteeringRule(1.5, ((0, 0.5), (3, 0.1))), SteeringRule(0.5, ((0, 0.9),))]
"""The last one mostly says what the tuned small LM says, so that its guesses are often right."""


@pytest.fixture(scope="module")
def tokenizer(byte_level):
    return byte_level()


@pytest.fixture(scope="module")
def decode(tokenizer):
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


def tiny(llama, tokenizer, path, spread):
    llama(11, vocab_size=304, hidden_size=16, intermediate_size=16, initializer_range=spread).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    return LocalTransformersLM(path, torch.device("cpu"))


@pytest.fixture(scope="module")
def large(llama, tokenizer, tmp_path_factory):
    """A tiny random large model over bytes and pairs of letters; its text is full of broken characters."""
    return tiny(llama, tokenizer, tmp_path_factory.mktemp("tiny"), 0.7)


@pytest.fixture(scope="module")
def stuck(llama, tokenizer, tmp_path_factory):
    """One that says its last token again and again: its layers do next to nothing, its embeddings are tied."""
    return tiny(llama, tokenizer, tmp_path_factory.mktemp("stuck"), 0.1)


@pytest.fixture(scope="module")
def pair(llama):
    """A small model of 120 classes, one unknown, with LoRA in its last layer."""
    table = np.random.default_rng(0).permutation(SIZE)[:120]
    table[7] = -1
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["down_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(llama(12, vocab_size=120, hidden_size=16, intermediate_size=16), config).eval()
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    return AdapterPair(model, TokenMap(table, SIZE))


def slow(large, pair, decode, request):
    """Tokens, text and ending of a request."""
    wanted, rng = request.settings, np.random.default_rng(request.settings.seed)
    tokens: list[int] = []
    while True:
        ids = [*request.prompt, *tokens]
        logprobs = next(large.score([ids]))[-1]
        base, tuned = next(pair.score([pair.token_map.to_small(ids)]))
        place = torch.tensor(request.first_place + len(tokens))
        if request.voice == "small":
            logprobs = spread_logprobs(tuned[-1], pair.token_map)
        elif wanted.rule.needs_the_small_lm:
            logprobs = steered_logprobs(logprobs, base[-1], tuned[-1], pair.token_map, wanted.rule, place)
        values = logprobs.double().tolist()
        for seen in set(ids):
            values[seen] *= wanted.repetition_penalty
        ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
        token = ranked[0]
        if wanted.temperature:
            ranked = ranked[: wanted.top_k or len(ranked)]
            weights = {i: math.exp((values[i] - values[ranked[0]]) / wanted.temperature) for i in ranked}
            total, kept, mass = math.fsum(weights.values()), [], 0.0
            for i in ranked:
                if mass >= wanted.top_p:
                    break
                kept.append(i)
                mass += weights[i] / total
            draw, running = rng.random() * mass if len(kept) > 1 else 0.0, 0.0
            for token in sorted(kept):
                running += weights[token] / total
                if running > draw:
                    break
        tokens.append(token)
        if token in large.vocabulary.end_ids:
            return tokens, decode(tokens[:-1]), "end"
        text = decode(tokens).rstrip("\ufffd")
        places = [text.find(stop) for stop in wanted.stop if stop in text]
        if places:
            return tokens, text[: min(places)], "stop"
        if len(tokens) == wanted.max_new_tokens:
            return tokens, decode(tokens), "length"


def collect(events, got):
    for event in events:
        tokens, text, ending = got.get(event.handle, ([], "", None))
        assert ending is None
        got[event.handle] = ([*tokens, event.token], text + event.text, event.ending)


@st.composite
def requests(draw):
    return Request(
        prompt=tuple(draw(st.lists(st.integers(0, SIZE - 3), min_size=1, max_size=6))),
        settings=DecodingSettings(
            rule=draw(st.sampled_from(RULES)),
            max_new_tokens=draw(st.integers(1, 9)),
            temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
            top_p=draw(st.sampled_from([0.4, 0.9, 1.0])),
            top_k=draw(st.sampled_from([0, 1, 5, 100])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
            seed=draw(st.integers(0, 1000)),
        ),
        first_place=draw(st.integers(0, 5)),
        voice=draw(st.sampled_from(["steered", "steered", "steered", "small"])),
    )


FEW = settings(
    max_examples=15, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FEW
@given(data=st.data())
def test_every_row_of_a_changing_batch_is_the_slow_reference_token_for_token(large, pair, decode, data):
    """Requests join at any step, end when they end, or are removed; stop strings are cut out of what would come."""
    engine = DecodingEngine(large, pair, decode=decode, largest_batch=data.draw(st.integers(1, 4)))
    got: dict[int, tuple[list[int], str, str | None]] = {}
    expected, removed = {}, set()
    for request in data.draw(st.lists(requests(), min_size=1, max_size=5)):
        text = slow(large, pair, decode, request)[1]
        if text and data.draw(st.booleans()):
            start = data.draw(st.integers(0, len(text) - 1))
            stops = (text[start : start + data.draw(st.integers(1, 3))], "never said")
            request = dataclasses.replace(request, settings=dataclasses.replace(request.settings, stop=stops))
        handle = engine.add(request)
        expected[handle] = slow(large, pair, decode, request)
        for _ in range(data.draw(st.integers(0, 4))):
            collect(engine.step(), got)
        if data.draw(st.integers(0, 5)) == 0:
            engine.remove(handle)
            removed.add(handle)
    while engine.handles:
        events = engine.step()
        assert not removed & {event.handle for event in events}
        collect(events, got)
    assert engine.step() == []
    for handle, (tokens, text, ending) in expected.items():
        if handle in removed:
            assert tokens[: len(got.get(handle, ([],))[0])] == got.get(handle, ([],))[0]
        else:
            assert got[handle] == (tokens, text, ending)


@FEW
@given(
    some=st.lists(requests(), min_size=1, max_size=4),
    which=st.sampled_from(["large", "stuck"]),
    speculation=st.builds(
        Speculation,
        longest=st.integers(1, 6),
        lookup=st.booleans(),
        small=st.booleans(),
        shortest_match=st.integers(1, 2),
    ),
)
def test_greedy_speculation_says_what_the_slow_reference_says(request, pair, decode, some, which, speculation):
    large = request.getfixturevalue(which)
    some = [
        dataclasses.replace(one, settings=dataclasses.replace(one.settings, temperature=0.0, max_new_tokens=12))
        for one in some
    ]
    got: dict[int, tuple[list[int], str, str | None]] = {}
    engine = DecodingEngine(large, pair, decode=decode, speculation=speculation, largest_batch=3)
    collect(engine.run(some), got)
    assert got == {handle: slow(large, pair, decode, one) for handle, one in enumerate(some)}
    spoken = [handle for handle, one in enumerate(some) if one.voice == "steered"]
    assert engine.counts.tokens == sum(len(got[handle][0]) for handle in spoken)


def ask(prompt=(1, 2, 3), **changes):
    wanted = {"rule": RULES[1], "max_new_tokens": 8} | changes
    return Request(prompt=prompt, settings=DecodingSettings(**wanted), first_place=0)


@pytest.mark.parametrize(
    ("which", "rule", "source", "temperature"),
    [
        ("stuck", RULES[0], {"small": False}, 0.0),
        ("stuck", RULES[1], {"small": False}, 0.1),
        ("large", RULES[3], {"lookup": False}, 0.0),
        ("large", RULES[3], {"lookup": False}, 1.0),
    ],
)
def test_good_guesses_of_either_source_cost_fewer_calls(request, pair, which, rule, source, temperature):
    """A loop is guessed by lookup; what the small LM has the say in is guessed by the small LM."""
    large = request.getfixturevalue(which)
    wanted = ask(max_new_tokens=48, rule=rule, temperature=temperature)
    plain = DecodingEngine(large, pair)
    quick = DecodingEngine(large, pair, speculation=Speculation(longest=6, **source))
    said = [[event.token for event in engine.run([wanted])] for engine in (plain, quick)]
    assert temperature > 0 or said[0] == said[1]
    assert plain.counts.row_calls == plain.counts.tokens
    assert quick.counts.tokens == len(said[1])
    assert quick.counts.tokens / quick.counts.row_calls > 1.5
    assert 0 < quick.counts.accepted <= quick.counts.drafted


@pytest.mark.parametrize("speculation", [None, Speculation(longest=4)], ids=["plain", "speculative"])
def test_a_seeded_answer_does_not_depend_on_the_batch(large, pair, speculation):
    some = [ask((5, row), temperature=1.0, seed=row % 2, max_new_tokens=10) for row in range(5)]
    alone = []
    for request in some:
        alone.append([event.token for event in DecodingEngine(large, pair, speculation=speculation).run([request])])
    engine = DecodingEngine(large, pair, speculation=speculation, largest_batch=3)
    got: dict[int, list[int]] = {}
    for event in engine.run(some):
        got.setdefault(event.handle, []).append(event.token)
    assert [got[handle] for handle in range(5)] == alone
    assert len({tuple(tokens) for tokens in alone}) == 5


def test_a_token_that_ends_a_row_costs_no_further_pass_over_it(large, pair):
    engine = DecodingEngine(large, pair)
    for length in (1, 3):
        engine.add(ask(max_new_tokens=length))
    assert len(engine.step()) == 2
    assert [len(engine.step()) for _ in range(3)] == [1, 1, 0]
    assert engine.counts.row_calls == 4


def test_events_report_the_steered_distribution_and_what_the_large_model_alone_thinks(large, pair):
    request = dataclasses.replace(ask(rule=SteeringRule(2.0)), top_logprobs=3, told_apart=True)
    ids, changed = list(request.prompt), 0
    for event in DecodingEngine(large, pair).run([request]):
        alone = next(large.score([ids]))[-1]
        base, tuned = next(pair.score([pair.token_map.to_small(ids)]))
        place = torch.tensor(len(ids) - 3)
        answer = steered_logprobs(alone, base[-1], tuned[-1], pair.token_map, request.settings.rule, place)
        assert event.logprob == pytest.approx(float(answer[event.token]), abs=1e-4)
        assert [token for token, _ in event.top] == answer.topk(3).indices.tolist()
        assert event.alone.token == int(alone.argmax())
        assert event.alone.chosen_logprob == pytest.approx(float(alone[event.token]), abs=1e-4)
        assert event.alone.changed == (int(alone.argmax()) != event.token)
        changed += event.alone.changed
        ids.append(event.token)
    assert changed


def test_what_cannot_work_is_refused_when_it_is_added(large, pair):
    engine = DecodingEngine(large, pair)
    with pytest.raises(ConfigError, match="no decoder"):
        engine.add(ask(stop=("x",)))
    with pytest.raises(BlackBoxError, match="id 298"):
        engine.add(ask((298,)))
    with pytest.raises(BlackBoxError, match="empty"):
        engine.add(ask(()))
    with pytest.raises(BlackBoxError, match="black box's context of 64"):
        engine.add(ask(max_new_tokens=62))
    with pytest.raises(ConfigError, match="first_place is -1"):
        engine.add(dataclasses.replace(ask(), first_place=-1))
    with pytest.raises(ConfigError, match="no small LM"):
        DecodingEngine(large, None).add(ask())
    pair._config.max_position_embeddings = 10
    try:
        with pytest.raises(ModelError, match="small LM's context of 10"):
            engine.add(ask())
    finally:
        pair._config.max_position_embeddings = 64
    assert engine.handles == ()
    with pytest.raises(ConfigError, match="largest_batch"):
        DecodingEngine(large, pair, largest_batch=0)


def test_contexts_are_filled_to_the_brim(large, pair):
    request = ask(max_new_tokens=61)
    for speculation in (None, Speculation(longest=8)):
        assert len(list(DecodingEngine(large, pair, speculation=speculation).run([request]))) == 61


class Remote:
    """The local model as an API without state; `lag` seconds an answer; may be told to fail."""

    def __init__(self, inner, *, lag=0.0, draft_scoring=True, largest_batch=None):
        self.inner, self.lag = inner, lag
        self.vocabulary = inner.vocabulary
        self.capabilities = dataclasses.replace(
            inner.capabilities, remote=True, draft_scoring=draft_scoring, largest_batch=largest_batch
        )
        self.threads: set[str] = set()
        self.fails = False
        self.most = 0

    def start(self, prompts):
        return RestatedSession(prompts, self._ask, self._tails)

    def _wait(self, texts):
        self.threads.add(threading.current_thread().name)
        self.most = max(self.most, len(texts))
        time.sleep(self.lag)
        if self.fails:
            raise BlackBoxError("the API is down")

    def _ask(self, texts):
        self._wait(texts)
        return torch.stack([answer[-1] for answer in self.inner.score(texts)])

    def _tails(self, texts, counts):
        self._wait(texts)
        return [answer[-count:] for answer, count in zip(self.inner.score(texts), counts, strict=True)]


@pytest.mark.parametrize("speculation", [None, Speculation(longest=3)], ids=["plain", "speculative"])
def test_a_remote_model_is_waited_for_beside_the_small_one_with_the_same_result(large, pair, speculation):
    some = [ask((5, row), temperature=0.7, seed=row) for row in range(3)]
    remote = Remote(large, largest_batch=2)
    engines = [DecodingEngine(box, pair, speculation=speculation) for box in (large, remote)]
    here, there = ({(e.handle, e.token, e.ending) for e in engine.run(some)} for engine in engines)
    assert here == there
    assert remote.most == 2
    assert any(name.startswith("large-lm") for name in remote.threads)
    engines[1].close()


def test_the_two_models_work_at_the_same_time_when_the_large_one_is_remote(large, pair):
    class Slow:
        """A small LM whose answers take a while, too."""

        token_map, context_length = pair.token_map, pair.context_length

        def start(self, prompts):
            session = pair.start(prompts)
            quick = session.append

            def append(ids):
                time.sleep(0.1)
                quick(ids)

            session.append = append
            return session

    engine = DecodingEngine(Remote(large, lag=0.1), Slow())
    begin = time.monotonic()
    list(engine.run([ask(max_new_tokens=9)]))
    engine.close()
    assert time.monotonic() - begin < 0.1 * 9 + 0.1 * 8 - 0.2


def test_after_a_failure_the_rows_are_gone_and_new_ones_are_served(large, pair):
    remote = Remote(large)
    engine = DecodingEngine(remote, pair)
    engine.add(ask())
    engine.step()
    remote.fails = True
    with pytest.raises(BlackBoxError, match="down"):
        engine.step()
    assert engine.handles == ()
    remote.fails = False
    expected = [event.token for event in DecodingEngine(large, pair).run([ask()])]
    assert [event.token for event in engine.run([ask()])] == expected
    engine.close()


def test_speculation_needs_a_black_box_that_scores_drafts(large, pair):
    with pytest.raises(BlackBoxError, match="several tokens") as caught:
        DecodingEngine(Remote(large, draft_scoring=False), pair, speculation=Speculation())
    assert "without speculation" in caught.value.hint
