"""The commands: what they print where, and one line with a hint for every bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedpt_secure.cli import app

RUNNER = CliRunner()


def invoke(*arguments):
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def arguments(tiny_models, chat_file):
    return [
        *("train", "--data", chat_file, "--client-column", "who", "--text-column", "said"),
        *("--small", tiny_models["small"], "--large", tiny_models["large"], "--device", "cpu"),
        *("--context-length", 12, "--rounds", 2, "--cohort", 5, "--lora-rank", 2, "--evaluation-records", 10),
    ]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_train_prints_the_result_on_stdout_and_the_rest_on_stderr(arguments, tmp_path):
    result = invoke(*arguments, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    for expected in ("large LM alone", "small LM, tuned", "proxy-tuned", "Privacy: epsilon <=", "Assumes:", "kB up"):
        assert expected in result.stdout
    assert "run directory" in result.stderr
    assert "run directory" not in result.stdout


def test_json_is_the_summary_file(arguments, tmp_path):
    result = invoke(*arguments, "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((tmp_path / "run" / "summary.json").read_text())


def test_epsilon_inf_is_said_in_words(arguments, tmp_path):
    result = invoke(*arguments, "--epsilon", "inf", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "NOT PRIVATE" in result.stderr
    assert "NOT PRIVATE" in result.stdout
    assert "epsilon <=" not in result.stdout


def test_resume_goes_on_and_refuses_other_settings_by_name(arguments, tmp_path):
    assert invoke(*arguments, "--out", tmp_path / "run").exit_code == 0
    again = invoke("train", "--resume", tmp_path / "run", "--json")
    assert again.exit_code == 0, again.output
    other = invoke("train", "--resume", tmp_path / "run", "--epsilon", "8")
    assert other.exit_code == 8
    assert "privacy.epsilon: 4.0 != 8" in other.stderr


def test_generate_shows_both_continuations(arguments, tmp_path):
    assert invoke(*arguments, "--out", tmp_path / "run").exit_code == 0
    command = ("generate", "--run", tmp_path / "run", "hey you", "--max-new-tokens", 4)
    shown = invoke(*command)
    assert shown.exit_code == 0, shown.output
    assert "large LM alone" in shown.stdout
    texts = json.loads(invoke(*command, "--json").stdout)
    assert set(texts) == {"prompt", "base", "proxy_tuned"}


@pytest.mark.parametrize(
    ("bad", "exit_code", "said"),
    [
        (("--epsilon", "0"), 2, "epsilon"),
        (("--epsilon", "-1"), 2, "epsilon"),
        (("--epsilon", "nan"), 2, "epsilon"),
        (("--delta", "2"), 2, "delta"),
        (("--delta", "0.2"), 6, "not below 1/"),
        (("--cohort", "50"), 2, "the data has 6"),
        (("--minimum-records", "13"), 4, ""),
        (("--data", "no/such/file.jsonl"), 4, "no/such/file.jsonl"),
        (("--client-column", "whom"), 4, "whom"),
        (("--text-column", "says"), 4, "says"),
        (("--clients", "4"), 2, "partition"),
        (("--large", "no/such/model"), 5, "no/such/model"),
        (("--small", "no/such/model"), 5, "no/such/model"),
        (("--device", "abacus"), 2, "abacus"),
        (("--lora-layers", "9"), 2, "9"),
        (("--context-length", "1"), 2, "context_length"),
        (("--rounds", "0"), 2, "rounds"),
        (("--dropout", "1"), 2, "dropout"),
    ],
)
def test_bad_input_is_one_line_with_a_documented_exit_code(arguments, tmp_path, bad, exit_code, said):
    result = invoke(*arguments, "--out", tmp_path / "run", *bad)
    assert result.exit_code == exit_code, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert said in errors[0]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_corrupt_weight_file_is_one_line(arguments, tiny_models, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_models["small"], broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = invoke(*arguments, "--out", tmp_path / "run", "--small", broken)
    assert result.exit_code == 5, result.output
    assert result.stderr.count("error:") == 1


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(arguments, tmp_path, monkeypatch):
    import os

    real = os.fsync

    def full(descriptor):
        if any(path.name.startswith(".state.safetensors") for path in Path(tmp_path / "run").rglob(".*")):
            raise OSError(28, "No space left on device", "state.safetensors")
        real(descriptor)

    monkeypatch.setattr("os.fsync", full)
    result = invoke(*arguments, "--out", tmp_path / "run")
    assert result.exit_code == 10, result.output
    assert "No space left" in result.stderr
    assert not list((tmp_path / "run").rglob(".*"))
    assert not list((tmp_path / "run" / "checkpoint").glob("state*"))


def test_a_directory_in_use_is_refused(arguments, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    result = invoke(*arguments, "--out", tmp_path / "run")
    assert result.exit_code == 8
    assert (tmp_path / "run" / "mine.txt").read_text() == "keep me"


def test_generate_without_a_run_is_one_line(tmp_path):
    assert invoke("generate", "--run", tmp_path, "hello").exit_code == 8


def test_fetch_status_lists_every_artefact_offline():
    rows = json.loads(invoke("fetch", "--status", "--json").stdout)
    assert {row["name"] for row in rows} >= {"chitchat", "sotu", "smollm2"}
    assert all(row["state"] == "missing" for row in rows)


def test_version_and_help_need_no_heavy_import():
    import subprocess
    import sys

    script = "import sys; from fedpt_secure.cli import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    assert invoke("--version").exit_code == 0
    assert "Privacy" in invoke("train", "--help").stdout
