"""The scale benchmark, at a size for tests: it runs what it says, and shows what it measured."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "scale.py"
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    command = ["--clients", "12", "--cohort", "4", "--rounds", "3", "--small", "tiny", "--words", "8", "--json"]
    folder = tmp_path_factory.mktemp("runs")
    found = subprocess.run(
        [sys.executable, str(SCRIPT), *command, "--directory", str(folder)], capture_output=True, text=True, check=True
    )
    assert not list(folder.iterdir())  # nothing of a run stays
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def scale():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("scale")
    sys.modules.pop("scale", None)


def test_every_number_of_clients_is_a_run_with_all_its_rounds(results):
    assert [entry["clients"] for entry in results["runs"]] == [12]
    for entry in results["runs"]:
        assert len(entry["rounds"]) == 3
        assert entry["survivors"] == [4, 4, 4]
        assert entry["asked"] == 12
        assert entry["disk"]["clients"] == entry["asked"]
        assert entry["disk"]["occupied_bytes"] >= entry["disk"]["bytes"] > 0


def test_peaks_are_of_their_round_and_above_what_stays(results):
    for entry in results["runs"]:
        for one in entry["rounds"]:
            assert one["peak_bytes"] >= one["resident_bytes"] > 50e6
            assert one["seconds"] > 0 < one["processor_seconds"]


def test_table_and_plot_show_every_run(results, scale, tmp_path, capsys):
    stored = tmp_path / "scale.json"
    stored.write_text(json.dumps(results))
    figure = tmp_path / "scale.svg"
    assert scale.main(["--from", str(stored), "--plot", str(figure)]) == 0
    table = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")] == [
        "| clients",
        "| ---:",
        "| 12",
    ]
    assert "12 clients: advertise" in table
    assert figure.read_text().count("<path") > 3
