"""What the README shows works as shown."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from typer.main import get_command

from fedpt_secure.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    if not language
    for line in block.splitlines()
    if line.startswith("fedpt-secure ")
]


def test_the_python_code_runs(tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "costs epsilon 3.99" in done.stdout or "costs epsilon 4.0" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_line_parses(command):
    """Names of options and commands are real; nothing is run."""
    name, *arguments = shlex.split(command)[1:]
    parser = get_command(app).commands[name]
    with parser.make_context(name, list(arguments), resilient_parsing=False):
        pass


def test_a_command_line_with_a_wrong_option_would_be_noticed():
    result = CliRunner().invoke(get_command(app), ["train", "--no-such-option"])
    assert result.exit_code != 0


def test_the_two_commands_stand_on_top():
    block = README.split("<!-- commands -->")[1].split("<!-- end commands -->")[0]
    assert block.strip().strip("`").split("\n")[1:3] == [
        "pip install . && fedpt-secure train --epsilon 4",
        'pip install ".[test]" && pytest',
    ]


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!http)[^)#]+)\)", README))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()
