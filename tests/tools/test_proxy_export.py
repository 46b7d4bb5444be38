"""The export of the proxy: rounded weights, the public sample, the card."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.lm.base import builtin_directory, load_builtin_weights
from fedpt_secure.lm.compact_weights import compact, expand
from fedpt_secure.lm.vocabulary import Vocabulary

VOCABULARY, WIDTH = 40, 16


@pytest.fixture(scope="module")
def exporting(tool):
    return tool("proxy_export")


@pytest.fixture
def tiny_proxy():
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


LARGE = Vocabulary(tuple(f"t{index}" for index in range(100)), 0, (0,))
MAPPING = np.asarray([*range(0, 78, 2), -1])


def write(exporting, model, out):
    exporting.write_model(dict(model.named_parameters()), model.config, MAPPING, out)


def test_an_exported_model_is_read_back_as_its_rounded_weights(exporting, tiny_proxy, tmp_path):
    write(exporting, tiny_proxy, tmp_path)
    read, token_map = load_builtin_weights(tmp_path, LARGE)
    expected = expand(compact(dict(tiny_proxy.named_parameters())))
    found = dict(read.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {parameter.dtype for parameter in found.values()} == {torch.float32}
    assert read.lm_head.weight is read.model.embed_tokens.weight
    assert token_map.small_to_large.tolist() == MAPPING.tolist()
    ids = torch.arange(VOCABULARY)[None]
    exact = tiny_proxy(ids).logits
    assert (read(ids).logits - exact).norm() < 0.02 * exact.norm()


def test_an_exported_model_takes_one_byte_a_weight_and_exports_again_as_it_is(exporting, tiny_proxy, tmp_path):
    write(exporting, tiny_proxy, tmp_path / "one")
    write(exporting, load_builtin_weights(tmp_path / "one", LARGE)[0], tmp_path / "two")
    names = ("model.safetensors", "config.json", "small_to_large.json")
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    matrices = [name for name, parameter in tiny_proxy.named_parameters() if parameter.dim() == 2]
    assert {tensors[name].dtype for name in matrices} == {torch.int8}
    assert {tensor.dtype for name, tensor in tensors.items() if name not in matrices} == {torch.float16}


def test_public_text_reads_back_as_it_was_written(exporting, tmp_path):
    records = ["one\n\ntwo", "three", " %four "]
    exporting.write_public_text(records, tmp_path)
    assert list(exporting.public_records(tmp_path)) == records


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(builtin_directory() / "tokenizer.json"))


def rows_of(texts, tokenizer, length=128):
    table = np.full((len(texts), length), tokenizer.encode(" word").ids[0], dtype=np.uint16)
    for row, text in zip(table, texts, strict=True):
        ids = tokenizer.encode(text).ids[:length]
        row[: len(ids)] = ids
    return table


LONG = "This sentence is long enough to be a record of its own."


def test_public_records_are_the_last_message_of_chats_and_whole_plain_texts(exporting, tokenizer):
    chat = f"<|endoftext|><|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nA: {LONG}<|im_end|>"
    rows = rows_of([f"{chat}<|endoftext|>B: {LONG}<|im_end|>{chat}<|endoftext|>"], tokenizer)
    found = exporting.generated_records(rows, tokenizer)
    assert found[:3] == [f"A: {LONG}", f"B: {LONG}", f"A: {LONG}"]


def test_public_records_hold_neither_a_row_s_headless_beginning_nor_a_question_nor_a_broken_text(exporting, tokenizer):
    rows = rows_of(
        [
            f"headless {LONG}<|endoftext|>short<|endoftext|>",
            f"<|endoftext|><|im_start|>user\n{LONG}",
            f"<|endoftext|>{LONG} %% {LONG}",
        ],
        tokenizer,
    )
    text = exporting.RECORD_SEPARATOR.join(exporting.generated_records(rows, tokenizer))
    assert "headless" not in text
    assert "short" not in text
    assert LONG not in text


def test_the_public_text_stays_within_its_size(exporting, tokenizer, monkeypatch):
    monkeypatch.setattr(exporting, "PUBLIC_TEXT_BYTES", 200)
    rows = rows_of([f"<|endoftext|>{LONG}<|endoftext|>"] * 20, tokenizer)
    records = exporting.generated_records(rows, tokenizer)
    assert len(records) >= 1
    assert len(exporting.RECORD_SEPARATOR.join(records).encode()) <= 200


def test_the_held_out_loss_is_transformers_own(exporting, tiny_proxy):
    rows = torch.randint(0, VOCABULARY, (11, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = float(tiny_proxy(input_ids=rows, labels=rows).loss)
    assert exporting.held_out_loss(tiny_proxy, rows.numpy()) == pytest.approx(expected, rel=1e-5)


def test_card_names_packages_losses_and_settings_and_leaves_trials_out(exporting, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    facts = {
        "parameters": 12_000_000, "vocabulary": 8192, "tokens_seen": 9_000_000, "books_sha256": "b" * 64,
        "training_tokens": {"generated": 1_000_000, "books": 1_500_000, "modern": 500_000},
        "held_out_loss": {"books": 4.25, "modern": 3.73}, "held_out_unknown_share": {"books": 0.1, "modern": 0.05},
    }  # fmt: skip
    log = [
        {"options": {"seed": "1", "lr": "0.0012", "work": "somewhere"}},
        {"begins": "fresh:6", "tokens": 5, "held_out_books": 9.876},
        *({"tokens": 100_000 * step, "held_out_books": 5 - step / 100, "divergence_books": 1.0} for step in range(50)),
    ]
    exporting.write_card(tmp_path, facts, log)
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "| books | 4.250 | 10.0% |" in card
    assert "9.0 M: 3.0 M tokens of text, about 3 times" in card
    assert "lr 0.0012" in card
    assert "somewhere" not in card
    assert "9.876" not in card
    assert "| 4.9 | 4.510 | 1.000 |" in card  # the last of the run
    for source in exporting.SOURCES.values():
        assert f"`{source.package}` ({source.registry}) | {source.licence}" in card
