"""Distillation on a GPU, checked on a CPU: the plain Llama, the writer, the teacher's answers, and the whole way."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.lm.base import builtin_directory, load_builtin_weights
from fedpt_secure.lm.vocabulary import Vocabulary

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SEPARATOR, MESSAGE_END = 0, 2
PROMPTS = [[0, 3, 4, 5], [0, 6, 7, 2, 8], [0, 9, 10]]
ASKS = [False, False, True]
ANSWER = [11, 3]


@pytest.fixture(scope="module", autouse=True)
def tools():
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def plain(tools):
    return importlib.import_module("plain_llama")


@pytest.fixture(scope="module")
def writing(tools):
    return importlib.import_module("gpu_generation")


@pytest.fixture(scope="module")
def distil(tools):
    return importlib.import_module("distil_proxy")


def tiny_llama(folder: Path, vocabulary: int) -> LlamaForCausalLM:
    """A random model, saved as Transformers saves it."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.2, 0.8)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def small_teacher(plain, tmp_path_factory):
    """Model, weights and shape, over 12 tokens: texts end often."""
    folder = tmp_path_factory.mktemp("teacher")
    model = tiny_llama(folder, 12)
    return model, plain.load(folder, torch.device("cpu"), torch.float32), plain.Shape.read(folder)


def test_the_plain_llama_is_transformers_own(plain, small_teacher):
    model, weights, shape = small_teacher
    ids = torch.randint(0, 12, (5, 70), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(plain.hidden(weights, ids, shape, torch.float32), expected, rtol=1e-4, atol=1e-5)


def test_a_wrong_base_of_the_angles_is_not_transformers_own(plain, small_teacher):
    model, weights, shape = small_teacher
    ids = torch.randint(0, 12, (5, 70), generator=torch.Generator().manual_seed(2))
    wrong = plain.hidden(weights, ids, plain.Shape(shape.layers, 4, 2, 600.0, shape.epsilon), torch.float32)
    with torch.no_grad():
        assert (wrong - model.model(input_ids=ids).last_hidden_state).abs().max() > 1e-3


def test_a_divided_residual_stream_computes_the_same(plain, small_teacher):
    _, weights, shape = small_teacher
    ids = torch.randint(0, 12, (5, 30), generator=torch.Generator().manual_seed(2))
    scaled, epsilon = plain.divided_residual(weights, shape, 14.1)
    other = plain.Shape(shape.layers, shape.heads, shape.kv_heads, shape.theta, epsilon)
    head = "model.embed_tokens.weight"
    before = plain.hidden(weights, ids, shape, torch.float32) @ weights[head].T
    after = plain.hidden(scaled, ids, other, torch.float32) @ scaled[head].T
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    ratio = plain.residual_rms(weights, ids, shape) / plain.residual_rms(scaled, ids, other)
    assert ratio == pytest.approx(14.1, rel=1e-4)
    wrong = plain.hidden(scaled, ids, shape, torch.float32) @ scaled[head].T  # the norms' epsilon left as it was
    assert (wrong - before).abs().max() > (after - before).abs().max()


@pytest.fixture
def writer(writing, small_teacher):
    _, weights, shape = small_teacher
    pool = writing.Pool.of(PROMPTS, ASKS, ANSWER, torch.device("cpu"))
    return writing.Writer(weights, shape, pool, rows=6, length=150, seed=3, graphs=False)


def written(writer, before=lambda step: None):
    """What it writes, and the logits `[rows, length - 1, vocabulary]` of its steps; `before` each of them."""
    seen, logits = [], writer._logits

    def spy(token, read):
        before(len(seen))
        seen.append(logits(token, read))
        return seen[-1]

    writer._logits = spy
    with torch.inference_mode():
        rows = writer.write()
    return rows.long(), torch.stack(seen, 1)


def whole_pass(plain, small_teacher, rows):
    _, weights, shape = small_teacher
    with torch.inference_mode():
        return plain.hidden(weights, rows[:, :-1], shape, torch.float32) @ weights["model.embed_tokens.weight"].T


def test_each_step_of_the_writer_has_the_logits_of_a_whole_pass(plain, writer, small_teacher):
    for _ in range(2):  # the second batch finds the first one's keys and values in the cache
        rows, logits = written(writer)
        torch.testing.assert_close(logits, whole_pass(plain, small_teacher, rows), rtol=1e-3, atol=1e-4)
        del writer._logits  # the spy


def test_what_the_cache_holds_beyond_the_position_is_never_read(plain, writer, small_teacher):
    """Keys there may be anything; values are multiplied by a share of exactly 0."""
    for keys, values in zip(writer._keys, writer._values, strict=True):
        keys.fill_(torch.nan)
        values.fill_(1e6)
    rows, logits = written(writer)
    assert bool(logits.isfinite().all())
    torch.testing.assert_close(logits, whole_pass(plain, small_teacher, rows), rtol=1e-3, atol=1e-4)


def test_what_the_cache_holds_before_the_position_is_read(writer):
    def poison(step):
        if step == 20:
            writer._keys[0][:, :, 19] = torch.nan

    _, logits = written(writer, poison)
    assert bool(logits[:, :20].isfinite().all())
    assert bool(logits[:, 20].isnan().all())


def parse(row: list[int]) -> tuple[set[int], int]:
    """Which prompts a row follows and how many answers; ValueError where a text follows none."""
    used, answers, at = set(), 0, 0
    while at < len(row):
        fits = [i for i, p in enumerate(PROMPTS) if row[at : at + len(p)] == p[: len(row) - at]]
        if not fits:
            raise ValueError(f"no prompt at {at}: {row[at : at + 6]}")
        prompt = fits[0]
        used.add(prompt)
        at += len(PROMPTS[prompt])
        asks = ASKS[prompt]
        while at < len(row):
            token = row[at]
            if token == MESSAGE_END and asks:
                asks = False
                if row[at + 1 : at + 3] != ANSWER[: len(row) - at - 1]:
                    raise ValueError(f"no answer at {at}")
                answers += 1
                at += 3
            elif token == MESSAGE_END:
                at += 1
                break
            elif token == SEPARATOR:
                break
            else:
                at += 1
    return used, answers


def test_prompts_stand_verbatim_where_texts_end_and_answers_follow_the_model_s_own_questions(writer):
    rows, _ = written(writer)
    found = [parse(row) for row in rows.tolist()]
    assert set.union(*(used for used, _ in found)) == {0, 1, 2}
    assert sum(answers for _, answers in found) > 3


def test_a_changed_prompt_is_noticed(writer):
    row = written(writer)[0][0].tolist()
    row[1] = 11
    with pytest.raises(ValueError, match="no prompt at 0"):
        parse(row)


def test_the_teachers_answers_are_its_probabilities_and_the_mass_outside(distil):
    generator = torch.Generator().manual_seed(4)
    states = torch.randn(30, 16, generator=generator)
    inside, outside = torch.randn(100, 16, generator=generator), torch.randn(50, 16, generator=generator)
    ids, shares = distil.answers(states, inside, outside)
    every = (states @ torch.cat([inside, outside]).T).softmax(-1)
    assert bool((ids[:, -1] == 100).all())
    torch.testing.assert_close(shares[:, -1].float(), every[:, 100:].sum(1), rtol=2e-3, atol=1e-6)
    taken = every.gather(1, ids[:, :-1].long())
    torch.testing.assert_close(shares[:, :-1].float(), taken, rtol=2e-3, atol=1e-6)
    left = every[:, :100].sum(1) - taken.sum(1)
    torch.testing.assert_close(shares.float().sum(1) + left, torch.ones(30), rtol=2e-3, atol=1e-3)
    least = taken.min(1).values
    assert bool(((every[:, :100] > least[:, None]).sum(1) == distil.TOP - 2).all())  # the likeliest, no others


def test_rows_cover_the_stream_and_open_with_the_separator(distil):
    starts = np.flatnonzero(np.random.default_rng(1).random(20_000) < 0.02)
    starts = np.unique([0, *starts])
    stream = distil.Stream(np.arange(1, 20_001).astype(np.uint16), starts)  # every token occurs once
    rows = distil.in_rows(stream)
    assert rows.shape[1] == distil.ROW
    assert (rows[:, 0] == SEPARATOR).all()
    assert (np.diff(rows[:, 1:].astype(int), axis=1) == 1).all()
    covered = np.unique(rows[:, 1:])
    assert covered.tolist() == list(range(1, int(covered[-1]) + 1))
    assert covered[-1] > 20_000 - distil.ROW
    assert np.isin(rows[:, 1] - 1, starts).mean() > 0.9  # most open with a paragraph's first token


@pytest.fixture(scope="module")
def run(distil, tmp_path_factory):
    """A work folder after generate, score, train and export, with a tiny teacher over the whole vocabulary."""
    proxy_student = importlib.import_module("proxy_student")
    large, work = tmp_path_factory.mktemp("large"), tmp_path_factory.mktemp("work")
    tiny_llama(large, 49_152)
    shutil.copy(builtin_directory() / "tokenizer.json", large)
    books = work / "books.jsonl.gz"
    books.write_bytes(b"books")
    np.savez(
        work / "prompts.npz", ids=np.asarray([[0, 1, 30], [0, 40, 50]], dtype=np.uint16),
        lengths=np.asarray([3, 3], dtype=np.uint16), asks=np.asarray([False, True]),
        answer=np.asarray([198, 1], dtype=np.uint16),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distil, "ROW", 24)
        patch.setattr(distil, "HELD_OUT_ROWS", 3)
        patch.setattr(proxy_student, "LOG_STEPS", 5)
        sentence = np.arange(300, 340).astype(np.uint16)
        for kind, first in (("books", 300), ("modern", 400)):
            ids = np.tile(sentence - 300 + first, 40).astype(np.uint16)
            rows = distil.in_rows(distil.Stream(ids, np.arange(0, len(ids), 40)))
            np.save(work / f"{kind}-train.npy", rows[:-3])
            np.save(work / f"{kind}-held-out.npy", rows[-3:])
        shared = {"large": large, "work": work, "seed": 1, "device": "cpu", "name": "proxy"}
        distil.generate(Namespace(**shared, rows=8, seconds=0))
        distil.score(Namespace(**shared, vocabulary=600, rows=16))
        distil.train(
            Namespace(
                **shared, layers="0,2;fresh:2", trial_seconds=0.3, intermediate=16, rows=16, lr=0.01,
                embedding_share=1.0, weight_decay=0.01, warmup_steps=2, decay_share=0.4, distill_share=0.2, seconds=4,
                compile=False,
            )
        )  # fmt: skip
        # Short rows of noise make few records; what the export measures does not depend on it.
        patch.setattr(importlib.import_module("proxy_export"), "SHORTEST_RECORD", 1)
        distil.write(Namespace(**shared, books=books, out=work / "out"))
        kinds = distil.texts(work)
    return Namespace(large=large, work=work, kinds=kinds, shared=shared)


def test_no_held_out_row_is_trained_on(run):
    train, held_out = (load_file(run.work / f"scored-{name}.safetensors")["rows"] for name in ("train", "held-out"))
    assert len(train) == sum(len(rows) for rows, _ in run.kinds.values())
    assert len(held_out) == sum(len(rows) for _, rows in run.kinds.values()) == 9
    written_rows = np.load(run.work / "generated.npy")
    kept = run.kinds["generated"]
    assert np.array_equal(np.concatenate(kept), written_rows)
    assert not {row.tobytes() for row in kept[0]} & {row.tobytes() for row in kept[1]}


def test_a_run_s_loss_falls_and_its_log_names_the_better_beginning(run):
    log = [json.loads(line) for line in (run.work / "proxy.log.jsonl").read_text().splitlines()]
    trials = [entry for entry in log if "score" in entry]
    assert [entry["begins"] for entry in trials] == ["0,2", "fresh:2"]
    final = log[-1]
    assert final["final"]
    best = min(trials, key=lambda entry: entry["score"])
    assert final["held_out_books"] < best["held_out_books"] - 0.1
    assert final["tokens"] > best["tokens"]


def test_the_export_is_what_the_run_trained_rounded(run, plain):
    out = run.work / "out"
    model, token_map = load_builtin_weights(out, Vocabulary.from_file(out / "tokenizer.json"))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert token_map.small_to_large.tolist() == json.loads((run.work / "small_to_large.json").read_text())
    student = {name: tensor.float() for name, tensor in load_file(run.work / "proxy.safetensors").items()}
    shape = plain.Shape(2, 4, 2, 500.0, 1e-5)
    rows = load_file(run.work / "scored-held-out.safetensors")["rows"].long()
    with torch.no_grad():
        exact = plain.hidden(student, rows, shape, torch.float32) @ student["model.embed_tokens.weight"].T
        assert (model(input_ids=rows).logits - exact).norm() < 0.03 * exact.norm()
    final = json.loads((run.work / "proxy.log.jsonl").read_text().splitlines()[-1])
    for kind, loss in manifest["held_out_loss"].items():
        assert loss == pytest.approx(final[f"held_out_{kind}"], abs=0.1)


def test_the_strongest_neurons_of_a_layer_are_kept(run, plain):
    student = importlib.import_module("proxy_student")
    teacher = plain.load(run.large, torch.device("cpu"), torch.float32)
    gate = teacher["model.layers.1.mlp.gate_proj.weight"]
    strong = [3, 17, 40]
    gate[strong] *= 1000
    begun = student.initial(teacher, np.asarray([*range(500), -1]), "1", 3, 1)
    assert torch.equal(begun["model.layers.0.mlp.gate_proj.weight"], gate[strong])
    fresh = student.initial(teacher, np.asarray([*range(500), -1]), "fresh:1", 3, 1)
    assert not fresh["model.layers.0.mlp.down_proj.weight"].any()
    assert torch.equal(fresh["model.embed_tokens.weight"][:500], teacher["model.embed_tokens.weight"][:500])


def test_all_steps_but_the_export_run_where_the_package_is_not():
    """On a borrowed machine with a GPU there may be PyTorch, and little else."""
    script = "import sys; sys.modules['fedpt_secure'] = None; import distil_proxy; print(distil_proxy.write.__name__)"
    done = subprocess.run([sys.executable, "-c", script], cwd=TOOLS, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "write", done.stderr
    done = subprocess.run(
        [sys.executable, "-c", script.replace("distil_proxy.write", "__import__('proxy_export').export")],
        cwd=TOOLS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "fedpt_secure" in done.stderr
