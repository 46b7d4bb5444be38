"""The proxy that ships: intact, loadable, as good as its card says, and unmistakably a language model."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from fedpt_secure.lm.base import builtin_directory, load_builtin_weights
from fedpt_secure.lm.vocabulary import Vocabulary

DIRECTORY = builtin_directory()
MEGABYTE = 1_000_000
# Public-domain prose and everyday sentences written for this test: neither is in the pretraining text.
SAMPLE = (
    "Good morning! How are you today? I am fine, thank you. What are you going to do this weekend? I think I will "
    "stay at home and read a book, because the weather is so bad.",
    "The old man sat by the window and looked at the sea. He had not spoken for a long time, and nobody in the room "
    "knew what to say to him.",
    "hi, do you like music? yes, i like it a lot. i listen to it when i go to work. my friend has a band and they "
    "play every friday night.",
)


@pytest.fixture(scope="module")
def manifest() -> dict:
    return json.loads((DIRECTORY / "manifest.json").read_text())


@pytest.fixture(scope="module")
def small_to_large() -> np.ndarray:
    return np.asarray(json.loads((DIRECTORY / "small_to_large.json").read_text()), dtype=np.int64)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))


@pytest.fixture(scope="module")
def model(tokenizer) -> LlamaForCausalLM:
    return load_builtin_weights(DIRECTORY, Vocabulary.from_tokenizer(tokenizer))[0].eval()


@pytest.fixture(scope="module")
def public_records(manifest) -> list[str]:
    return (DIRECTORY / "public_text.txt").read_text(encoding="utf-8").split(manifest["record_separator"])


def small_ids(text: str, tokenizer: Tokenizer, small_to_large: np.ndarray) -> list[int]:
    unknown = int(np.flatnonzero(small_to_large == -1)[0])
    lookup = {int(large): small for small, large in enumerate(small_to_large) if large >= 0}
    return [lookup.get(i, unknown) for i in (0, *tokenizer.encode(text, add_special_tokens=False).ids)]


@torch.no_grad()
def loss(model: LlamaForCausalLM, sequences: list[list[int]]) -> float:
    """Nats per predicted token; the opening separator is context only."""
    total, count = 0.0, 0
    for ids in sequences:
        row = torch.tensor([ids[:129]])
        logprobs = model(row[:, :-1]).logits.log_softmax(-1)
        total -= float(logprobs.gather(2, row[:, 1:, None]).sum())
        count += row.shape[1] - 1
    return total / count


def test_every_file_has_the_hash_its_manifest_states(manifest):
    for name, expected in manifest["files"].items():
        assert hashlib.sha256((DIRECTORY / name).read_bytes()).hexdigest() == expected, name


def test_manifest_names_every_file_of_the_folder(manifest):
    present = {p.name for p in DIRECTORY.iterdir() if p.is_file() and p.suffix != ".py"}
    assert present - {"manifest.json"} == set(manifest["files"])


def test_a_changed_byte_is_seen_by_the_manifest(manifest):
    content = bytearray((DIRECTORY / "config.json").read_bytes())
    content[0] ^= 1
    assert hashlib.sha256(content).hexdigest() != manifest["files"]["config.json"]


def test_weights_stay_below_30_megabytes():
    assert (DIRECTORY / "model.safetensors").stat().st_size < 30 * MEGABYTE
    assert sum(p.stat().st_size for p in DIRECTORY.iterdir() if p.is_file()) < 35 * MEGABYTE


def test_card_states_the_hash_of_the_weights(manifest):
    assert manifest["files"]["model.safetensors"] in (DIRECTORY / "MODEL_CARD.md").read_text()


def test_token_map_is_injective_with_one_unknown(small_to_large, manifest):
    mapped = small_to_large[small_to_large >= 0]
    assert len(set(mapped.tolist())) == len(mapped) == len(small_to_large) - 1
    assert small_to_large[manifest["special_small_ids"]["unknown"]] == -1
    assert mapped.max() < 49_152


def test_single_bytes_and_template_tokens_are_in_the_map(small_to_large, tokenizer, manifest):
    mapped = set(small_to_large.tolist())
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert tokenizer.token_to_id(token) in mapped
    single = [i for s, i in tokenizer.get_vocab().items() if len(s) == 1]
    assert set(single) <= mapped
    assert small_to_large[manifest["special_small_ids"]["separator"]] == tokenizer.token_to_id("<|endoftext|>")


def test_model_has_the_maps_vocabulary_and_finite_weights(model, small_to_large, manifest):
    assert model.config.vocab_size == len(small_to_large) == manifest["vocabulary"]
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_few_tokens_of_public_text_are_outside_the_vocabulary(public_records, tokenizer, small_to_large, manifest):
    unknown = manifest["special_small_ids"]["unknown"]
    ids = np.concatenate([small_ids(text, tokenizer, small_to_large)[1:] for text in public_records[:200]])
    assert (ids == unknown).mean() < 0.05


def test_public_text_is_records_of_usable_length(public_records):
    assert len(public_records) > 300
    assert min(map(len, public_records)) >= 40


def test_plain_english_has_the_loss_of_a_language_model(model, tokenizer, small_to_large):
    sequences = [small_ids(text, tokenizer, small_to_large) for text in SAMPLE]
    assert loss(model, sequences) < 3.4  # 2.99 when it was made; a unigram model of English needs about 6.5


def test_shuffled_words_are_far_less_likely(model, tokenizer, small_to_large):
    """Sequences as drawn against their own tokens in a seeded random order: at least three nats a token apart."""
    sequences = [small_ids(text, tokenizer, small_to_large) for text in SAMPLE]
    order = np.random.default_rng(5)
    shuffled = [[ids[0], *order.permutation(ids[1:]).tolist()] for ids in sequences]
    assert loss(model, shuffled) > loss(model, sequences) + 3


def test_loss_on_the_shipped_public_text_agrees_with_the_card(
    model, public_records, tokenizer, small_to_large, manifest
):
    """The card's figure is of the rows that the records are taken from, with the chats' prompts, which are easy to
    predict; records alone start cold: 0.6 nats apart at most.
    """
    sequences = [small_ids(text, tokenizer, small_to_large) for text in public_records[:60]]
    assert abs(loss(model, sequences) - manifest["held_out_loss"]["generated"]) < 0.6
