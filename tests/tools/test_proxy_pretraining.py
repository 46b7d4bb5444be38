"""The pretraining of the built-in proxy: its fused loss, its batches, its optimiser, its vocabulary."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.lm.compact_weights import compact, expand
from fedpt_secure.lm.small import builtin_directory, load_builtin_weights
from fedpt_secure.lm.vocabulary import Vocabulary

TOOLS = Path(__file__).resolve().parents[2] / "tools"
VOCABULARY, WIDTH, ROWS, LENGTH, TOP_K = 40, 16, 6, 8, 5


@pytest.fixture(scope="module")
def corpus():
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("proxy_corpus")
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def training(corpus):
    return importlib.import_module("proxy_training")


@pytest.fixture(scope="module")
def exporting(corpus):
    return importlib.import_module("proxy_export")


@pytest.fixture
def batch(training):
    torch.manual_seed(3)
    ids = torch.stack([torch.randperm(VOCABULARY)[:TOP_K] for _ in range(ROWS * LENGTH)]).view(ROWS, LENGTH, TOP_K)
    answers = torch.rand(ROWS, LENGTH, TOP_K)
    answers = 0.8 * answers / answers.sum(-1, keepdim=True)
    answers[..., -1] = 0.0
    has_teacher = torch.rand(ROWS, LENGTH) < 0.5
    targets = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    return training.Batch(targets, targets, ids, answers * has_teacher[..., None], has_teacher)


def mixed_loss(hidden, weight, batch, share):
    """The loss of `head_loss` written plainly: (1 - share) CE + share * CE to {known top tokens, everything else}."""
    logprobs = (hidden.flatten(0, 1) @ weight.T).log_softmax(-1)
    hard = -logprobs.gather(1, batch.targets.flatten()[:, None])[:, 0]
    ids, q = batch.top_ids.flatten(0, 1), batch.top_probabilities.flatten(0, 1)
    used = q > 0
    top = logprobs.gather(1, ids)
    rest_p = 1 - (top.exp() * used).sum(1)
    soft = -(q * torch.where(used, top, 0.0)).sum(1) - (1 - q.sum(1)) * rest_p.log()
    mix = batch.has_teacher.flatten().float() * share
    return ((1 - mix) * hard + mix * soft).mean(), hard.mean()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_fused_head_loss_has_the_gradient_of_the_plain_mixed_loss(training, batch, share, monkeypatch):
    monkeypatch.setattr(training, "HEAD_CHUNK", 7)  # several uneven chunks
    hidden = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    loss, _ = training.head_loss(hidden, weight, batch, share, training.HeadKernels(compiled=False))
    fused = torch.autograd.grad(loss, [hidden, weight])
    expected, hard = mixed_loss(hidden, weight, batch, share)
    plain = torch.autograd.grad(expected, [hidden, weight])
    torch.testing.assert_close(loss, hard)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)


def test_head_loss_notices_a_wrong_teacher(training, batch):
    hidden, weight = torch.randn(ROWS, LENGTH, WIDTH), torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    kernels = training.HeadKernels(compiled=False)
    right = torch.autograd.grad(training.head_loss(hidden, weight, batch, 1.0, kernels)[0], weight)[0]
    batch.top_ids = (batch.top_ids + 1) % VOCABULARY
    wrong = torch.autograd.grad(training.head_loss(hidden, weight, batch, 1.0, kernels)[0], weight)[0]
    assert (right - wrong).norm() > 0.1 * right.norm()


def test_teacher_answers_stand_beside_the_token_they_are_about(training, corpus):
    """A teacher that is always certain of the next token: its one answer must be the batch's target."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 30, 4000).astype(np.uint16)
    starts = np.arange(0, 4000, 50)
    ids[starts] = corpus.SEPARATOR_ID
    following = np.roll(ids, -1)[:, None]
    answered = np.full((4000, 1), -0.01, np.float16)
    answered[starts - 1] = 0.0  # nothing is said about a separator
    stream = corpus.Stream(ids, starts, following, answered)
    table = np.arange(corpus.LARGE_VOCABULARY_SIZE)
    batch = training.Sampler(stream, table, separator=0, unknown=31).batch(rng, 64, 20, 1)
    assert batch.has_teacher.float().mean() > 0.9
    assert bool((batch.top_ids[..., 0] == batch.targets)[batch.has_teacher].all())
    assert bool((batch.inputs[:, 0] == 0).all())
    assert bool((batch.inputs[:, 1:] == batch.targets[:, :-1]).all())


def test_batches_depend_on_the_generator_alone(training, corpus):
    stream = corpus.Stream(np.arange(3, 2003).astype(np.uint16), np.arange(0, 2000, 40))
    sampler = training.Sampler(stream, np.arange(corpus.LARGE_VOCABULARY_SIZE), separator=0, unknown=2)
    draws = [sampler.batch(np.random.default_rng((1, step)), 4, 16, 2).targets for step in (5, 5, 6)]
    assert bool((draws[0] == draws[1]).all())
    assert not bool((draws[0] == draws[2]).all())


@pytest.mark.parametrize("shape", [(32, 32), (24, 64), (64, 24)])
def test_muons_update_is_nearly_orthogonal(training, shape):
    """Newton-Schulz leaves all singular values near 1 (0.5 to 1.3), from a spread of a thousand."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(0, -2, min(shape))) @ v
    values = torch.linalg.svdvals(training._orthogonal(matrix))
    assert values.max() < 1.35
    assert values.median() > 0.6


def test_schedule_warms_up_holds_and_decays_to_zero(training):
    def rate(tokens):
        return training.schedule(tokens, warmup=100, total=1000, decay_share=0.25)

    assert rate(0) < 0.02
    assert rate(200) == rate(700) == 1.0
    assert rate(875) == pytest.approx(0.5)
    assert rate(1000) == 0.0


def test_reserved_authors_never_reach_the_training_text(corpus, tmp_path):
    reserved = [*corpus.EXCLUDED_AUTHORS, *corpus.REHEARSAL_AUTHORS, *corpus.HELD_OUT_AUTHORS]
    path = tmp_path / "books.jsonl.gz"
    with gzip.open(path, "wt") as lines:
        for author in [*reserved, "Somebody Else"]:
            book = {"author": author, "title": "t", "text": f"Title: t\n-------\r\nwords by {author}\r\n\r\nmore"}
            lines.write(json.dumps(book) + "\n")
    text = "".join(corpus.book_paragraphs(path, None)).lower()
    assert "somebody else" in text
    assert not any(author.lower() in text for author in reserved)


def test_a_share_of_the_books_is_whole_books_and_the_same_ones_each_time(corpus, tmp_path):
    path = tmp_path / "books.jsonl.gz"
    with gzip.open(path, "wt") as lines:
        for index in range(200):
            book = {
                "author": "Somebody",
                "title": f"t{index}",
                "text": f"-------\nbook {index} one\n\nbook {index} two",
            }
            lines.write(json.dumps(book) + "\n")

    def books(share):
        found = [paragraph.lower().split()[1] for paragraph in corpus.book_paragraphs(path, None, share)]
        assert all(found.count(index) == 2 for index in found)
        return set(found)

    assert len(books(1.0)) == 200
    assert 30 < len(books(0.25)) < 70  # 50 expected, 6 the standard deviation
    assert books(0.25) <= books(0.5)


def test_card_names_packages_losses_and_the_weights_continued_from(exporting, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    facts = {
        "parameters": 12_000_000, "vocabulary": 8192, "tokens_seen": 7_100_000, "books_sha256": "b" * 64,
        "generated_shards": {"training": 82, "held_out": 9},
        "held_out_loss": {"books": 4.25, "modern": 3.73}, "held_out_unknown_share": {"books": 0.1, "modern": 0.05},
        "continued_from": {"model_sha256": "c" * 64, "tokens_seen": 6_000_000, "weight": 0.4,
                           "held_out_loss": {"books": 4.246, "modern": 4.686}},
    }  # fmt: skip
    log = [{"options": {"seed": "1", "lr": "0.0012", "start": "x"}}, {"tokens": 1_100_000, "held_out_books": 4.353}]
    exporting.write_card(tmp_path, facts, log)
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "| books | 4.250 | 4.246 | 10.0% |" in card
    assert "| modern | 3.730 | 4.686 | 5.0% |" in card
    assert f"weights `{'c' * 64}` (6.00 M tokens), of which 40% was kept" in card
    assert "lr 0.0012" in card
    assert "start x" not in card
    for source in exporting.SOURCES.values():
        assert f"`{source.package}` ({source.registry}) | {source.licence}" in card


@pytest.fixture
def tiny_proxy():
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


EMBEDDING = "model.embed_tokens.weight"
LARGE = Vocabulary(tuple(f"t{index}" for index in range(100)), 0, (0,))
MAPPING = np.asarray([*range(0, 78, 2), -1])


def test_an_exported_model_is_read_back_as_its_rounded_weights(exporting, tiny_proxy, tmp_path):
    exporting.write_model(tiny_proxy, MAPPING, tmp_path)
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
    exporting.write_model(tiny_proxy, MAPPING, tmp_path / "one")
    exporting.write_model(load_builtin_weights(tmp_path / "one", LARGE)[0], MAPPING, tmp_path / "two")
    names = ("model.safetensors", "config.json", "small_to_large.json")
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    matrices = [name for name, parameter in tiny_proxy.named_parameters() if parameter.dim() == 2]
    assert {tensors[name].dtype for name in matrices} == {torch.int8}
    assert {tensor.dtype for name, tensor in tensors.items() if name not in matrices} == {torch.float16}


def weights_digest(directory):
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def export_once(corpus, tmp_path, monkeypatch):
    """Exports a checkpoint of a tiny model; returns its folder and the weights that were measured, in order."""
    pretraining = importlib.import_module("pretrain_proxy")
    monkeypatch.setattr(pretraining, "HELD_OUT_ROWS", 2)
    shutil.copy(builtin_directory() / "tokenizer.json", tmp_path / "tokenizer.json")
    mapping = [*range(299), -1]
    (tmp_path / "small_to_large.json").write_text(json.dumps(mapping))
    (tmp_path / "proxy.log.jsonl").write_text(json.dumps({"options": {"seed": "1"}}) + "\n")
    with gzip.open(tmp_path / "books", "wt") as lines:
        for author in corpus.HELD_OUT_AUTHORS:
            lines.write(json.dumps({"author": author, "title": "t", "text": "-------\n" + 300 * "some words "}) + "\n")

    def export(model, name, **options):
        pretraining.save(tmp_path / "proxy.safetensors", model, [], 1000)
        out = tmp_path / name
        out.mkdir()
        shutil.copy(tmp_path / "tokenizer.json", out)
        measured = []

        def evaluate(model, checks, device):
            measured.append({n: parameter.detach().clone() for n, parameter in model.named_parameters()})
            return dict.fromkeys(checks, 1.0)

        monkeypatch.setattr(pretraining, "evaluate", evaluate)
        defaults = {"start": None, "start_weight": 0.0, "generated": None, "packages": None, "name": "proxy"}
        paths = {"large": tmp_path, "work": tmp_path, "books": tmp_path / "books", "out": out}
        pretraining.export(argparse.Namespace(**(defaults | paths | options)))
        return out, measured

    return export


def test_what_an_export_measures_is_what_the_package_loads(export_once, tiny_proxy):
    tiny_proxy.resize_token_embeddings(300)
    out, measured = export_once(tiny_proxy, "out")
    loaded, _ = load_builtin_weights(out, Vocabulary.from_file(out / "tokenizer.json"))
    assert len(measured) == 2  # books and generated text
    for weights in measured:
        assert all(torch.equal(weights[name], parameter) for name, parameter in loaded.named_parameters())
    before = dict(tiny_proxy.named_parameters())
    assert not any(torch.equal(weights[name], before[name]) for name in before if before[name].dim() == 2)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["parameters"] == sum(parameter.numel() for parameter in before.values())
    assert weights_digest(out) in (out / "MODEL_CARD.md").read_text()


def test_an_export_that_keeps_the_weights_continued_from_is_the_same_file(export_once, tiny_proxy):
    tiny_proxy.resize_token_embeddings(300)
    out, _ = export_once(tiny_proxy, "out")
    with torch.no_grad():
        for parameter in tiny_proxy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    kept, _ = export_once(tiny_proxy, "kept", start=out, start_weight=1.0)
    moved, measured = export_once(tiny_proxy, "moved", start=out, start_weight=0.5)
    assert weights_digest(kept) == weights_digest(out) != weights_digest(moved)
    # Of each text, the loss after and the loss before.
    assert [torch.equal(weights[EMBEDDING], measured[0][EMBEDDING]) for weights in measured] == [True, False] * 2


def test_public_text_reads_back_as_it_was_written(exporting, tmp_path):
    records = ["one\n\ntwo", "three", " %four "]
    exporting.write_public_text(records, tmp_path)
    assert list(exporting.public_records(tmp_path)) == records


def test_held_out_shards_are_disjoint_from_training_shards(corpus, tmp_path):
    for index in range(40):
        (tmp_path / f"gen-1-{index:04d}.safetensors").touch()
    training_shards = corpus.shard_paths(tmp_path, held_out=False)
    held_out = corpus.shard_paths(tmp_path, held_out=True)
    assert len(held_out) == 4
    assert sorted([*training_shards, *held_out]) == sorted(tmp_path.iterdir())


def test_small_vocabulary_maps_back_to_itself_and_sends_the_rest_to_unknown(corpus):
    mapping = np.asarray([0, 1, 2, 10, 500, -1])
    table = corpus.large_to_small(mapping)
    assert table[[0, 1, 2, 10, 500]].tolist() == [0, 1, 2, 3, 4]
    assert set(table[[3, 11, 40_000]].tolist()) == {5}
