"""Settings in simulation: every case runs, is run once, and the noise is what the accountant and the mode ask for."""

import importlib
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedpt_secure.errors import ConfigError, DataError
from fedpt_secure.privacy.accounting import calibrate_noise
from fedpt_secure.privacy.clipped_sum import ClippedSum

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = [path.stem for path in BENCHMARKS.glob("utility*.py")]


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("utility_study")
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def command(study, tiny_run, chat_file, tmp_path_factory):
    """Run cases on tiny models and text; returns the exit code."""
    root = tmp_path_factory.mktemp("study")
    tiny = [word for word in tiny_run if not word.startswith(("federation", "evaluation"))]
    words = [word for word, after in zip(tiny, [*tiny[1:], ""], strict=True) if word != "--set" or after != "--set"]
    words = words[:-1] if words[-1] == "--set" else words

    def run(*arguments, results="results.jsonl", **replaced):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDPT_CACHE", str(root / "cache"))
            source = {"source": str(chat_file), "client_column": "who", "text_column": "said"}
            patch.setattr(study, "data_settings", lambda name, folder: source)
            patch.setattr(study, "EVALUATION_RECORDS", 2)
            patch.setattr(study, "CHOICE_RECORDS", 3)
            for name, value in replaced.items():
                patch.setattr(study, name, value)
            path = root / results
            return study.main(["run", "--results", str(path), "--seeds", "0", *words, *arguments]), path

    return run


def tiny(case, **changed):
    return replace(case, lora={}, rounds=2, records=8, **changed)


def test_every_kind_of_case_runs_once_and_stands_in_the_table(command, study, capsys):
    reference = study.Case()
    cases = {
        study.REFERENCE: tiny(reference),
        "rank 1": study.Case({"rank": 1}, rounds=2, records=8),
        "quantile": tiny(reference, clip_norm=0.5, quantile=0.5),
        "noise-aware": tiny(reference, noise_aware=True),
        "average": tiny(reference, decay=0.8),
        "client": tiny(reference, mode="client"),
        "local": tiny(reference, mode="local"),
        "plain": tiny(reference, optimizer="average", positions=None),
    }
    code, path = command("--epsilons", "8,inf", CASES=cases)
    assert code == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["case"] for line in lines} == {*cases, *study.RULES}
    assert len(lines) == 2 * len({*cases, *study.RULES})
    assert all(math.isfinite(line["gain"]) for line in lines)
    gain = {(line["case"], line["epsilon"]): line["gain"] for line in lines}
    assert gain["local", "inf"] == gain[study.REFERENCE, "inf"]  # without noise the modes differ in nothing
    assert gain["noise-aware", "inf"] == gain[study.REFERENCE, "inf"]

    before = path.read_text()
    assert command("--epsilons", "8,inf", CASES=cases)[0] == 0
    assert path.read_text() == before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "CASES", cases)
        assert study.main(["table", "--results", str(path)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + len(cases) + len(study.RULES)


def test_the_noise_of_a_step_is_the_calibrated_one(command, study):
    """Plain averaging from zero over gradients of zero: after one round the adapter is the noise itself."""
    seen = {}

    class Watching(study.Bench):
        def _train(self, case, epsilon, models, clients, progress):
            weights = super()._train(case, epsilon, models, clients, progress)
            seen[case.mode, case.records] = weights, sum(map(len, clients)), len(clients)
            return weights

    def nothing(small, examples, **_):
        return ClippedSum(np.zeros(small.dimension), np.zeros(len(examples)))

    cases = {
        f"{mode} {records}": study.Case(
            {"rank": 16}, mode=mode, optimizer="average", rounds=1, records=records, clip_norm=0.25
        )
        for mode, records in itertools.product(("distributed", "local"), (study.RECORDS, 2 * study.RECORDS))
    }
    cases = {name: replace(case, learning_rate=1.0) for name, case in cases.items()}
    code, _ = command("--epsilons", "8", results="noise.jsonl", CASES=cases, Bench=Watching, clipped_sum=nothing)
    assert code == 0
    assert len(seen) == 4
    units = []
    for (mode, asked), (weights, records, clients) in seen.items():
        rate = study.SAMPLED * asked / study.RECORDS  # twice the records are twice the rate, and cost more noise
        rounds = study.SAMPLED_ROUNDS // study.ROUNDS
        multiplier = calibrate_noise(epsilon=8, delta=study.DELTA, sampling_rate=rate, steps=rounds)
        shares = clients if mode == "local" else 1 / study.HONEST
        expected = multiplier * 0.25 * math.sqrt(shares) / (rate * records)
        # The standard deviation of n normals is off by more than 4 / sqrt(2 n) with probability 6e-5.
        assert np.std(weights) == pytest.approx(expected, rel=4 / math.sqrt(2 * weights.size))
        units.append(weights / expected)
    for other in units[1:]:  # the draws are the seed's, the same in all cases: their sizes compare exactly
        assert np.allclose(other, units[0], rtol=1e-4)


def test_records_of_reported_figures_are_never_judged(study):
    class Client:
        held_out = tuple(range(300))

    class Text:
        clients = (Client,)

    judged = study.seeded_sample(range(300), study.EVALUATION_RECORDS, purpose="evaluation sample", seed=3)
    chosen = study._choice(Text, 3)
    assert len(chosen) == study.CHOICE_RECORDS
    assert not set(chosen) & set(judged)
    Client.held_out = tuple(range(study.EVALUATION_RECORDS + 5))
    with pytest.raises(DataError, match="leave 5 beside"):
        study._choice(Text, 3)


def test_a_case_that_is_not_there_and_a_bad_setting_are_named(command, study, capsys):
    with pytest.raises(SystemExit):
        study.parse(["run", "--results", "x", "--cases", "rank 7"])
    assert "no case begins with 'rank 7'" in capsys.readouterr().err
    assert study.parse(["run", "--results", "x", "--cases", "rank 32,mome"]).cases[-1] == "momentum"
    assert command("--set", "lora.rank")[0] == ConfigError.exit_code
