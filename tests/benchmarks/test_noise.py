"""The noise benchmark in miniature: what it prints, and that it counts the words that the sampler takes."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def noise():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("noise")
    for name in ("noise", "secagg_timing"):
        sys.modules.pop(name, None)


def test_it_states_every_arm_and_the_share_of_the_keystream(noise, capsys):
    assert noise.main(["--entries", "300", "--repeats", "1", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["sigma"] for result in results] == list(noise.SIGMAS)
    for result in results:
        assert {"exact", "its keystream", "rounded normals"} <= set(result)
        assert result["of the keystream's speed"] == pytest.approx(result["its keystream"] / result["exact"])
    assert noise.main(["--entries", "300", "--repeats", "1"]) == 0
    table = capsys.readouterr().out
    assert "300 entries" in table
    assert all(f"{sigma:,}" in table for sigma in noise.SIGMAS)


def test_words_are_those_that_the_sampler_asks_for(noise, monkeypatch):
    asked = []

    def sampler(entries, *, sigma, words):
        asked.extend((words(3), words(4)))
        return np.zeros(entries, dtype=np.int64)

    monkeypatch.setattr(noise, "discrete_gaussian", sampler)
    assert noise.words_drawn(1000, 10) == 7
    assert [part.dtype for part in asked] == [np.dtype("<u8")] * 2
    assert not np.array_equal(asked[0], asked[1][:3])
