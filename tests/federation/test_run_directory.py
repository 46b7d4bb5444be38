"""A run directory is found whole or refused; what a crash left over is cut away."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedpt_secure.config import RunConfig, build
from fedpt_secure.errors import ConfigError, RunDirectoryError
from fedpt_secure.federation import Checkpoint, RunDirectory

CONFIG = RunConfig()


def checkpoint(rounds_done=3):
    return Checkpoint(
        run_id=bytes(range(16)),
        rounds_done=rounds_done,
        data_digest="d",
        model_digest="m",
        tensors={"adapter": np.arange(4, dtype=np.float32), "second_moment": np.ones(4)},
        scalars={"optimizer_steps": 2, "seconds": {"rounds": 1.5}},
    )


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    assert directory.load_checkpoint() is None
    directory.save_checkpoint(checkpoint())
    loaded = RunDirectory.open(tmp_path / "run").load_checkpoint()
    assert (loaded.run_id, loaded.rounds_done, loaded.scalars) == (bytes(range(16)), 3, checkpoint().scalars)
    assert all((loaded.tensors[name] == value).all() for name, value in checkpoint().tensors.items())
    assert loaded.tensors["second_moment"].dtype == np.float64


@pytest.mark.parametrize("damage", [lambda content: content[:-3], lambda content: b"", lambda content: b"x" + content])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    directory.save_checkpoint(checkpoint())
    path = tmp_path / "run" / "checkpoint" / "state.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunDirectoryError, match="damaged"):
        directory.load_checkpoint()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    directory.save_checkpoint(checkpoint(1))
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        directory.save_checkpoint(checkpoint(2))
    assert directory.load_checkpoint().rounds_done == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["state.safetensors"]


def test_a_directory_in_use_is_not_started_again(tmp_path):
    RunDirectory.create(tmp_path / "run", CONFIG)
    with pytest.raises(RunDirectoryError, match="not empty") as caught:
        RunDirectory.create(tmp_path / "run", CONFIG)
    assert "--resume" in caught.value.hint


def test_something_else_is_not_opened(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"no config\.toml"):
        RunDirectory.open(tmp_path)


def test_configuration_survives_the_round_trip(tmp_path):
    config = build(RunConfig, {"privacy": {"epsilon": float("inf")}, "lora": {"modules": ["q_proj"]}})
    assert RunDirectory.create(tmp_path / "run", config).config() == config


def test_other_settings_are_refused_by_name(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    directory.require_settings({"privacy": {"epsilon": 4.0}})
    with pytest.raises(RunDirectoryError, match=r"privacy\.epsilon: 4\.0 != 8") as caught:
        directory.require_settings({"privacy": {"epsilon": 8}, "federation": {"rounds": 99}})
    assert "federation.rounds" in caught.value.message
    with pytest.raises(ConfigError):
        directory.require_settings({"privacy": {"epsilon": -1}})


def test_log_lines_of_unfinished_rounds_are_cut(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    for index in range(4):
        directory.append("metrics", {"round": index})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"round": 4, "small_tu')
    directory.cut_logs(3)
    assert directory.read_log("metrics") == [{"round": index} for index in range(3)]
    assert directory.read_log("transcript") == []


def test_a_log_never_holds_what_is_not_json(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    with pytest.raises(ValueError, match="not JSON compliant"):
        directory.append("metrics", {"round": 0, "loss": float("nan")})


def test_starts_are_counted(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    assert [directory.count_start() for _ in range(3)] == [0, 1, 2]
    assert json.loads((tmp_path / "run" / "checkpoint" / "process.json").read_text()) == {"starts": 3}
