"""What a client and a server train with: little of the large model, and never a small one of other tokens."""

from __future__ import annotations

import json

import pytest

from fedpt_secure.config import RunConfig, build
from fedpt_secure.data import Cache
from fedpt_secure.errors import ConfigError, ModelError
from fedpt_secure.federation.setup import load_training_models
from fedpt_secure.lm.base import builtin_directory
from fedpt_secure.lm.output_classes import ClassDraw
from fedpt_secure.progress import SILENT


def load(models, cache, modules=("down_proj",), **training):
    models = {"context_length": 12, "device": "cpu", **models}
    lora = {"rank": 2, "modules": list(modules)}
    config = build(RunConfig, {"models": models, "lora": lora, "training": training})
    return load_training_models(config, cache=Cache(cache), progress=SILENT)


@pytest.mark.parametrize("large", [False, True])
def test_the_tokenizer_is_found_without_the_large_models_weights(large, tiny_models, tmp_path):
    models = {"small": tiny_models["small"]}
    if large:
        folder = tmp_path / "large"
        folder.mkdir()
        (folder / "tokenizer.json").write_bytes((builtin_directory() / "tokenizer.json").read_bytes())
        models["large"] = str(folder)
    assert load(models, tmp_path / "cache").tokenizer.ids("good day") != []
    assert not (tmp_path / "cache").exists(), "something was fetched"


def test_a_large_model_of_other_tokens_than_the_built_in_proxys_is_refused_where_its_tokenizer_lies_here(tmp_path):
    """Else a federation would spend its clients' budgets on an adapter that cannot steer."""
    content = json.loads((builtin_directory() / "tokenizer.json").read_text())
    model = content["model"]
    model["vocab"]["no such token"] = model["vocab"].pop("".join(model["merges"].pop()))
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="no such token"):
        load({"small": "builtin", "large": str(folder)}, tmp_path / "cache")


def test_the_built_in_proxys_map_follows_the_same_tokens_under_other_ids(tmp_path):
    content = json.loads((builtin_directory() / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, other = [token for token, index in vocabulary.items() if index in (1000, 1001)]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    plain = load({"small": "builtin"}, tmp_path / "cache").small.token_map.small_of_large
    swapped = load({"small": "builtin", "large": str(folder)}, tmp_path / "cache").small.token_map.small_of_large
    assert plain[1000] != plain[1001]
    assert swapped[[1000, 1001]].tolist() == plain[[1001, 1000]].tolist()


def test_a_sampled_softmax_takes_the_classes_that_public_text_has_most_of(tiny_models, tmp_path):
    models = load({"small": tiny_models["small"]}, tmp_path / "cache", output_classes=200)
    drawn = models.small.output_classes(200, key=bytes(16)).rows[:100].tolist()
    common = models.small.token_map.to_small(models.tokenizer.ids(" the of and a to in is"))
    assert set(common) <= set(drawn)


def test_more_classes_than_there_are_are_refused_before_anything_is_trained(tiny_models, tmp_path):
    with pytest.raises(ConfigError, match=r"output_classes is 999999; it must be at least 2 and below"):
        load({"small": tiny_models["small"]}, tmp_path / "cache", output_classes=999_999)


def test_classes_by_the_record_are_what_the_settings_ask_for(tiny_models, tmp_path):
    asked = {"output_classes": 30, "output_classes_by": "record"}
    draw = load({"small": tiny_models["small"]}, tmp_path / "cache", **asked).small.output_classes(30, key=bytes(16))
    assert isinstance(draw, ClassDraw)
    assert draw.own == 20


def test_classes_by_the_record_of_a_deeper_adapter_are_refused_before_anything_is_trained(tiny_models, tmp_path):
    asked = {"output_classes": 30, "output_classes_by": "record"}
    with pytest.raises(ConfigError, match='output_classes_by is "record"'):
        load({"small": tiny_models["small"]}, tmp_path / "cache", modules=["q_proj"], **asked)
