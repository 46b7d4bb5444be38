"""The soak on toy sizes, and that its checks can fail."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "federation_soak.py"


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("federation_soak", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["federation_soak"] = module
    spec.loader.exec_module(module)
    return module


def test_a_short_soak_with_kills_holds_every_check(soak, capsys):
    arguments = ["--rounds", "3", "--clients", "9", "--client-kill-rounds", "1", "--server-kill-rounds", "2"]
    assert soak.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rounds"], result["violations"]) == (3, [])
    assert result["counted_releases"] >= result["summed_updates"]
    assert result["kills"]["client"] + result["kills"]["server"] >= 1
    assert result["memory"]["server"]["most"] > 0


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([[0, 0, "a", "x"], [0, 0, "b", "y"], [1, 0, "a", "z"]], 0),
        ([[0, 0, "a", "x"], [0, 0, "a", "x"]], 0),
        ([[0, 0, "a", "x"], [1, 0, "a", "x"]], 1),
        ([[0, 0, "a", "x"], [0, 0, "a", "y"]], 1),
        ([[0, 0, "a", "x"], [0, 0, "b", "x"]], 1),
    ],
)
def test_a_masked_vector_that_comes_twice_is_found(lines, found, soak, tmp_path):
    path = tmp_path / "masked"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert len(soak._masked_twice(path)) == found


def test_the_network_is_cut_in_a_namespace_of_its_own_only(soak, monkeypatch):
    class Links:
        stdout = "1: lo: <LOOPBACK,UP>\n2: eth0: <BROADCAST,UP>\n"

    monkeypatch.setattr(soak.subprocess, "run", lambda *arguments, **rest: Links)
    with pytest.raises(SystemExit, match="namespace of its own"):
        soak._require_own_namespace()
