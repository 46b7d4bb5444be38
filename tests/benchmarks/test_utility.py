"""The utility benchmark in miniature: its JSON, what it refuses to compare, and the fraction of the gap."""

import contextlib
import importlib
import io
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpt_secure.config import RunConfig, build, overlay
from fedpt_secure.errors import ConfigError, DataError
from fedpt_secure.federation.mechanisms import build_mechanism
from fedpt_secure.lm.base import builtin_directory
from fedpt_secure.lm.directions import FILE, Directions
from fedpt_secure.privacy import SecureRandom

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = [path.stem for path in BENCHMARKS.glob("utility*.py")]


@pytest.fixture(scope="module")
def benchmark():
    """Its modules by name, imported as its script does, and forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def command(benchmark, tiny_run, chat_file, tmp_path_factory):
    """Run the command on tiny models and text; returns exit code and standard output."""
    root = tmp_path_factory.mktemp("utility")

    def run(*arguments):
        output = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
            patch.setenv("FEDPT_CACHE", str(root / "cache"))
            source = {"source": str(chat_file), "client_column": "who", "text_column": "said"}
            patch.setattr(benchmark["utility"], "data_settings", lambda name, folder: source)
            words = ["--data", "chat", "--ceilings", str(root / "ceilings.json"), *tiny_run, *arguments]
            return benchmark["utility"].main(words), output.getvalue()

    return run, root / "ceilings.json"


def test_it_prints_the_promised_object_and_keeps_the_ceiling(command):
    run, ceilings = command
    code, text = run("--epsilon", "8", "--json")
    assert code == 0
    result = json.loads(text)
    assert set(result["arms"]) == {"large_base", "small_base", "small_tuned", "proxy_tuned", "large_tuned_directly"}
    assert result["minutes"] > 0
    low, high = result["ci"]
    assert low <= result["gap_closed"] <= high
    assert result["private"]
    assert "epsilon <= 7.9" in result["privacy"]
    assert result["settings"]["training"]["server_optimizer"] == "momentum"  # the recipe's
    assert result["settings"]["lora"]["rank"] == 2  # the command line's
    gap = result["arms"]["large_base"] - result["arms"]["large_tuned_directly"]
    gain = result["arms"]["large_base"] - result["arms"]["proxy_tuned"]
    rounding = 1e-4 * (1 + abs(result["gap_closed"])) / gap  # of four digits in each of the three arms
    assert result["gap_closed"] == pytest.approx(gain / gap, abs=rounding + 1e-4)

    entry = json.loads(ceilings.read_text())[0]
    entry["losses"] = [value - 1.0 for value in entry["losses"]]  # found, not computed again
    ceilings.write_text(json.dumps([entry]))
    _, again = run("--epsilon", "inf", "--json", "--minutes", "15")
    assert json.loads(again)["arms"]["large_tuned_directly"] < result["arms"]["large_tuned_directly"] - 0.05
    assert not json.loads(again)["private"]


def test_a_ceiling_of_other_records_is_not_compared_with(command):
    run, ceilings = command
    run("--epsilon", "inf", "--json")
    entry = json.loads(ceilings.read_text())[0]
    ceilings.write_text(json.dumps([entry | {"tokens": entry["tokens"][::-1]}]))
    code, text = run("--epsilon", "inf", "--json")
    assert code == DataError.exit_code
    assert text == ""
    code, _ = run("--epsilon", "inf", "--json", "--recompute-ceiling")
    assert code == 0


def test_the_fraction_is_of_sums_and_paired(benchmark):
    gap_closed = benchmark["utility"].gap_closed
    rng = np.random.default_rng(0)
    base = rng.uniform(50, 400, 300)
    tuned = base * 0.9
    fraction, (low, high) = gap_closed(base, base - 0.4 * (base - tuned), tuned, 0)
    assert fraction == pytest.approx(0.4)
    assert (low, high) == pytest.approx((0.4, 0.4))  # by records alike, whatever their lengths: the pairing
    noisy = base - 0.4 * (base - tuned) + rng.normal(0, 10, 300)
    fraction, (low, high) = gap_closed(base, noisy, tuned, 0)
    assert low < 0.4 < high
    assert 0.02 < high - low < 0.4


def test_the_interval_covers_as_often_as_it_says(benchmark):
    """95 % nominal over 200 seeded data sets of 100 records; outside [0.89, 0.99] with probability about 1e-3."""
    gap_closed = benchmark["utility"].gap_closed
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        gap = rng.gamma(2.0, 10.0, 100)
        gain = 0.3 * gap + rng.normal(0, 6, 100)
        _, (low, high) = gap_closed(gap + 100, gap + 100 - gain, np.full(100, 100.0), 0, resamples=300)
        covered += low <= 0.3 <= high
    assert 178 <= covered <= 198


def test_where_there_is_no_gap_no_fraction_is_stated(benchmark):
    losses = np.linspace(10, 20, 30)
    with pytest.raises(DataError, match="no gap"):
        benchmark["utility"].gap_closed(losses, losses - 1, losses + 0.1, 0)
    mixed = np.where(np.arange(30) == 0, losses - 20, losses + 0.1)
    with pytest.raises(DataError, match="too few records"):
        benchmark["utility"].gap_closed(losses, losses - 1, mixed, 0)


def records_of(benchmark, count, clients=20):
    return benchmark["utility_data"].Records(train=(None,) * count, evaluation=(), clients=clients, digest="")


def test_minutes_scale_the_rounds_and_a_bad_setting_is_named(benchmark):
    utility, recipes = benchmark["utility"], benchmark["utility_recipe"]
    options = utility.parse(["--data", "chat", "--minutes", "15", "--set", "privacy.clip_norm=0.3"])
    records = records_of(benchmark, 100)
    config = recipes.Recipe.of("dolly", 4.0).for_records(utility.configuration(options), records, options.minutes)
    assert config.federation.rounds == recipes.SCALES[-1][1].rounds / 2
    assert config.privacy.clip_norm == 0.3
    assert config.privacy.mode == "distributed"
    options.set = ["privacy.clip_norm"]
    with pytest.raises(ConfigError, match="not TOML"):
        utility.configuration(options)
    options.set = ["privacy.clip=1"]
    with pytest.raises(ConfigError, match=r"privacy\.clip"):
        utility.configuration(options)


def test_the_less_noise_the_more_and_smaller_rounds(benchmark):
    scales = [scale for _, scale in benchmark["utility_recipe"].SCALES]
    for more, less in itertools.pairwise(scales):
        assert more.rounds > less.rounds
        assert more.clients < less.clients
        assert more.records < less.records
    of = benchmark["utility_recipe"].Scale.of
    assert [of(math.inf, 100), of(8.0, 6184), of(4.0, 11933), of(4.0, 6184)] == [*scales[:2], *scales[1:]]


def test_the_built_in_model_ships_the_directions_that_the_recipe_trains(benchmark):
    directions = Directions.load(builtin_directory() / FILE)
    recipes = benchmark["utility_recipe"]
    for recipe in (recipes.Recipe(), *recipes.DEPARTURES.values()):
        lora = build(RunConfig, recipe.settings()).lora
        for layer in range(6 - lora.layers, 6):
            for module in lora.modules:
                block = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
                a = directions.lora_a(f"model.layers.{layer}.{block}.{module}", lora.rank)
                assert a.shape[0] == lora.rank
                rows = a / a.norm(dim=1, keepdim=True)
                # orthogonal, but for float16
                assert float((rows @ rows.T - torch.eye(lora.rank)).abs().max()) < 1e-3


def test_a_departure_holds_for_its_data_set_and_noise_alone(benchmark):
    recipes = benchmark["utility_recipe"]
    of, scale = recipes.Recipe.of, recipes.Scale
    assert of("dolly", 4.0) == of("dolly", math.inf) == of("chat", 3.99) == recipes.Recipe()
    for data in ("chat", "medquad"):
        leasts = [least for name, least in recipes.DEPARTURES if name == data]
        assert leasts == sorted(leasts, reverse=True), "the first that fits must be the one with the largest epsilon"
        for least in leasts:
            assert of(data, least) is recipes.DEPARTURES[data, least]
    assert of("medquad", 7.99) is of("medquad", 0.5) is recipes.DEPARTURES["medquad", 0.0]
    assert of("chat", 1e6) is recipes.DEPARTURES["chat", 8.0]
    assert of("chat", 7.99) is recipes.DEPARTURES["chat", 4.0]
    deep = of("chat", math.inf)
    config = build(RunConfig, overlay(deep.settings(), {"privacy": {"epsilon": math.inf}}))
    suited = deep.for_records(config, records_of(benchmark, 6184, clients=214))
    assert (suited.federation.rounds, suited.federation.cohort) == (deep.scale.rounds, deep.scale.clients)
    assert suited.privacy.sampling_rate * 6184 * suited.federation.cohort / 214 == pytest.approx(32, rel=1e-2)
    assert suited.federation.rounds > scale.of(math.inf, 6184).rounds
    assert suited.lora.layers == 3


@pytest.mark.parametrize(("data", "epsilon"), [("chat", 8.0), ("chat", 4.0), ("medquad", 8.0), ("dolly", 4.0)])
def test_a_run_divides_a_rounds_sum_by_what_the_simulation_divides_by(benchmark, data, epsilon):
    """Rates are chosen in simulation; a rate of momentum means nothing where the mean is another."""
    recipe = benchmark["utility_recipe"].Recipe.of(data, epsilon)
    sizes = [28, 29, 30] * 70
    said = overlay(recipe.settings(), {"privacy": {"epsilon": epsilon}})
    config = recipe.for_records(build(RunConfig, said), records_of(benchmark, sum(sizes), clients=len(sizes)))
    planned = benchmark["utility_simulation"].plan(
        benchmark["utility_simulation"].Case.of(recipe), epsilon, sizes, seed=0
    )
    mechanism = build_mechanism(config, noise_multiplier=0.0, dimension=3)
    vector = np.array([0.5, -1.0, 0.25])
    ring = mechanism.ring.encode(vector, SecureRandom())
    mean = mechanism.decode(ring, survivors=config.federation.cohort, clip_norm=0.1).mean_update
    np.testing.assert_allclose(mean, -0.1 * vector / planned.units, rtol=5e-3)


def test_what_the_command_line_says_is_not_overridden_by_the_scale(benchmark):
    utility, of = benchmark["utility"], benchmark["utility_recipe"].Recipe.of
    said = ["federation.rounds=3", "federation.cohort=5", "privacy.sampling_rate=0.5", 'lora.modules=["q_proj"]']
    options = utility.parse(["--data", "chat", *(word for line in said for word in ("--set", line))])
    config = of("dolly", 4.0).for_records(utility.configuration(options), records_of(benchmark, 100))
    assert (config.federation.rounds, config.federation.cohort, config.federation.minimum_survivors) == (3, 5, 5)
    assert (config.privacy.sampling_rate, config.lora.modules) == (0.5, ("q_proj",))
    free = of("dolly", 4.0).for_records(
        utility.configuration(utility.parse(["--data", "chat"])), records_of(benchmark, 10_000)
    )
    assert (free.federation.cohort, free.federation.minimum_survivors) == (20, 18)
    assert free.privacy.sampling_rate == pytest.approx(900 / 10_000)


def test_missing_data_says_where_it_was_looked_for(benchmark, tmp_path):
    with pytest.raises(DataError, match=r"medquad\.jsonl is missing"):
        benchmark["utility_data"].data_settings("medquad", tmp_path)
