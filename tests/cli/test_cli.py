"""The commands: what they print where, and one line with a hint for every bad input."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedpt_secure.cli import app
from fedpt_secure.cli.privacy_warning import warn_if_not_private
from fedpt_secure.config import RunConfig, build, load

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


def test_resume_checks_settings_together_with_the_runs_own(arguments, tmp_path):
    """`--partition` alone would be refused in a new run; here the run already says how many clients."""
    dealt = [*arguments, "--rounds", 1, "--clients", 5, "--partition", "equal", "--out", tmp_path / "run"]
    dealt.remove("--client-column")
    dealt.remove("who")
    assert invoke(*dealt).exit_code == 0
    again = invoke("train", "--resume", tmp_path / "run", "--partition", "equal", "--json")
    assert again.exit_code == 0, again.output
    other = invoke("train", "--resume", tmp_path / "run", "--clients", 4)
    assert other.exit_code == 8
    assert "data.clients: 5 != 4" in other.stderr
    unacceptable = invoke("train", "--resume", tmp_path / "run", "--epsilon", "nan")
    assert unacceptable.exit_code == 2
    assert "epsilon" in unacceptable.stderr


def test_a_config_file_reaches_every_setting_and_the_command_line_overrides_it(arguments, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("seed = 3\n[federation]\nrounds = 5\n[training]\nserver_optimizer = 'average'\n")
    result = invoke(*arguments, "--config", file, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    config = load(tmp_path / "run" / "config.toml")
    assert (config.seed, config.federation.rounds, config.federation.cohort) == (3, 2, 5)
    assert config.training.server_optimizer == "average"
    resumed = invoke("train", "--resume", tmp_path / "run", "--config", file)
    assert resumed.exit_code == 2
    assert "--config" in resumed.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"rounds = ", "not TOML"),
        (b"\xff\xfe", "not TOML"),
        (b"[federation]\nround = 3", "federation.round"),
        (b"federation = 3", "federation: must be a group"),
        (b"[federation]\nring_bits = 64", "ring_bits"),
        (b"[federation]\ndropout = true", "federation.dropout"),
    ],
)
def test_a_bad_config_file_is_one_line(arguments, tmp_path, content, said):
    file = tmp_path / "settings.toml"
    file.write_bytes(content)
    result = invoke(*arguments, "--config", file, "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert result.stderr.count("error:") == 1
    assert said in result.stderr
    assert not (tmp_path / "run").exists()


def test_generate_shows_both_continuations(arguments, tmp_path):
    assert invoke(*arguments, "--out", tmp_path / "run").exit_code == 0
    command = ("generate", "--run", tmp_path / "run", "hey you", "--max-new-tokens", 4)
    shown = invoke(*command)
    assert shown.exit_code == 0, shown.output
    assert "large LM alone" in shown.stdout
    texts = json.loads(invoke(*command, "--json").stdout)
    assert set(texts) == {"prompt", "base", "proxy_tuned"}
    assert "NOT PRIVATE" not in shown.stderr
    assert json.loads(invoke(*command, "--json", "--speculate").stdout) == texts
    cut = texts["proxy_tuned"][2:4]
    options = ("--json", "--stop", cut, "--stop", "never said", "--speculate")
    assert json.loads(invoke(*command, *options).stdout)["proxy_tuned"] == texts["proxy_tuned"].split(cut)[0]
    options = ("--json", "--repetition-penalty", 10, "--top-k", 3, "--temperature", 0.5, "--seed", 4)
    assert json.loads(invoke(*command, *options).stdout)["base"] != texts["base"]


def test_the_shares_of_train_are_those_of_generate_unless_it_is_told_others(arguments, tmp_path):
    """At share 1 the answer is the tuned small LM's; with none and alpha 0 it is the large model's own."""
    settings = ("--rounds", 1, "--shares", "0:1", "--out", tmp_path / "run", "--json")
    trained = invoke(*arguments, *settings)
    assert trained.exit_code == 0, trained.output
    assert json.loads(trained.stdout)["shares"] == [[0, 1.0]]
    command = ("generate", "--run", tmp_path / "run", "hey you", "--max-new-tokens", 6, "--json")
    texts, alone = (json.loads(invoke(*command, *more).stdout) for more in ((), ("--alpha", 0, "--shares", "none")))
    assert texts["proxy_tuned"] != texts["base"]
    assert alone["proxy_tuned"] == alone["base"]


def test_generate_warns_about_a_run_that_is_not_private(arguments, tmp_path):
    settings = ("--rounds", 1, "--epsilon", "inf", "--insecure-deterministic", "--out", tmp_path / "run")
    assert invoke(*arguments, *settings).exit_code == 0
    shown = invoke("generate", "--run", tmp_path / "run", "hey you", "--max-new-tokens", 1, "--json")
    assert shown.exit_code == 0, shown.output
    assert shown.stderr.count("NOT PRIVATE") == 2
    assert json.loads(shown.stdout)


@pytest.mark.parametrize(
    ("settings", "reasons"),
    [
        ({}, []),
        ({"privacy": {"epsilon": 100.0}}, []),
        ({"privacy": {"epsilon": math.inf}}, ["infinite"]),
        ({"insecure_deterministic": True}, ["recompute"]),
    ],
)
def test_each_reason_why_a_run_is_not_private_is_said_in_red(settings, reasons):
    stream = io.StringIO()
    warn_if_not_private(build(RunConfig, settings), Console(file=stream, force_terminal=True, color_system="standard"))
    lines = stream.getvalue().splitlines()
    assert len(lines) == len(reasons)
    for line, reason in zip(lines, reasons, strict=True):
        assert line.startswith("\x1b[1;31mNOT PRIVATE:")
        assert reason in line


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (("hey \udcff",), "UTF-8"),
        (("hey", "--seed", "-1"), "seed"),
        (("hey", "--alpha", "-1"), "alpha"),
        (("hey", "--alpha", "inf"), "alpha"),
        (("hey", "--shares", "3:0.1,1:0.2"), "ascend"),
        (("hey", "--temperature", "-0.5"), "temperature"),
        (("hey", "--temperature", "1e-300"), "temperature"),
        (("hey", "--temperature", "nan"), "temperature"),
        (("hey", "--top-p", "0"), "top_p"),
        (("hey", "--top-k", "-1"), "top_k"),
        (("hey", "--repetition-penalty", "0.5"), "repetition_penalty"),
        (("hey", "--stop", ""), "stop"),
        (("hey", "--max-new-tokens", "0"), "max_new_tokens"),
    ],
)
def test_a_bad_request_to_generate_is_one_line(tmp_path, bad, said):
    result = invoke("generate", "--run", tmp_path, *bad)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("error:") == 1
    assert said in result.stderr
    assert "generate --help" in result.stderr


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
        (("--delta", "1e-13"), 2, "at least 1e-12"),
        (("--device", "meta"), 2, "not one of auto, cpu"),
        (("--lora-rank", "1025"), 2, "1024"),
        (("--alpha", "10.5"), 2, "alpha"),
        (("--shares", "0:1.5"), 2, "proxy.shares"),
        (("--shares", "0"), 2, "PLACE:SHARE"),
        (("--text-column", "sa\udcff"), 2, "UTF-8"),
        (("--config", "no/such/settings.toml"), 2, "no/such/settings.toml"),
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
    assert [path.name for path in (tmp_path / "run").rglob(".*")] == [".lock"]
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
