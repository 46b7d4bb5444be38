"""A whole run, and its continuation, with the large LM behind an API."""

from __future__ import annotations

import math

import pytest
from tokenizers import Tokenizer

from fedpt_secure.config import RunConfig, build
from fedpt_secure.data import Cache
from fedpt_secure.errors import BlackBoxError, ModelError
from fedpt_secure.federation import RunDirectory, continuations, run_training
from fedpt_secure.progress import SILENT
from fedpt_secure.report import summarise


class Notes:
    """A progress that keeps what is said."""

    def __init__(self):
        self.said: list[str] = []

    def task(self, name, total, *, unit=""):
        return SILENT.task(name, total, unit=unit)

    def note(self, text):
        self.said.append(text)


@pytest.fixture
def settings(tiny_models, chat_file):
    return {
        "seed": 3,
        "data": {"source": str(chat_file), "client_column": "who", "text_column": "said"},
        "models": {"small": tiny_models["small"], "device": "cpu", "context_length": 12},
        "api": {"tokenizer": tiny_models["large"], "top_k": 5},
        "lora": {"rank": 2},
        "federation": {"rounds": 1, "cohort": 4},
        "evaluation": {"records": 10, "bootstrap_samples": 200},
    }


@pytest.fixture
def shipped(tiny_models) -> Tokenizer:
    return Tokenizer.from_file(f"{tiny_models['large']}/tokenizer.json")


def continued(directory, notes, cache):
    return continuations(
        directory,
        "hey",
        chat=False,
        alpha=None,
        shares=None,
        max_new_tokens=3,
        temperature=0.0,
        top_p=1.0,
        seed=0,
        cache=cache,
        progress=notes,
    )


def test_a_run_over_an_api_counts_what_it_sent_and_is_continued_by_any_means_it_has(
    settings, shipped, api_server, tmp_path
):
    server = api_server("llama.cpp", shipped)
    settings["models"]["large"] = f"llama.cpp:{server.url}"
    notes, cache = Notes(), Cache(tmp_path / "cache")
    directory = RunDirectory.create(tmp_path / "run", build(RunConfig, settings))
    summary = summarise(run_training(directory.config(), directory, cache=cache, progress=notes))
    box = summary["black_box"]
    assert box["api"] == "llama.cpp"
    assert box["leaves_this_machine"] is False
    assert box["exact_tokens"] == 5
    assert "approximation" in box["tail"]
    assert box["requests"] == len(server.requests)
    completions = [request for request in server.requests if request.path == "/completion"]
    assert box["prompt_tokens"] == sum(len(text) for request in completions for text in request.body["prompt"])
    assert all(math.isfinite(arm["loss"]) for arm in summary["arms"].values())
    assert any("filled in" in line for line in notes.said)
    texts = continued(directory, notes, cache)
    assert set(texts) == {"base", "proxy_tuned"}
    assert any("sent to llama.cpp:http://127.0.0.1" in line for line in notes.said)

    # The same server as one that shows no log-probabilities: `generate` steers it by its bias, training is refused.
    settings["api"]["top_k"] = 0
    bare = build(RunConfig, settings)
    untrained = RunDirectory.create(tmp_path / "other", bare)
    with pytest.raises(BlackBoxError, match="no log-probabilities"):
        run_training(bare, untrained, cache=cache, progress=SILENT)
    assert untrained.load_checkpoint() is None
    directory.save_config(bare)
    server.requests.clear()
    continued(directory, Notes(), cache)
    biased = [request.body["logit_bias"] for request in server.requests if "n_predict" in request.body]
    assert biased[0] == []  # the large LM alone
    assert len(biased[-1]) > 0


def test_a_wrong_tokenizer_and_a_dead_server_are_missed_before_training(
    settings, api_server, tmp_path, other_tokenizer
):
    server = api_server("llama.cpp", other_tokenizer)
    settings["models"]["large"] = f"llama.cpp:{server.url}"
    settings["api"] |= {"attempts": 1}
    config = build(RunConfig, settings)
    directory = RunDirectory.create(tmp_path / "run", config)
    with pytest.raises(ModelError, match="tokens"):
        run_training(config, directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    server.close()
    with pytest.raises(BlackBoxError, match="connection failed"):
        run_training(config, directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    assert directory.load_checkpoint() is None


def test_prompts_that_leave_this_machine_are_announced_first_and_the_key_is_named_not_shown(settings, monkeypatch):
    from fedpt_secure.data.tokenizer import TextTokenizer
    from fedpt_secure.endpoint import Endpoint
    from fedpt_secure.lm.vocabulary import Vocabulary
    from fedpt_secure.proxy.connection import connect, usage_document

    monkeypatch.setenv("FEDPT_API_KEY", "sk-very-secret")
    backend = Tokenizer.from_file(f"{settings['api']['tokenizer']}/tokenizer.json")
    vocabulary = Vocabulary.from_tokenizer(backend)
    tokenizer = TextTokenizer(backend, separator_id=vocabulary.separator_id)
    # A name that can never resolve (RFC 6761).
    endpoint, notes = Endpoint.parse("openai:https://api.invalid/v1#model"), Notes()
    config = build(RunConfig, {"api": {"attempts": 1, "connect_timeout_s": 1.0, "total_timeout_s": 2.0}})
    with pytest.raises(BlackBoxError) as caught:
        connect(endpoint, config.api, vocabulary, tokenizer, progress=notes)
    (said,) = notes.said
    assert "PROMPTS LEAVE THIS MACHINE" in said
    assert "api.invalid" in said
    assert "FEDPT_API_KEY" in said
    assert "sk-very-secret" not in said + str(caught.value)
    assert usage_document(endpoint, None, None)["leaves_this_machine"] is True
