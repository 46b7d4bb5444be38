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
from fedpt_secure.evaluation import evaluate_arms
from fedpt_secure.privacy.accounting import calibrate_noise
from fedpt_secure.progress import SILENT

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
def simulation(study):
    return importlib.import_module("utility_simulation")


@pytest.fixture(scope="module")
def command(study, simulation, tiny_run, chat_file, tmp_path_factory):
    """Run cases on tiny models and text; returns the exit code."""
    root = tmp_path_factory.mktemp("study")
    tiny = [word for word in tiny_run if not word.startswith(("federation", "evaluation"))]
    words = [word for word, after in zip(tiny, [*tiny[1:], ""], strict=True) if word != "--set" or after != "--set"]
    words = words[:-1] if words[-1] == "--set" else words

    def run(*arguments, what="run", results="results.jsonl", **replaced):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDPT_CACHE", str(root / "cache"))
            source = {"source": str(chat_file), "client_column": "who", "text_column": "said"}
            patch.setattr(study, "data_settings", lambda name, folder: source)
            for module in (study, simulation):
                patch.setattr(module, "EVALUATION_RECORDS", 2)
            patch.setattr(simulation, "CHOICE_RECORDS", 3)
            patch.setattr(simulation.Scale, "of", lambda epsilon, records: simulation.Scale(4, 3, 8))
            for name, value in replaced.items():
                patch.setattr(study, name, value)
            path = root / results
            return study.main([what, "--results", str(path), "--seeds", "0", *words, *arguments]), path

    return run


def tiny(case, **changed):
    return replace(case, lora={}, rounds=0.5, **changed)


def test_every_kind_of_case_runs_once_and_stands_in_the_table(command, study, capsys):
    reference = study.Case()
    cases = {
        study.REFERENCE: tiny(reference),
        "rank 1": study.Case({"rank": 1}, rounds=0.5),
        "quantile": tiny(reference, clip_norm=0.5, quantile=0.5),
        "noise-aware": tiny(reference, noise_aware=True),
        "average": tiny(reference, decay=0.8),
        "paced": tiny(reference, warm_up=2, cool_down=0.5),
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


def test_the_noise_of_a_step_is_the_calibrated_one(command, study, simulation):
    """Plain averaging from zero over gradients of zero: after one round the adapter is the noise itself."""
    seen = {}

    class Watching(simulation.Simulation):
        def train(self, case, epsilon, seed, progress):
            loaded = self.loaded(case.lora)
            loaded.train.sum = lambda chosen, **_: (np.zeros(loaded.models.small.dimension), np.zeros(len(chosen)))
            trained = super().train(case, epsilon, seed, progress)
            seen[case.mode, case.records] = trained.vector, sum(map(len, loaded.clients)), len(loaded.clients)
            return trained

    cases = {
        f"{mode} {records}": study.Case(
            {"rank": 16},
            mode=mode,
            optimizer="average",
            learning_rate=1.0,
            rounds=0.25,
            records=records,
            clip_norm=0.25,
        )
        for mode, records in itertools.product(("distributed", "local"), (0.5, 1.0))
    }
    code, _ = command("--epsilons", "8", results="noise.jsonl", CASES=cases, REFERENCE=None, Simulation=Watching)
    assert code == 0
    assert len(seen) == 4
    units = []
    for (mode, asked), (weights, records, clients) in seen.items():
        rate = 8 * asked * clients / (3 * records)  # 3 clients a round: more records are a higher rate, with more noise
        multiplier = calibrate_noise(epsilon=8, delta=simulation.DELTA, sampling_rate=rate, steps=1)
        shares = 3 if mode == "local" else 1 / simulation.HONEST
        expected = multiplier * 0.25 * math.sqrt(shares) / (8 * asked)
        # The standard deviation of n normals is off by more than 4 / sqrt(2 n) with probability 6e-5.
        assert np.std(weights) == pytest.approx(expected, rel=4 / math.sqrt(2 * weights.size))
        units.append(weights / expected)
    for other in units[1:]:  # after as many draws of the sample, the noise is the seed's: its sizes compare exactly
        assert np.allclose(other, units[0], rtol=1e-4)


def test_a_plan_asks_for_the_recipes_records_and_counts_a_clients_rounds(simulation):
    sizes = [40, 10, 20, 30] * 60
    recipe = simulation.plan(simulation.Case(), 4.0, sizes, seed=0)
    scale = simulation.Scale.of(4.0, sum(sizes))
    assert len(recipe.schedule) == scale.rounds
    assert recipe.units == pytest.approx(scale.records)
    assert recipe.sampling_rate == pytest.approx(scale.records * len(sizes) / (scale.clients * sum(sizes)))
    most = max(simulation.participations(recipe.schedule).values())
    assert most < scale.rounds
    assert recipe.noise_multiplier == calibrate_noise(
        epsilon=4.0, delta=simulation.DELTA, sampling_rate=recipe.sampling_rate, steps=most
    )
    own = simulation.plan(simulation.Case(scale=simulation.Scale(7, 6, 30)), 4.0, sizes, seed=0)
    assert (len(own.schedule), len(own.schedule[0])) == (7, 6)
    assert own.units == pytest.approx(30)
    by_client = simulation.plan(simulation.Case(mode="client"), 4.0, sizes, seed=0)
    assert by_client.sampling_rate == 1.0
    assert by_client.units == len(by_client.schedule[0]) == round(scale.records * len(sizes) / sum(sizes))
    assert simulation.plan(simulation.Case(), math.inf, sizes, seed=0).noise_multiplier == 0


def test_a_recipe_is_simulated_as_it_is_run(simulation, study):
    assert simulation.Case.of(simulation.Recipe()) == simulation.Case()
    cases = [case for name, case in study.CASES.items() if "departs" in name]
    assert len(cases) == len(study.DEPARTURES)
    deep = simulation.Case.of(study.DEPARTURES["chat", math.inf])
    assert deep in cases
    assert (deep.scale.rounds, deep.lora["layers"], deep.warm_up, deep.cool_down) == (480, 3, 10, 0.5)
    assert (deep.learning_rate, deep.positions) == (0.0015, 128)
    noised = study.DEPARTURES["chat", 8.0].settings()["training"]
    case = simulation.Case.of(study.DEPARTURES["chat", 8.0])
    assert (case.optimizer, case.classes) == (noised["server_optimizer"], noised["output_classes"])
    assert (case.decay, case.lora["output_bias"]) == (noised["average_decay"], 0.03)


def test_records_of_reported_figures_are_never_chosen_by(simulation):
    class Client:
        held_out = tuple(range(400))

    class Text:
        clients = (Client,)

    judged = simulation.seeded_sample(range(400), simulation.EVALUATION_RECORDS, purpose="evaluation sample", seed=3)
    parts = simulation.held_out_records(Text, 3)
    assert sorted(parts["judged"]) == sorted(judged)
    assert len(parts["choice"]) == simulation.CHOICE_RECORDS
    assert not set(parts["choice"]) & set(judged)
    Client.held_out = tuple(range(simulation.EVALUATION_RECORDS + 5))
    with pytest.raises(DataError, match="leave 5 beside"):
        simulation.held_out_records(Text, 3)


def test_losses_are_those_of_the_products_own_evaluation(command, study, simulation):
    """An adapter of the simulation, judged by the product."""
    compared = []

    class Watching(simulation.Simulation):
        def judge(self, case, trained, which, rules):
            losses = super().judge(case, trained, which, rules)
            loaded = self.loaded(case.lora)
            loaded.models.small.load_adapter_vector(trained.vector)
            records = self._records[which]
            examples = simulation.large_examples(records, loaded.models, loaded.config)
            compared.append(
                (losses, evaluate_arms(examples, loaded.models.black_box(SILENT), loaded.models.pair, rules))
            )
            return losses

    code, _ = command(
        "--epsilons", "8", results="judge.jsonl", CASES={study.REFERENCE: tiny(study.Case())}, Simulation=Watching
    )
    assert code == 0
    ((losses, evaluation),) = compared
    assert losses.tokens.tolist() == evaluation.tokens.tolist()
    assert losses.large == pytest.approx(evaluation.large_base, rel=1e-5)
    assert losses.small_tuned == pytest.approx(evaluation.small_tuned, rel=1e-5)
    assert losses.proxied.keys() == evaluation.proxy_tuned.keys()
    for rule, proxied in losses.proxied.items():
        assert proxied == pytest.approx(evaluation.proxy_tuned[rule], rel=1e-5)


def test_a_curve_states_the_gap_against_the_ceiling_of_its_records(command, study, simulation, capsys):
    assert command("--epsilons", "8", what="curve", results="no.jsonl")[0] == DataError.exit_code
    assert "no ceiling" in capsys.readouterr().err
    given = {}

    def found(path, records, weights):
        tokens = [len(example.ids) - example.loss_from for example in records.evaluation]
        given["losses"] = [0.5 * count for count in tokens]
        return {"tokens": tokens, "losses": given["losses"]}

    code, path = command("--epsilons", "8,inf", what="curve", results="curve.jsonl", find=found)
    assert code == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["epsilon"] for line in lines] == [8.0, "inf"]
    for line in lines:
        assert line["large_tuned_directly"] == 0.5
        fraction = (line["large"] - line["proxied"]) / (line["large"] - 0.5)
        assert line["gap_closed"] == pytest.approx(fraction, abs=2e-4)
    before = path.read_text()
    assert command("--epsilons", "8,inf", what="curve", results="curve.jsonl", find=found)[0] == 0
    assert path.read_text() == before


def test_a_curve_of_departures_trains_what_the_data_depart_to_and_is_told_from_the_common_one(
    command, study, simulation, monkeypatch
):
    trained = []

    class Watching(simulation.Simulation):
        def train(self, case, epsilon, seed, progress):
            trained.append(case)
            return simulation.Trained(np.zeros(self.loaded({}).models.small.dimension, dtype=np.float32), 1, 1.0)

    def found(path, records, weights):
        tokens = [len(example.ids) - example.loss_from for example in records.evaluation]
        return {"tokens": tokens, "losses": [0.5 * count for count in tokens]}

    departure = study.Recipe({"training": {"server_learning_rate": 0.125}})
    monkeypatch.setattr(study.Recipe, "of", lambda data, epsilon: departure if epsilon == 8 else study.Recipe())
    for more in ([], ["--departures"], ["--departures"]):
        code, path = command(
            "--epsilons", "8", *more, what="curve", results="both.jsonl", find=found, Simulation=Watching
        )
        assert code == 0
    assert [case.learning_rate for case in trained] == [0.02, 0.125]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("recipe") for line in lines] == [None, "departure"]


def test_tuning_all_weights_is_judged_against_the_same_ceiling(command, study, simulation, tmp_path):
    limits = importlib.import_module("utility_limits")

    def found(path, records, weights):
        tokens = [len(example.ids) - example.loss_from for example in records.evaluation]
        return {"tokens": tokens, "losses": [0.5 * count for count in tokens]}

    def run(options, progress):
        limits.limits(
            limits.parse(["--results", str(tmp_path / "l"), "--rates", "0,.003", "--passes", "2", *sets(options)]),
            progress,
        )

    def sets(options):
        return [word for line in options.set for word in ("--set", line)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "data_settings", lambda name, folder: study.data_settings(name, folder))
        assert command(what="curve", results="unused", curve=run, find=found)[0] == 0
    still, moved = [json.loads(line) for line in (tmp_path / "l").read_text().splitlines()]
    # A rate of 0 leaves the base: no shift, and only the shares move the large model; the same at every alpha.
    assert still["judged_gain_1"] == still["judged_gain_0.25"]
    assert moved["judged_small_tuned"] < still["judged_small_tuned"]
    assert moved["gap_closed_0.5"] != still["gap_closed_0.5"]


def test_a_case_that_is_not_there_and_a_bad_setting_are_named(command, study, capsys):
    with pytest.raises(SystemExit):
        study.parse(["run", "--results", "x", "--cases", "rank 7"])
    assert "no case begins with 'rank 7'" in capsys.readouterr().err
    assert study.parse(["run", "--results", "x", "--cases", "rank 32,mome"]).cases[-1] == "momentum, rate 100"
    assert command("--set", "lora.rank")[0] == ConfigError.exit_code


def test_the_table_in_the_documents_is_that_of_the_lines_beside_it(study, capsys):
    docs = BENCHMARKS.parent / "docs"
    assert study.main(["table", "--results", str(docs / "figures" / "utility_study.jsonl")]) == 0
    table = capsys.readouterr().out
    assert table.count("\n") > 20
    assert table in (docs / "results.md").read_text(encoding="utf-8")
