"""A run directory is found whole or refused; what a crash left over is cut away."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tomllib
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

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
        config_toml=CONFIG.to_toml(),
        tensors={
            "adapter": np.arange(4, dtype=np.float32),
            "first_moment": np.zeros(4),
            "second_moment": np.ones(4),
            "seen": np.ones(4),
            "average": np.zeros(4),
        },
        scalars={"optimizer_steps": 2, "seconds": {"rounds": 1.5}, "clip_norm": 0.1},
    )


def in_another_process(work):
    """Run in a fork; returns its exit code: 0, 8 where it was refused, or minus the signal that ended it."""

    def reporting():
        try:
            work()
        except RunDirectoryError as error:
            os._exit(error.exit_code)

    process = multiprocessing.get_context("fork").Process(target=reporting)
    process.start()
    process.join(30)
    return process.exitcode


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def refused(action, *, match):
    with pytest.raises(RunDirectoryError, match=match) as caught:
        action()
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    assert directory.load_checkpoint() is None
    directory.save_checkpoint(checkpoint())
    loaded = RunDirectory.open(tmp_path / "run").load_checkpoint()
    assert build(RunConfig, tomllib.loads(loaded.config_toml)) == CONFIG
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


CHECKPOINT_DAMAGE = {
    "no adapter": (lambda c: replace(c, tensors=without(c.tensors, "adapter")), "lacks 'adapter'"),
    "no first moment": (lambda c: replace(c, tensors=without(c.tensors, "first_moment")), "lacks 'first_moment'"),
    "no counts": (lambda c: replace(c, tensors=without(c.tensors, "seen")), "lacks 'seen'"),
    "no average": (lambda c: replace(c, tensors=without(c.tensors, "average")), "lacks 'average'"),
    "no second moment": (lambda c: replace(c, tensors=without(c.tensors, "second_moment")), "lacks 'second_moment'"),
    "unequal lengths": (lambda c: replace(c, tensors=c.tensors | {"first_moment": np.zeros(3)}), "one length"),
    "whole numbers": (lambda c: replace(c, tensors=c.tensors | {"adapter": np.arange(4)}), "float vectors"),
    "no steps": (lambda c: replace(c, scalars=without(c.scalars, "optimizer_steps")), "lacks 'optimizer_steps'"),
    "no clip norm": (lambda c: replace(c, scalars=without(c.scalars, "clip_norm")), "lacks 'clip_norm'"),
    "no clipping at all": (lambda c: replace(c, scalars=c.scalars | {"clip_norm": 0}), "0, not a number above 0"),
    "steps not whole": (lambda c: replace(c, scalars=c.scalars | {"optimizer_steps": 1.5}), "1.5, not a count"),
    "steps not a number": (lambda c: replace(c, scalars=c.scalars | {"optimizer_steps": True}), "True, not a count"),
    "no seconds": (lambda c: replace(c, scalars=without(c.scalars, "seconds")), "lacks 'seconds'"),
    "seconds no object": (lambda c: replace(c, scalars=c.scalars | {"seconds": [1.0]}), "not numbers by phase"),
    "seconds no numbers": (lambda c: replace(c, scalars=c.scalars | {"seconds": {"a": "b"}}), "not numbers by phase"),
    "scalars no object": (lambda c: replace(c, scalars=[1]), "not an object"),
    "short run id": (lambda c: replace(c, run_id=b"x"), "run id '78'"),
    "negative rounds": (lambda c: replace(c, rounds_done=-1), "round count -1"),
}


def without(values, name):
    return {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize("damage", CHECKPOINT_DAMAGE)
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, damage):
    change, match = CHECKPOINT_DAMAGE[damage]
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    directory.save_checkpoint(change(checkpoint()))
    refused(directory.load_checkpoint, match=f"state.safetensors is damaged: .*{match}")


@pytest.mark.parametrize("metadata", [None, {"run_id": "00" * 16}, {"run_id": "not hex"}])
def test_a_checkpoint_without_its_metadata_is_refused(tmp_path, metadata):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    directory.save_checkpoint(checkpoint())
    save_file(checkpoint().tensors, tmp_path / "run" / "checkpoint" / "state.safetensors", metadata=metadata)
    refused(directory.load_checkpoint, match="damaged")


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    directory.save_checkpoint(checkpoint(1))
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        directory.save_checkpoint(checkpoint(2))
    assert directory.load_checkpoint().rounds_done == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["state.safetensors"]


def test_a_run_is_not_started_again(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    directory.save_checkpoint(checkpoint(0))
    del directory
    error = refused(lambda: RunDirectory.create(tmp_path / "run", CONFIG), match="not empty")
    assert "--resume" in error.hint


def test_a_start_without_a_checkpoint_is_taken_over(tmp_path):
    path = tmp_path / "run"

    def start():
        directory = RunDirectory.create(path, CONFIG)
        directory.count_start()
        (path / "metrics.jsonl").touch()
        (path / "checkpoint" / ".process.json.abcdefgh.partial").touch()
        os.replace = lambda *args: die()
        directory.save_checkpoint(checkpoint(0))

    assert in_another_process(start) == -signal.SIGKILL
    other = build(RunConfig, {"seed": 7})
    directory = RunDirectory.create(path, other)
    assert directory.config() == other
    assert directory.count_start() == 0
    assert sorted(entry.name for entry in path.iterdir()) == [".lock", "checkpoint", "config.toml", "metrics.jsonl"]
    assert [entry.name for entry in (path / "checkpoint").iterdir()] == ["process.json"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", ""),
        ("metrics.jsonl", "{}\n"),
        ("config.toml", "[theirs]\n"),
        ("config.toml", "no toml"),
        ("checkpoint", "a file"),
        ("checkpoint/more", ""),
        ("clients/00000/ledger.sqlite", ""),
        (".hidden.partial", ""),
    ],
)
def test_a_directory_with_anything_else_is_left_alone(tmp_path, name, content):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    refused(lambda: RunDirectory.create(tmp_path / "run", CONFIG), match="not empty")
    assert path.read_text() == content
    assert [entry for entry in tmp_path.rglob("*") if entry.is_file()] == [path]


def test_a_file_is_not_a_run_directory(tmp_path):
    (tmp_path / "run").touch()
    refused(lambda: RunDirectory.create(tmp_path / "run", CONFIG), match="not a directory")


def test_of_many_processes_that_start_one_run_one_gets_it(tmp_path):
    context = multiprocessing.get_context("fork")
    gate, done = context.Barrier(4), context.Barrier(4)

    def start(index):
        gate.wait(30)
        try:
            directory = RunDirectory.create(tmp_path / "run", CONFIG)
        except RunDirectoryError as error:
            code = error.exit_code
        else:
            code = 0
        done.wait(30)  # so that the one that got it still holds it when the others ask
        if code == 0:
            assert directory.path == tmp_path / "run"
        os._exit(code)

    processes = [context.Process(target=start, args=(index,)) for index in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(process.exitcode for process in processes) == [0, 8, 8, 8]


def test_a_created_run_is_locked_until_its_work_is_done(tmp_path):
    path = tmp_path / "run"
    directory = RunDirectory.create(path, CONFIG)

    def work():
        with RunDirectory.open(path).locked():
            pass

    assert in_another_process(work) == 8
    with directory.locked():
        assert in_another_process(work) == 8
        refused(lambda: RunDirectory.create(path, CONFIG), match="in use by another process")
    assert in_another_process(work) == 0
    with directory.locked():
        assert in_another_process(work) == 8


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "run"

    def start():
        with RunDirectory.create(path, CONFIG).locked():
            die()

    assert in_another_process(start) == -signal.SIGKILL
    with RunDirectory.open(path).locked():
        pass


def write_adapter(text):
    def write(directory):
        (directory / "weights").write_text(text)
        (directory / "README.md").write_text("generated")

    return write


def test_the_adapter_is_replaced_whole_with_our_readme(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    directory.replace_adapter(lambda path: [write_adapter("old")(path), (path / "stale").touch()], readme="first")
    directory.replace_adapter(write_adapter("new"), readme="ours")
    content = {entry.name: entry.read_text() for entry in directory.adapter.iterdir()}
    assert content == {"weights": "new", "README.md": "ours"}


@pytest.mark.parametrize(
    ("renames", "left"), [(0, {"weights": "old", "README.md": "1"}), (1, {}), (2, {"weights": "new", "README.md": "2"})]
)
def test_an_adapter_killed_while_it_is_swapped_is_old_new_or_absent(tmp_path, renames, left):
    path = tmp_path / "run"

    def killed():
        directory = RunDirectory.create(path, CONFIG)
        directory.replace_adapter(write_adapter("old"), readme="1")
        rename, done = os.rename, []

        def dying(source, destination):
            if len(done) == renames:
                die()
            rename(source, destination)
            done.append(source)
            if renames == len(done) == 2:
                die()

        os.rename = dying
        directory.replace_adapter(write_adapter("new"), readme="2")

    assert in_another_process(killed) == -signal.SIGKILL
    assert [entry.name for entry in path.iterdir() if entry.name.startswith(".adapter")]
    adapter = RunDirectory.open(path).adapter
    assert {entry.name: entry.read_text() for entry in (adapter.iterdir() if adapter.exists() else ())} == left
    assert {entry.name for entry in path.iterdir()} <= {".lock", "config.toml", "adapter"}


def test_temporaries_of_a_writer_at_work_are_left_to_it(tmp_path):
    path = tmp_path / "run"
    left = path / ".summary.json.abcdefgh.partial"
    with RunDirectory.create(path, CONFIG).locked():
        left.touch()
        RunDirectory.open(path)
        assert left.exists()
    RunDirectory.open(path)
    assert not left.exists()


def test_the_settled_configuration_replaces_the_first(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    settled = CONFIG.for_population(100)
    directory.save_config(settled)
    assert RunDirectory.open(tmp_path / "run").config() == settled
    assert settled != CONFIG


def test_a_configuration_that_cannot_be_written_leaves_the_first(tmp_path, monkeypatch):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        directory.save_config(CONFIG.for_population(100))
    assert directory.config() == CONFIG


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


def logged(path, rounds):
    directory = RunDirectory.create(path, CONFIG)
    for index in range(rounds):
        for log in ("metrics", "transcript"):
            directory.append(log, {"round": index})
    return directory


@pytest.mark.parametrize("tail", [b"", b'{"round": 4, "small_tu', b'{"round": 4}\n', b"\xff\xfe\n", b"\0\0\0"])
def test_log_lines_of_unfinished_rounds_are_cut(tmp_path, tail):
    directory = logged(tmp_path / "run", 4)
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as stream:
        stream.write(tail)
    directory.cut_logs(3)
    for log in ("metrics", "transcript"):
        assert directory.read_log(log) == [{"round": index} for index in range(3)]
    directory.append("metrics", {"round": 3})
    assert directory.read_log("metrics")[-1] == {"round": 3}


def test_a_run_without_rounds_has_empty_logs(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    directory.cut_logs(0)
    assert directory.read_log("transcript") == []


LINES = [b'{"round": 0}', b'{"round": 1}', b'{"round": 2}']
LOG_DAMAGE = {
    "empty": ([], "holds 0 rounds and the checkpoint 3"),
    "short": (LINES[:2], "holds 2 rounds and the checkpoint 3"),
    "half-written though the checkpoint knows it": ([*LINES[:2], b'{"rou'], "line 3"),
    "damaged in the middle": ([LINES[0], b'{"rou', LINES[2]], "line 2"),
    "damaged behind the checkpoint, but not last": ([*LINES, b'{"rou', b'{"round": 4}'], "line 4"),
    "twice": ([LINES[0], LINES[0], *LINES[1:]], "line 2: round 0 in the place of round 1"),
    "out of order": ([LINES[1], LINES[0], LINES[2]], "line 1"),
    "a list": ([LINES[0], b"[1]", LINES[2]], "line 2: not a JSON object"),
    "no round": ([LINES[0], b"{}", LINES[2]], "line 2: round is None"),
    "round as text": ([LINES[0], b'{"round": "1"}', LINES[2]], "line 2: round is '1'"),
    "round as truth": ([LINES[0], b'{"round": true}', LINES[2]], "line 2: round is True"),
    "not UTF-8": ([LINES[0], b'{"round": 1, "a": "\xff"}', LINES[2]], "line 2: .*utf-8"),
    "too deep": ([LINES[0], b"[" * 100_000, LINES[2]], "line 2"),
    "blank line": ([LINES[0], b"", *LINES[1:]], "line 2"),
}


@pytest.mark.parametrize("log", ["metrics", "transcript"])
@pytest.mark.parametrize("damage", LOG_DAMAGE)
def test_a_log_that_no_crash_leaves_is_refused_and_not_touched(tmp_path, log, damage):
    lines, match = LOG_DAMAGE[damage]
    directory = logged(tmp_path / "run", 5)
    content = b"".join(line + b"\n" for line in lines)
    (tmp_path / "run" / f"{log}.jsonl").write_bytes(content)
    refused(lambda: directory.cut_logs(3), match=rf"{log}\.jsonl is damaged: .*{match}")
    assert (tmp_path / "run" / f"{log}.jsonl").read_bytes() == content
    other = "transcript" if log == "metrics" else "metrics"
    assert len(directory.read_log(other)) == 5
    if match.startswith("line"):
        refused(lambda: directory.read_log(log), match=match)


def test_a_missing_log_is_refused(tmp_path):
    directory = logged(tmp_path / "run", 3)
    (tmp_path / "run" / "transcript.jsonl").unlink()
    refused(lambda: directory.cut_logs(3), match=r"transcript\.jsonl .* holds 0 rounds")


def test_a_log_line_is_on_disk_when_append_returns(tmp_path, monkeypatch):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    path = tmp_path / "run" / "metrics.jsonl"
    synced = []
    fsync = os.fsync

    def recording(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((name, path.read_bytes()))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", recording)
    directory.append("metrics", {"round": 0})
    line = b'{"round": 0}\n'
    assert synced == [(str(path), line), (str(tmp_path / "run"), line)]


def test_a_log_line_that_does_not_reach_the_disk_is_an_error(tmp_path, monkeypatch):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        directory.append("metrics", {"round": 0})


def test_a_log_never_holds_what_is_not_json(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    with pytest.raises(ValueError, match="not JSON compliant"):
        directory.append("metrics", {"round": 0, "loss": float("nan")})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_starts_are_counted(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    assert [directory.count_start() for _ in range(3)] == [0, 1, 2]
    assert json.loads((tmp_path / "run" / "checkpoint" / "process.json").read_text()) == {"starts": 3}


@pytest.mark.parametrize(
    "content", [b"{}", b"[]", b'{"starts": "1"}', b'{"starts": true}', b'{"starts": -1}', b"\xff", b""]
)
def test_a_damaged_count_of_starts_is_refused(tmp_path, content):
    directory = RunDirectory.create(tmp_path / "run", CONFIG)
    directory.count_start()
    (tmp_path / "run" / "checkpoint" / "process.json").write_bytes(content)
    refused(directory.count_start, match=r"process\.json")
