"""The mechanism checks keep quiet on what is built, and notice what is broken, in every mode at alpha 1e-3."""

from __future__ import annotations

import math

import pytest
from scipy.stats import binom

from fedpt_secure.attacks.mechanism import Observer, longest_gradient, noise_scale, two_worlds
from fedpt_secure.config import RunConfig, build, overlay
from fedpt_secure.data import Cache
from fedpt_secure.federation.setup import load_models
from fedpt_secure.privacy import SmallExample, client_vectors, dp_sgd
from fedpt_secure.privacy.clipped_sum import clipped_sum
from fedpt_secure.privacy.noise import _KeystreamRandom
from fedpt_secure.progress import SILENT

ALPHA = 1e-3
MODES = ("local", "distributed", "client")
CLIP_NORM = 0.001


@pytest.fixture(scope="module")
def small(audited_settings, tmp_path_factory):
    config = build(RunConfig, audited_settings)
    return load_models(config, cache=Cache(tmp_path_factory.mktemp("cache")), progress=SILENT).small


@pytest.fixture(scope="module")
def record(small):
    examples = [SmallExample((0, *range(first, first + 12)), 1) for first in (400, 900, 5000)]
    found, length = longest_gradient(small, examples)
    assert length > 10 * CLIP_NORM
    return found


def observer_of(audited_settings, small, mode, *, noise_multiplier=1.0, seed=None):
    """Noise from the seed, so that the answer is always the same; or secure."""
    changes = {
        "privacy": {"mode": mode, "clip_norm": CLIP_NORM},
        "federation": {"cohort": 6},
        "audit": {"canaries": 0},
        "seed": seed or 0,
        "insecure_deterministic": seed is not None,
    }
    config = build(RunConfig, overlay(audited_settings, changes)).for_population(6)
    return Observer.of(config, small, noise_multiplier=noise_multiplier)


def flagged(observer, record, *, trials=40, alpha=ALPHA):
    scale = noise_scale(observer, claimed=1.0, rounds=4, alpha=alpha)
    worlds = two_worlds(observer, record, claimed=1.0, trials=trials, alpha=alpha)
    return scale["violation"], worlds["violation"]


@pytest.mark.parametrize("mode", ["local", *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[1:])])
def test_what_is_built_is_not_flagged(audited_settings, small, record, mode):
    assert flagged(observer_of(audited_settings, small, mode, seed=5), record) == (False, False)


@pytest.mark.parametrize("mode", ["local", *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[1:])])
@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_no_noise_and_a_quarter_of_it_are_flagged_twice(audited_settings, small, record, mode, factor, monkeypatch):
    gaussian, discrete = _KeystreamRandom.gaussian, _KeystreamRandom.discrete_gaussian
    monkeypatch.setattr(
        _KeystreamRandom,
        "gaussian",
        lambda self, count, *, standard_deviation: (
            factor * gaussian(self, count, standard_deviation=standard_deviation)
        ),
    )
    monkeypatch.setattr(
        _KeystreamRandom,
        "discrete_gaussian",
        lambda self, count, *, sigma: (factor * discrete(self, count, sigma=sigma)).astype("int64"),
    )
    assert flagged(observer_of(audited_settings, small, mode, seed=6), record) == (True, True)


@pytest.mark.parametrize("mode", ["local", pytest.param("distributed", marks=pytest.mark.slow)])
def test_missing_clipping_is_flagged_by_the_two_worlds(audited_settings, small, record, mode, monkeypatch):
    unclipped = lambda model, examples, *, clip_norm, **more: clipped_sum(model, examples, clip_norm=math.inf)  # noqa: E731
    for module in (dp_sgd, client_vectors):
        monkeypatch.setattr(module, "clipped_sum", unclipped)
    assert flagged(observer_of(audited_settings, small, mode, seed=7), record) == (False, True)


def test_the_mechanism_of_a_bare_run_is_flagged(audited_settings, small, record):
    observer = observer_of(audited_settings, small, "local", noise_multiplier=0.0, seed=8)
    assert flagged(observer, record) == (True, True)


def test_the_adapter_is_left_as_it_was(audited_settings, small, record):
    before = small.adapter_vector() + 1
    small.load_adapter_vector(before)
    flagged(observer_of(audited_settings, small, "local", seed=9), record, trials=2)
    assert (small.adapter_vector() == before).all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_false_alarms_over_many_seeds_stay_within_alpha(audited_settings, small, record, mode, record_property):
    """At alpha 0.05, 300 audits: more alarms than allowed would come with a chance below 1e-3."""
    audits = 300
    counts = [0, 0]
    for seed in range(audits):
        found = flagged(observer_of(audited_settings, small, mode, seed=1000 + seed), record, trials=20, alpha=0.05)
        counts = [count + alarm for count, alarm in zip(counts, found, strict=True)]
    record_property("alarms", counts)
    assert all(count <= binom.isf(1e-3, audits, 0.05) for count in counts)
