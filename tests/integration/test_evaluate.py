"""`fedpt-secure evaluate`: a finished run judged again, with the ceiling and with responses, and nothing chosen."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from fedpt_secure.cli import app
from fedpt_secure.config import RunConfig, build
from fedpt_secure.data import Cache
from fedpt_secure.federation import RunDirectory, run_training
from fedpt_secure.progress import SILENT
from fedpt_secure.report import summarise

RUNNER = CliRunner()


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for client in range(5):
            for record in range(12):
                answer = f"it is {client + record}\n#### {client + record}"
                row = {"who": f"p{client}", "q": f"what is {client} plus {record}", "a": answer}
                stream.write(json.dumps(row) + "\n")
    return path


def finished(settings, path, cache):
    config = build(RunConfig, settings)
    directory = RunDirectory.create(path, config)
    summary = summarise(run_training(config, directory, cache=Cache(cache), progress=SILENT))
    return directory, summary


def evaluate(run, cache, *options):
    return RUNNER.invoke(app, ["evaluate", "--run", str(run), *options], env={"FEDPT_CACHE": str(cache)})


def test_text_gets_the_losses_of_its_own_report_and_the_share_of_the_gap(tiny_settings, tmp_path):
    directory, summary = finished(tiny_settings, tmp_path / "run", tmp_path / "cache")
    checkpoint = (directory.path / "checkpoint" / "state.safetensors").read_bytes()
    result = evaluate(directory.path, tmp_path / "cache", "--ceiling", "--ceiling-epochs", "2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["schema"] == "fedpt-secure/evaluation/1"
    for name, arm in summary["arms"].items():
        assert found["arms"][name]["loss"] == pytest.approx(arm["loss"], abs=1e-6)
    assert found["arms"]["large_tuned"]["loss"] < found["arms"]["large_base"]["loss"]
    gap = found["arms"]["large_base"]["loss"] - found["arms"]["large_tuned"]["loss"]
    gained = found["arms"]["large_base"]["loss"] - found["arms"]["proxy_tuned"]["loss"]
    if found["gap_closed"] is not None:
        assert found["gap_closed"]["value"] == pytest.approx(gained / gap)
    assert found["ceiling"]["private"] is False
    assert found["ceiling"]["epochs"] == 2
    assert found["private"] is True
    assert found["privacy"]["epsilon"] == summary["privacy"]["epsilon"]
    assert found["responses"] is None
    assert "chose nothing" in found["statement"]
    assert "without privacy: no epsilon covers them" in found["statement"]
    assert found == json.loads((directory.path / "evaluation.json").read_text())
    assert (directory.path / "checkpoint" / "state.safetensors").read_bytes() == checkpoint
    assert "WITHOUT privacy" in result.stderr


def test_pairs_get_rouge_exact_match_and_the_final_number_of_every_arm(tiny_settings, pairs_file, tmp_path):
    pytest.importorskip("rouge_score")
    data = {"source": str(pairs_file), "client_column": "who", "prompt_column": "q", "response_column": "a"}
    models = {**tiny_settings["models"], "context_length": 40}
    directory, _ = finished({**tiny_settings, "data": data, "models": models}, tmp_path / "run", tmp_path / "cache")
    options = ("--responses", "3", "--max-new-tokens", "4")
    result = evaluate(directory.path, tmp_path / "cache", *options, "--ceiling", "--json")
    assert result.exit_code == 0, result.output
    responses = json.loads(result.stdout)["responses"]
    assert responses["records"] == 3
    assert set(responses["arms"]) == {"large_base", "small_tuned", "proxy_tuned", "large_tuned"}
    for scores in [*responses["arms"].values(), responses["improvement"]]:
        assert set(scores) == {"rouge_l", "exact_match", "number_match"}
        assert all(entry["ci"][0] <= entry["value"] <= entry["ci"][1] for entry in scores.values())
    people = evaluate(directory.path, tmp_path / "cache", *options)
    assert people.exit_code == 0, people.output
    assert "ROUGE-L" in people.stdout
    assert "chose nothing" in " ".join(people.stdout.split())


def test_a_run_that_is_not_finished_is_not_judged(tiny_settings, tmp_path):
    directory, _ = finished(tiny_settings, tmp_path / "run", tmp_path / "cache")
    (directory.path / "privacy.json").unlink()
    result = evaluate(directory.path, tmp_path / "cache")
    assert result.exit_code == 8
    assert "not finished" in result.stderr


def test_other_text_or_another_small_lm_than_the_runs_is_refused(tiny_settings, tiny_models, tmp_path):
    text = tmp_path / "chat.jsonl"
    shutil.copy(tiny_settings["data"]["source"], text)
    small = tmp_path / "small"
    shutil.copytree(tiny_models["small"], small)
    settings = {
        **tiny_settings,
        "data": {**tiny_settings["data"], "source": str(text)},
        "models": {**tiny_settings["models"], "small": str(small)},
    }
    directory, _ = finished(settings, tmp_path / "run", tmp_path / "cache")
    content = text.read_text()
    text.write_text(content.replace("hey", "hello"))
    result = evaluate(directory.path, tmp_path / "cache")
    assert result.exit_code == 8
    assert "another text" in result.stderr
    text.write_text(content)
    shutil.rmtree(small)
    shutil.copytree(tiny_models["large"], small)
    result = evaluate(directory.path, tmp_path / "cache")
    assert result.exit_code == 8
    assert "another small LM" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--records", "2"), "records"),
        (("--responses", "1"), "interval"),
        (("--ceiling-epochs", "2"), "--ceiling"),
        (("--max-new-tokens", "0"), "max_new_tokens"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(options, message, tmp_path):
    result = evaluate(tmp_path, tmp_path, *options)
    assert result.exit_code == 2
    assert message in result.stderr
