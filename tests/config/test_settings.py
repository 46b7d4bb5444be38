"""Settings are checked once, at the edge: types, bounds, text."""

from __future__ import annotations

import math

import pytest

from fedpt_secure.config import GenerateConfig, RunConfig, build, load, overlay, read_settings, save
from fedpt_secure.errors import ConfigError


def nested(name, value):
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


BOUNDS = [
    ("lora.rank", 1, 1024, 1025),
    ("lora.layers", 0, 1000, 1001),
    ("lora.whitening", 0.0, 1.0, 1.1),
    ("training.local_steps", 1, 10_000, 10_001),
    ("training.server_learning_rate", 1e-6, 1000.0, 1000.1),
    ("training.server_warm_up", 0, 100_000, 100_001),
    ("training.server_cool_down", 0.0, 1.0, 1.1),
    ("federation.rounds", 1, 100_000, 100_001),
    ("federation.cohort", 3, 100_000, 100_001),
    ("federation.ring_bits", 16, 32, 33),
    ("proxy.alpha", 0.0, 10.0, 10.1),
    ("evaluation.records", 10, 1_000_000, 1_000_001),
    ("privacy.delta", 1e-12, 0.5, 1.0),
]


@pytest.mark.parametrize(("name", "smallest", "largest", "above"), BOUNDS)
def test_a_bound_is_the_last_value_that_is_taken(name, smallest, largest, above):
    build(RunConfig, nested(name, smallest))
    build(RunConfig, nested(name, largest))
    with pytest.raises(ConfigError, match=name):
        build(RunConfig, nested(name, above))


def test_a_way_to_choose_classes_where_none_are_chosen_is_refused_and_not_ignored():
    build(RunConfig, {"training": {"output_classes": 30, "output_classes_by": "record"}})
    with pytest.raises(ConfigError, match="output_classes_by is 'record', and output_classes is not set"):
        build(RunConfig, nested("training.output_classes_by", "record"))


def test_a_delta_that_the_accountant_cannot_resolve_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"privacy.delta: delta must be at least 1e-12.*accountant"):
        build(RunConfig, nested("privacy.delta", 9.9e-13))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("federation.rounds", True),
        ("federation.rounds", "8"),
        ("federation.rounds", 8.0),
        ("federation.dropout", False),
        ("insecure_deterministic", 1),
        ("data.source", 3),
        ("lora.modules", "down_proj"),
        ("lora", 3),
    ],
)
def test_a_value_of_another_type_is_not_converted(name, value):
    with pytest.raises(ConfigError, match=name):
        build(RunConfig, nested(name, value))


@pytest.mark.parametrize("name", ["data.source", "data.text_column", "models.small", "models.large", "models.device"])
@pytest.mark.parametrize("text", ["a\udcffb", "a\0b"])
def test_text_that_no_file_can_hold_is_refused(name, text):
    with pytest.raises(ConfigError, match=f"{name}: must be valid UTF-8"):
        build(RunConfig, nested(name, text))


def test_text_in_a_list_is_checked_too():
    with pytest.raises(ConfigError, match="UTF-8"):
        build(RunConfig, nested("lora.modules", ["q_proj", "\ud800"]))


def test_a_prompt_that_is_not_text_is_refused_and_its_echo_is_short():
    with pytest.raises(ConfigError, match="prompt") as caught:
        build(GenerateConfig, {"prompt": "x" * 10_000 + "\udcff"}, command="generate")
    assert len(caught.value.message) < 200
    assert "generate --help" in caught.value.hint


def test_all_errors_are_reported_together():
    with pytest.raises(ConfigError, match=r"lora\.rank.*lora\.rnk|lora\.rnk.*lora\.rank"):
        build(RunConfig, {"lora": {"rank": 0, "rnk": 1}})


def test_a_configuration_survives_its_file(tmp_path):
    config = build(RunConfig, {"seed": 4, "privacy": {"epsilon": math.inf}, "lora": {"modules": ["q_proj", "\u00e9"]}})
    save(config, tmp_path / "config.toml")
    assert load(tmp_path / "config.toml") == config
    assert build(RunConfig, read_settings(tmp_path / "config.toml")) == config


def test_an_overlay_replaces_only_what_it_names():
    values = {"seed": 1, "data": {"source": "sotu", "minimum_records": 4}}
    merged = overlay(values, {"data": {"minimum_records": 5}, "proxy": {"alpha": 1.0}})
    assert merged == {"seed": 1, "data": {"source": "sotu", "minimum_records": 5}, "proxy": {"alpha": 1.0}}
    assert values["data"]["minimum_records"] == 4
    with pytest.raises(ConfigError, match="data: must be a group of settings, given 3"):
        overlay({"data": 3}, {"data": {"source": "sotu"}})


def test_a_settings_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "missing.toml"):
        with pytest.raises(ConfigError, match="cannot read the settings"):
            read_settings(path)


def test_texts_and_responses_have_shares_of_their_own_by_default():
    """The large model has read a prompt before a response and nothing before a text."""
    proxy = build(RunConfig, {}).proxy
    assert proxy.shares[0][1] > proxy.response_shares[0][1] > 0
    assert not build(RunConfig, {}).data.has_prompts
    assert build(RunConfig, {"data": {"prompt_column": "q", "response_column": "a"}}).data.has_prompts


def test_shares_survive_their_file_and_are_checked_by_name(tmp_path):
    config = build(RunConfig, {"proxy": {"shares": [[0, 1], [1, 0.25]]}})
    assert config.proxy.shares == ((0, 1.0), (1, 0.25))
    save(config, tmp_path / "config.toml")
    assert load(tmp_path / "config.toml") == config
    for wrong in (
        [[0, 1.5]],
        [[2, 0.1], [1, 0.1]],
        [[-1, 0.1]],
        [[0, math.nan]],
        [[0.5, 0.1]],
        [["0", 0.1]],
        [[0]],
        "0:1",
    ):
        with pytest.raises(ConfigError, match=r"proxy\.shares"):
            build(RunConfig, {"proxy": {"shares": wrong}})
