"""Tiny random models behind a real server on 127.0.0.1."""

from __future__ import annotations

import shutil
import threading
import warnings
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.lm.vocabulary import Vocabulary, load_tokenizer
from fedpt_secure.proxy import AdapterPair, DecodingEngine, LocalTransformersLM, SteeringRule
from fedpt_secure.serving import ApiKeys, HttpServer, Listener, ServedRun, ServeSettings, create_app
from fedpt_secure.serving.chat import load_chat_format
from fedpt_secure.serving.token_text import TokenText

SHIPPED = Path(str(resources.files("fedpt_secure.lm.builtin"))) / "tokenizer.json"
CONTEXT = 512


def llama(seed: int, *, vocab_size: int) -> LlamaForCausalLM:
    """A random model with clear preferences, as in tests/proxy."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=CONTEXT,
            initializer_range=0.5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=2,
        )
    ).eval()


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> LocalTransformersLM:
    path = tmp_path_factory.mktemp("large")
    llama(1, vocab_size=49_160).save_pretrained(path)
    shutil.copy(SHIPPED, path / "tokenizer.json")
    return LocalTransformersLM(path, torch.device("cpu"))


@pytest.fixture(scope="session")
def pair() -> AdapterPair:
    """A small LM over the large vocabulary, in another order, under an adapter that changes something."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(llama(2, vocab_size=49_152), config).eval()
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    return AdapterPair(model, TokenMap(np.random.default_rng(0).permutation(49_152), 49_152))


@pytest.fixture(scope="session")
def spelling():
    return load_tokenizer(SHIPPED)


@pytest.fixture(scope="session")
def text_tokenizer(spelling) -> TextTokenizer:
    return TextTokenizer(spelling, separator_id=Vocabulary.from_tokenizer(spelling).separator_id)


@pytest.fixture(scope="session")
def make_run(large, pair, spelling, text_tokenizer, tmp_path_factory):
    """A `ServedRun` over the tiny models, or over another engine."""

    def make(engine=None) -> ServedRun:
        return ServedRun(
            rule=SteeringRule(alpha=0.75),
            response_rule=SteeringRule(alpha=0.5, shares=((0, 0.6), (2, 0.1))),
            created=1_700_000_000,
            privacy={"schema": "fedpt-secure/privacy/2", "private": True, "epsilon": 4.0, "claim": "epsilon <= 4"},
            engine=engine or DecodingEngine(large, pair),
            tokenizer=text_tokenizer,
            token_text=TokenText(spelling),
            chat=load_chat_format(tmp_path_factory.mktemp("no_template"), text_tokenizer, spelling),
            vocabulary_size=49_152,
        )

    return make


@contextmanager
def running(run: ServedRun, keys: ApiKeys | None = None, **settings):
    """A server in a thread; yields its URL."""
    configured = ServeSettings(
        **({"name": "tiny", "port": 0, "requests_per_minute": 100_000.0, "new_tokens": 256} | settings)
    )
    listener = Listener(configured)
    ready = threading.Event()
    server = HttpServer(create_app(run, configured, keys or ApiKeys()), listener, configured, on_ready=ready.set)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert ready.wait(30)
        yield listener.url
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serving():
    """`running`, for tests that need a server of their own."""
    return running


@pytest.fixture(scope="module")
def url(make_run):
    with running(make_run()) as address:
        yield address


@pytest.fixture(scope="session")
def client_of():
    """OpenAI's own client at an address; it does not retry, so that errors are seen."""

    @contextmanager
    def client(address: str, key: str = "unused"):
        with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60) as made:
            yield made

    return client


@pytest.fixture
def client(url, client_of):
    with client_of(url) as made:
        yield made
