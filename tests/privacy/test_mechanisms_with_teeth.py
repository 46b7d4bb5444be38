"""What the three mechanisms release is as noisy as they claim, and tests that say so notice mechanisms that lie.

Clients run the code of a real round (`RoundMechanism.release` and `decode`) on records whose gradient is known: a
record *is* its gradient. An observation is everything the claim is about: in mode `local` one client's release, bare;
in the others the ring's sum over as few honest survivors as the calibration counts on. Units are clip norms.

Three tests, each a function that says whether a mechanism keeps its claim of mu = 1 / noise multiplier (a Gaussian
mechanism is mu-Gaussian-DP; Dong, Roth and Su 2022):

- `noise_scale`: on zero data, the sum of squares lies in its chi-square interval;
- `two_worlds`: a record in the worst direction, there or not. A threshold fixed beforehand errs at some rates; their
  Clopper-Pearson bounds give a lower bound of mu, which must not pass the claim;
- `neighbours`: the same with many records in many dimensions, and the length of what is released as a second threshold.

Everything is drawn from keyed streams, so that the answer is always the same; for keys drawn at random each positive
test would be a false alarm with a chance below `FALSE_ALARM`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta, chi2, norm

from fedpt_secure.config import RunConfig, build
from fedpt_secure.errors import AlreadyReleased
from fedpt_secure.federation.mechanisms import LocalMechanism, build_mechanism, honest_survivors
from fedpt_secure.federation.terms import client_randomness
from fedpt_secure.privacy import Budget, InsecureDeterministicRandom, Ledger, client_vectors, dp_sgd
from fedpt_secure.privacy.clipped_sum import ClippedSum, _GridSum

FALSE_ALARM = 1e-6
MODES = ("local", "distributed", "client")
NOISE = 1.0
CLIP_NORM = 0.5


class Bare:
    """In place of a small LM: an adapter and nothing else."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self._adapter = np.zeros(dimension, dtype=np.float32)

    def adapter_vector(self):
        return self._adapter.copy()

    def load_adapter_vector(self, vector):
        self._adapter = vector.astype(np.float32)


def _sum_of_records(small, examples, *, clip_norm, positions=None, classes=None, part=None):
    total = _GridSum(small.dimension, clip_norm)
    norms = [total.add(torch.from_numpy(record)[None])[0] for record in examples]
    return ClippedSum(total.value(), np.array(norms))


@pytest.fixture(autouse=True)
def _records_are_gradients(monkeypatch):
    for module in (dp_sgd, client_vectors):
        monkeypatch.setattr(module, "clipped_sum", _sum_of_records)


def config_of(mode, *, cohort=5, **training):
    """Four of five must survive and one of them may collude: three honest shares."""
    return build(
        RunConfig,
        {
            "privacy": {"mode": mode, "clip_norm": CLIP_NORM, "corrupt_fraction": 0.2},
            "federation": {"cohort": cohort, "ring_bits": 32},
            "training": {"normaliser": 4.0, "local_learning_rate": 1.0, **training},
        },
    )


@dataclass
class Observer:
    """A mechanism, and what is seen of it.

    Attributes:
        streams: (client, round) -> its noise source.
    """

    mode: str
    dimension: int
    multiplier: float = NOISE
    streams: Any = None
    normaliser: float = 4.0

    def __post_init__(self) -> None:
        self.config = config_of(self.mode, normaliser=self.normaliser)
        self.mechanism = build_mechanism(self.config, noise_multiplier=self.multiplier, dimension=self.dimension)
        self.small = Bare(self.dimension)
        if self.streams is None:
            self.streams = lambda client, trial: InsecureDeterministicRandom(2, self.mode, client, trial)
        self.units = 4.0  # of the public constant, whatever `normaliser` became

    @property
    def clients(self) -> int:
        return 1 if self.mode == "local" else honest_survivors(self.config)

    def sums(self, clients, trial) -> np.ndarray:
        """One observation, in clip norms: each client's records -> the noised sum of its clipped gradients."""
        released = [
            self.mechanism.release(self.small, records, clip_norm=CLIP_NORM, noise=self.streams(index, trial))
            for index, records in enumerate(clients)
        ]
        if self.mode == "local":
            return released[0] * -self.units / CLIP_NORM
        total = released[0].copy()
        for vector in released[1:]:
            total += vector
        survivors = len(clients)
        mean = self.mechanism.decode(total, survivors=survivors, clip_norm=CLIP_NORM).mean_update
        if self.mode == "client":
            return mean * survivors / CLIP_NORM
        return mean * -self.units * survivors / CLIP_NORM


def unsized(clients: int) -> list[list[np.ndarray]]:
    return [[] for _ in range(clients)]


# The three tests.


def in_chi_square_interval(noise, deviation):
    statistic = ((noise / deviation) ** 2).sum()
    return chi2.ppf(FALSE_ALARM / 2, noise.size) < statistic < chi2.ppf(1 - FALSE_ALARM / 2, noise.size)


def noise_scale(observer, *, survivors=None, claimed=NOISE, rounds=16):
    noise = [observer.sums(unsized(survivors or observer.clients), trial) for trial in range(rounds)]
    return in_chi_square_interval(np.concatenate(noise), claimed)


def mu_lower_bound(without, present, threshold):
    """From error rates at a fixed threshold; wrong with a chance of at most `FALSE_ALARM` / 2."""

    def most(errors, count):
        return 1.0 if errors == count else float(beta.ppf(1 - FALSE_ALARM / 4, errors + 1, count - errors))

    false_positives = most(int((without > threshold).sum()), len(without))
    false_negatives = most(int((present <= threshold).sum()), len(present))
    return norm.ppf(1 - false_positives) - norm.ppf(false_negatives)


def two_worlds(observer, *, claimed=1 / NOISE, trials=700, length=50.0):
    """The record's gradient is `length` clip norms long, and on the threshold's side by half a clip norm."""
    record = np.full(observer.dimension, -length * CLIP_NORM / math.sqrt(observer.dimension))
    if observer.mode != "client":
        record = -record
    direction = np.full(observer.dimension, 1 / math.sqrt(observer.dimension))
    others = unsized(observer.clients - 1)
    without = np.array([observer.sums([[], *others], trial) @ direction for trial in range(trials)])
    present = np.array([observer.sums([[record], *others], trials + trial) @ direction for trial in range(trials)])
    return mu_lower_bound(without, present, 0.5) <= claimed


DIMENSION, RECORDS = 512, 10


def neighbours(without, present, *, claimed, trials=250):
    """Ten records in one world, eleven in the other; no direction in common but that of the eleventh.

    The adversary knows everything but whether the eleventh is there. It looks along its gradient, and at the length of
    the release less the ten others.
    """
    sign = -1.0 if without.mode == "client" else 1.0
    clients = without.clients
    if without.mode == "client":
        # The unit is a client: one with one record, beside others that have none.
        first, second = [[]], [[sign * 3 * CLIP_NORM * np.eye(DIMENSION)[RECORDS]]]
    else:
        known = [3 * CLIP_NORM * np.eye(DIMENSION)[index] for index in range(RECORDS)]
        first, second = [known], [[*known, 3 * CLIP_NORM * np.eye(DIMENSION)[RECORDS]]]
    others = unsized(clients - 1)
    background = np.zeros(DIMENSION)
    background[:RECORDS] = float(without.mode != "client")
    seen = []
    for observer, world, offset in ((without, first, 0), (present, second, trials)):
        rows = [observer.sums([*world, *others], offset + trial) - background for trial in range(trials)]
        seen.append(np.array(rows))
    along = [rows[:, RECORDS] for rows in seen]
    # Of Gaussian noise the length is close to sqrt(d); half of the relative change that a normaliser of n would make.
    lengths = [-np.linalg.norm(rows, axis=1) for rows in seen]
    threshold = -math.sqrt(DIMENSION) * without.multiplier * (1 - 0.5 / (RECORDS + 1))
    return all(bound <= claimed for bound in (mu_lower_bound(*along, 0.5), mu_lower_bound(*lengths, threshold)))


def keeps_its_claim_to_neighbours(mode, *, multiplier=2.0, normalisers=(4.0, 4.0)):
    without, present = (Observer(mode, DIMENSION, multiplier=multiplier, normaliser=n) for n in normalisers)
    return neighbours(without, present, claimed=1 / multiplier)


# What is built keeps its claim.


@pytest.mark.parametrize("mode", MODES)
def test_the_noise_is_as_large_as_claimed(mode):
    assert noise_scale(Observer(mode, DIMENSION))


@pytest.mark.parametrize("mode", MODES)
def test_two_worlds_cannot_be_told_apart_better_than_claimed(mode):
    assert two_worlds(Observer(mode, 1))


@pytest.mark.parametrize("mode", MODES)
def test_neighbouring_data_sets_cannot_be_told_apart_better_than_claimed(mode):
    assert keeps_its_claim_to_neighbours(mode)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_observed_is_the_clipped_sum_when_there_is_no_noise(mode):
    """So the tests look at the right thing: three records of length 3 C count as three of length C, or one client."""
    observer = Observer(mode, 8, multiplier=0.0)
    sign = -1.0 if mode == "client" else 1.0
    records = [sign * 3 * CLIP_NORM * np.eye(8)[index] for index in range(3)]
    seen = observer.sums([records, *unsized(observer.clients - 1)], 0)
    expected = np.where(np.arange(8) < 3, 1 / math.sqrt(3) if mode == "client" else 1.0, 0.0)
    assert np.abs(seen - expected).max() < 1e-5


# Broken variants, each caught.


def silent(observer):
    """No noise at all."""
    return replace(observer, multiplier=0.0)


def quarter(observer):
    """A quarter of the noise."""
    return replace(observer, multiplier=observer.multiplier / 4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("broken", [silent, quarter])
def test_too_little_noise_is_noticed_by_its_scale(mode, broken):
    assert not noise_scale(broken(Observer(mode, DIMENSION)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("broken", [silent, quarter])
def test_too_little_noise_is_noticed_between_two_worlds(mode, broken):
    assert not two_worlds(broken(Observer(mode, 1)), trials=150)


@pytest.mark.parametrize("mode", MODES)
def test_too_little_noise_is_noticed_between_neighbours(mode):
    without, present = (Observer(mode, DIMENSION, multiplier=0.5) for _ in range(2))
    assert not neighbours(without, present, claimed=0.5, trials=200)


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_records_that_are_not_clipped_are_noticed(mode, monkeypatch):
    def unclipped(small, examples, *, clip_norm, positions=None, classes=None, part=None):
        return ClippedSum(np.sum([np.zeros(small.dimension), *examples], axis=0), np.ones(len(examples)))

    for module in (dp_sgd, client_vectors):
        monkeypatch.setattr(module, "clipped_sum", unclipped)
    # Within the ring's bound of 16 clip norms a coordinate, which must not be what saves the claim.
    assert not two_worlds(Observer(mode, 1), trials=150, length=10.0)


def test_a_client_that_is_not_clipped_is_noticed(monkeypatch):
    """In mode `client` the ring's bound of one clip norm a coordinate would hide it in one dimension, but not in 64."""
    monkeypatch.setattr(client_vectors, "max", lambda first, second: second or first, raising=False)
    assert not two_worlds(Observer("client", 64), trials=150, length=8.0)


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_a_normaliser_that_is_the_number_of_records_is_noticed(mode):
    """Opacus's issues 571 and 819: the length of the noise tells how many records there are."""
    normalisers = (4.0, 4.0 * (RECORDS + 1) / RECORDS)
    assert not keeps_its_claim_to_neighbours(mode, normalisers=normalisers)


def test_a_mean_over_the_clients_that_contributed_is_noticed():
    """In mode `client` who contributed is secret: dividing by their number would tell."""
    contributed = Observer("client", DIMENSION, multiplier=2.0)
    honest = contributed.sums
    contributed.sums = lambda clients, trial: honest(clients, trial) * RECORDS / (RECORDS + 1)
    assert not neighbours(Observer("client", DIMENSION, multiplier=2.0), contributed, claimed=0.5)


@pytest.mark.parametrize("mode", ["distributed", "client"])
def test_dropouts_that_are_not_compensated_are_noticed(mode, monkeypatch):
    """Shares sized for the whole cohort of five, of whom three honest ones survive."""
    monkeypatch.setattr(
        "fedpt_secure.federation.mechanisms.honest_survivors", lambda config: config.federation.agreed_cohort
    )
    observer = Observer(mode, DIMENSION)
    assert observer.clients == 3
    assert noise_scale(observer, survivors=5)
    assert not noise_scale(observer)


def fresh_between_rounds(mode, streams):
    """The difference of two rounds over the same data holds the noise of both."""
    observer = Observer(mode, DIMENSION, streams=streams)
    data = [[3 * CLIP_NORM * np.eye(DIMENSION)[0]] for _ in range(observer.clients)]
    difference = observer.sums(data, 0) - observer.sums(data, 1)
    return in_chi_square_interval(difference, math.sqrt(2) * NOISE)


def streams_of(config):
    """The sources that clients of a run get."""
    return lambda client, trial: client_randomness(config, f"client {client}").noise(trial)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("insecure", [False, True])
def test_every_round_has_noise_of_its_own(mode, insecure):
    """Not seeded where noise is secure: a false alarm in one of a million runs."""
    config = config_of(mode).model_copy(update={"insecure_deterministic": insecure})
    assert fresh_between_rounds(mode, streams_of(config))


@pytest.mark.parametrize("mode", MODES)
def test_noise_from_a_fixed_seed_is_noticed(mode):
    assert not fresh_between_rounds(mode, lambda client, trial: InsecureDeterministicRandom(7, client))


@pytest.mark.parametrize("mode", ["distributed", "client"])
def test_one_seed_for_all_clients_is_noticed(mode):
    """Then shares add up in step, and everybody can subtract everybody's."""
    streams = lambda client, trial: InsecureDeterministicRandom(7, trial)  # noqa: E731
    assert not noise_scale(Observer(mode, DIMENSION, streams=streams))


def _difference_of_two_sums(mode, *, repeated):
    """A second sum of the same round without its third client: with its old share, or with fresh noise of all."""
    observer = Observer(mode, DIMENSION)
    first = observer.sums(unsized(3), 0)
    second = observer.sums(unsized(2), 0 if repeated else 1)
    return first - second


@pytest.mark.parametrize("mode", ["distributed", "client"])
def test_a_share_used_in_two_sums_is_noticed(mode):
    """Their difference is one client's vector behind one share: a third of the variance that was promised."""
    assert not in_chi_square_interval(_difference_of_two_sums(mode, repeated=True), NOISE)
    one_share = NOISE / math.sqrt(3)
    assert in_chi_square_interval(_difference_of_two_sums(mode, repeated=True), one_share)
    assert in_chi_square_interval(_difference_of_two_sums(mode, repeated=False), math.sqrt(5) * one_share)


@pytest.mark.parametrize("mode", ["distributed", "client"])
def test_a_clients_ledger_gives_no_share_out_twice(mode, tmp_path):
    """What stands in the way of it: nothing is kept that could be sent again, and asking is an error."""
    observer = Observer(mode, 4)
    assert not observer.mechanism.resendable
    ledger = Ledger.create(tmp_path, budget=Budget(math.inf, 1e-5, "client" if mode == "client" else "record"))
    assert ledger.pending("run", 0) is None
    ledger.release("run", 0, observer.mechanism.cost, None, mode=mode, noise_is_private=True)
    with pytest.raises(AlreadyReleased):
        ledger.pending("run", 0)


@pytest.mark.parametrize("mode", MODES)
def test_the_claim_is_what_a_round_is_charged(mode):
    observer = Observer(mode, DIMENSION)
    assert observer.mechanism.cost.noise_multiplier == pytest.approx(NOISE, rel=1e-5)
    assert observer.mechanism.cost.noise_multiplier >= NOISE * (1 - 1e-12)
    assert observer.mechanism.cost.steps == 1
    assert isinstance(observer.mechanism, LocalMechanism) == (mode == "local")
