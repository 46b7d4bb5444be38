"""The in-process black box: answers like the plain model, gives nothing else away, refuses damaged weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedpt_secure.errors import BlackBoxError, ModelError
from fedpt_secure.proxy.black_box import BlackBoxLM, guard
from fedpt_secure.proxy.local_transformers import LocalTransformersLM

CPU = torch.device("cpu")
SEQUENCES = [[0, 504, 3575, 12], [0], [0, 9, 9, 9, 9, 9, 9, 49_151, 300], [7, 8], [0, 1, 2]]


@pytest.fixture(scope="module")
def plain(large_directory):
    return AutoModelForCausalLM.from_pretrained(large_directory).eval()


def one_by_one(plain, sequence):
    with torch.no_grad():
        return plain(torch.tensor([sequence])).logits[0, :, :49_152].log_softmax(-1)


@pytest.mark.parametrize("batch_tokens", [1, 8, 20, 1024])
def test_scores_equal_the_plain_models_one_sequence_at_a_time_whatever_the_batch(large_directory, plain, batch_tokens):
    box = LocalTransformersLM(large_directory, CPU, batch_tokens=batch_tokens)
    answers = list(guard(box).score(SEQUENCES))
    assert [len(answer) for answer in answers] == [len(sequence) for sequence in SEQUENCES]
    for answer, sequence in zip(answers, SEQUENCES, strict=True):
        torch.testing.assert_close(answer, one_by_one(plain, sequence), rtol=0, atol=1e-4)


def test_padding_columns_of_the_output_layer_get_no_probability(large):
    (answer,) = large.score([[0, 5]])
    assert answer.shape == (2, 49_152)
    assert answer.logsumexp(-1).abs().max() < 1e-5


def test_a_session_equals_scoring_the_whole_text_also_for_prompts_of_different_lengths(large, plain):
    rows = [[0, 504, 3575, 12, 77], [0, 3], [0]]
    session = guard(large).start(rows)
    for step in range(4):
        answer = session.logprobs()
        for row, ids in enumerate(rows):
            torch.testing.assert_close(answer[row], one_by_one(plain, ids)[-1], rtol=0, atol=1e-4)
        appended = [(31 * step + row) % 500 for row in range(3)]
        session.append(appended)
        rows = [[*ids, token] for ids, token in zip(rows, appended, strict=True)]


def test_it_is_a_black_box_that_offers_log_probabilities_and_nothing_of_the_inside(large):
    assert isinstance(large, BlackBoxLM)
    assert {name for name in dir(large) if not name.startswith("_")} == {"capabilities", "vocabulary", "score", "start"}
    assert large.capabilities.full_vocabulary
    assert large.capabilities.context_length == 64
    assert large.vocabulary.size == 49_152


def test_no_answer_carries_a_gradient(large):
    (answer,) = large.score([[0, 5]])
    assert not answer.requires_grad
    assert not large.start([[0]]).logprobs().requires_grad


def test_bfloat16_is_close_and_answers_in_float32(large_directory, large):
    (half,) = LocalTransformersLM(large_directory, CPU, dtype="bfloat16").score([SEQUENCES[0]])
    (full,) = large.score([SEQUENCES[0]])
    assert half.dtype == torch.float32
    assert half.logsumexp(-1).abs().max() < 1e-5
    assert (half - full).abs().max() > 0
    assert (half.exp() - full.exp()).abs().sum(-1).max() < 0.2


def test_texts_past_the_context_are_refused_by_the_guard(large):
    with pytest.raises(BlackBoxError, match="65 tokens"):
        guard(large).score([[0] * 65])
    with pytest.raises(BlackBoxError, match="at least one token"):
        large.start([[]])


@pytest.fixture
def copy(large_directory, tmp_path):
    shutil.copytree(large_directory, tmp_path / "copy")
    return tmp_path / "copy"


def truncate_weights(path):
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])


def drop_a_weight(path):
    weights = load_file(path / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def reshape_a_weight(path):
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros(7)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def only_pickled_weights(path):
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def narrow_the_output(path):
    config = json.loads((path / "config.json").read_text())
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:49_000].clone()
    config["vocab_size"] = 49_000
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "cannot load"),
        (lambda path: (path / "config.json").unlink(), "cannot load"),
        (lambda path: (path / "config.json").write_text("{"), "cannot load"),
        (lambda path: (path / "config.json").write_text('{"a": 1}'), "cannot load"),
        (lambda path: (path / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda path: shutil.rmtree(path), "no tokenizer"),
        (truncate_weights, "cannot load"),
        (drop_a_weight, "incomplete: missing keys, first model.layers.1.mlp.up_proj.weight"),
        (reshape_a_weight, "cannot load"),
        (only_pickled_weights, "cannot load"),
        (narrow_the_output, "49000 output columns for 49152 tokens"),
    ],
    ids=[
        "no-weights", "no-config", "broken-config", "empty-config", "no-tokenizer", "no-directory", "truncated",
        "absent-weight", "wrong-shape", "pickle", "narrow",
    ],
)  # fmt: skip
def test_a_damaged_model_is_a_one_line_error(copy, damage, message):
    damage(copy)
    with pytest.raises(ModelError, match=message) as caught:
        LocalTransformersLM(copy, CPU)
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_weights_that_hold_nan_are_caught_at_the_first_answer(copy):
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BlackBoxError, match="position 0 is not a distribution"):
        next(guard(LocalTransformersLM(copy, CPU)).score([[0, 1]]))


def test_loading_says_nothing_on_the_terminal(large_directory, capfd):
    LocalTransformersLM(large_directory, CPU)
    assert capfd.readouterr() == ("", "")
