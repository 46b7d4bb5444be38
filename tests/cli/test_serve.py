"""`serve` as a process: what it prints, what it refuses, how it stops."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import openai
import pytest
from typer.testing import CliRunner

from fedpt_secure.cli import app

RUNNER = CliRunner()
COMMAND = "import sys; from fedpt_secure.cli import main; sys.argv[0] = 'fedpt-secure'; main()"


def invoke(*arguments):
    return RUNNER.invoke(app, [str(argument) for argument in arguments], env={"FEDPT_API_KEYS": ""})


@pytest.fixture(scope="module")
def run_directory(tiny_models, chat_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "my run"
    result = invoke(
        *("train", "--data", chat_file, "--client-column", "who", "--text-column", "said"),
        *("--small", tiny_models["small"], "--large", tiny_models["large"], "--device", "cpu"),
        *("--context-length", 12, "--rounds", 1, "--cohort", 5, "--lora-rank", 2, "--evaluation-records", 10),
        *("--epsilon", "inf", "--out", path),
    )
    assert result.exit_code == 0, result.output
    return path


def test_a_served_run_answers_says_what_it_gives_away_and_ends_in_order(run_directory, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-enough-characters\n")
    keys.chmod(0o600)
    arguments = ["serve", "--run", run_directory, "--port", 0, "--api-key-file", keys, "--max-logprobs", 50]
    errors = tmp_path / "stderr"
    with errors.open("w") as stream:
        process = subprocess.Popen([sys.executable, "-c", COMMAND, *map(str, arguments)], stderr=stream)
    try:
        end = time.monotonic() + 240
        while not (ready := re.search(r"serving (\S+) at (\S+) .*1 API key\)", errors.read_text())):
            assert process.poll() is None, errors.read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        assert ready[1] == "my-run"
        client = openai.OpenAI(base_url=f"{ready[2]}/v1", api_key="a-key-of-enough-characters", max_retries=0)
        with client:
            answer = client.completions.create(
                model="my-run", prompt="xyzzy hey", max_tokens=3, temperature=0, logprobs=40
            )
            assert len(answer.choices[0].logprobs.token_logprobs) <= 3
            chunks = iter(
                client.completions.create(
                    model="my-run", prompt="xyzzy hey", max_tokens=8, seed=1, stream=True, extra_body={"alpha": 0.1}
                )
            )
            first = next(chunks)
            process.send_signal(signal.SIGTERM)
            rest = list(chunks)
        assert rest[-1].choices[0].finish_reason in ("length", "stop")
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    shown = errors.read_text()
    assert "NOT PRIVATE" in shown  # the run is not
    assert re.search(r"warning: --max-logprobs 50: whoever may ask gets the tuned small\s+model's own", shown)
    assert "POST /v1/completions 200" in shown
    for unspoken in ("xyzzy", "a-key-of", first.choices[0].text.strip() or "Traceback", "Traceback"):
        assert unspoken not in shown


@pytest.mark.parametrize(
    ("bad", "exit_code", "said"),
    [
        (("--host", "0.0.0.0"), 2, "no API key"),  # noqa: S104
        (("--host", "192.0.2.1"), 2, "no API key"),
        (("--port", "70000"), 2, "port"),
        (("--max-logprobs", "-1"), 2, "max_logprobs"),
        (("--name", "../other"), 2, "name"),
        (("--requests-per-minute", "nan"), 2, "requests_per_minute"),
        (("--api-key-file", "no/such/file"), 2, "cannot read"),
        (("--tls-key", "key.pem"), 2, "tls_certificate"),
        (("--concurrent-requests", "0"), 2, "concurrent_requests"),
    ],
)
def test_a_bad_setting_is_one_line_and_nothing_is_loaded(tmp_path, bad, exit_code, said):
    result = invoke("serve", "--run", tmp_path, *bad)
    assert result.exit_code == exit_code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in result.output


def test_a_directory_that_is_no_run_is_one_line(tmp_path):
    result = invoke("serve", "--run", tmp_path)
    assert result.exit_code == 8
    assert "not a run directory" in result.stderr


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = invoke("serve", "--run", tmp_path)
    assert result.exit_code == 2
    assert "fedpt-secure[serve]" in result.stderr


def test_help_needs_no_heavy_import_and_names_the_consequence():
    environment = {name: value for name, value in os.environ.items() if name != "FEDPT_API_KEYS"}
    script = (
        "import sys; from fedpt_secure.cli import app; sys.exit('fastapi' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, env=environment).returncode == 0
    assert "--max-logprobs" in invoke("serve", "--help").stdout
