"""Whole runs with tiers and with blocks of layers: the promise is the same, and only the public part moves."""

from __future__ import annotations

import numpy as np

from fedpt_secure.config import RunConfig, build
from fedpt_secure.data import Cache
from fedpt_secure.federation import RunDirectory, run_training
from fedpt_secure.progress import SILENT

TIERS = [{"name": "laptop", "share": 0.5}, {"name": "phone", "share": 0.5, "rank": 1}]


def run(settings, path, cache, **groups):
    values = {**settings, **{key: {**settings.get(key, {}), **value} for key, value in groups.items()}}
    config = build(RunConfig, values)
    directory = RunDirectory.create(path, config)
    return directory, run_training(config, directory, cache=Cache(cache), progress=SILENT)


def test_tiers_and_blocks_change_neither_the_claim_nor_the_length_of_a_message(tiny_settings, tmp_path):
    cache = tmp_path / "cache"
    lora = {"lora": {"layers": 0, "rank": 2}}
    _, plain = run(tiny_settings, tmp_path / "plain", cache, **lora)
    directory, mixed = run(
        tiny_settings,
        tmp_path / "mixed",
        cache,
        **lora,
        training={"layers_per_round": 1},
        federation={"tiers": TIERS, "rounds": 1},
    )
    assert mixed.dimension == plain.dimension
    sizes = [set(line["bytes_up"].values()) for line in (plain.transcripts[0], mixed.transcripts[0])]
    assert max(sizes[1]) - min(sizes[0]) < 64
    assert 0 < mixed.statement.epsilon <= 4.0
    # One round of the top block: the other layer's entries are still where they began, at zero.
    adapter = directory.load_checkpoint().tensors["adapter"]
    assert np.count_nonzero(adapter) == plain.dimension // 2
    again = RunDirectory.open(directory.path)
    resumed = run_training(again.config(), again, cache=Cache(cache), progress=SILENT)
    assert resumed.statement.epsilon == mixed.statement.epsilon
