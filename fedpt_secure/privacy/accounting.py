"""How much a sequence of noisy steps costs, and how much noise a promise needs.

The accountant is Google's `dp-accounting`, by privacy loss distributions (Sommer et al. 2019; Koskela et al. 2020;
Doroshenko et al. 2022), in its pessimistic variant: the discretised distribution dominates the true one, so the
epsilon is an upper bound. The neighbouring relation is add-or-remove one record. The tests compare it with the RDP
and PRV accountants and with the closed form of the Gaussian mechanism.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import dp_accounting
from dp_accounting import pld, rdp

from fedpt_secure.errors import PrivacyError

ACCOUNTANT = "dp-accounting PLD, pessimistic, add-or-remove-one"
LARGEST_NOISE_MULTIPLIER = 10_000.0
SMALLEST_NOISE_MULTIPLIER = 0.2
SMALLEST_DELTA = 1e-12
"""The accountant leaves out probability near 1e-15; below this delta its answer would rest on what it left out."""
SLACK_PER_STEP = 1e-6
"""Added to the privacy loss of every step: what a mechanism on a grid may differ by from the Gaussian of real numbers
that is accounted for (docs/privacy.md, "Noise born in pieces"). The ring mechanism refuses to need more."""
_CALIBRATION_STEP = 1.001  # noise multipliers are searched on a geometric grid this fine
_GRIDS = (1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4)
"""Grids of the privacy loss, coarsest first; any gives an upper bound, a finer one a tighter bound in more time."""
_EXCESS, _EXCESS_IN_SEARCH = 2.5e-6, 2.5e-4  # of epsilon; a noise multiplier 0.1 % larger takes some 0.1 % away
_LARGEST_GRID = 1e5
"""Points of the privacy loss that the tight accountant is asked for, about; a larger loss gets a coarser grid, which
is still an upper bound, in the time and memory of a smaller one."""
_ORDERS = (*range(2, 65), 128, 256, 512)
_LARGEST_TIGHT_EPSILON = 1000.0
"""Above this Renyi bound (Mironov 2017; also an upper bound) the tight accountant is not asked: nobody chooses between
an epsilon of 1,000 and one of 700. Nor is it asked where the slack leaves less than half of `SMALLEST_DELTA`."""


@dataclass(frozen=True, slots=True)
class GaussianSteps:
    """What a client's data went through: `steps` Gaussian releases, each on a Poisson sample of the records.

    Attributes:
        noise_multiplier: ratio of the noise's standard deviation to the L2 sensitivity (the clip norm).
        sampling_rate: public probability with which each record independently takes part in a step.
        steps: number of releases; 0 if the data was never touched.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise PrivacyError(f"noise multiplier {self.noise_multiplier} is not a finite number of 0 or more")
        if not 0 < self.sampling_rate <= 1:
            raise PrivacyError(f"sampling rate {self.sampling_rate} is not in (0, 1]")
        if self.steps < 0:
            raise PrivacyError(f"number of steps {self.steps} is negative")


@functools.lru_cache(maxsize=1024)
def epsilon_spent(spent: tuple[GaussianSteps, ...], *, delta: float, excess: float = _EXCESS) -> float:
    """Smallest epsilon the accountant can prove for the whole history, add-or-remove one record.

    Args:
        excess: part of epsilon by which the bound may lie above the accountant's best: the privacy loss gets the
            coarsest grid that is estimated to keep to it, down to 1e-4. A larger excess is quicker. Histories that
            cost more than an epsilon of 10 get a coarser grid in any case.

    Returns an upper bound; infinity where there was no noise; 0 where nothing was released.

    Raises:
        PrivacyError: delta is not in (0, 1).
    """
    check_delta(delta)
    spent = tuple(item for item in spent if item.steps)
    slack = SLACK_PER_STEP * sum(item.steps for item in spent)
    delta *= math.exp(-2 * slack)  # the slack weighs on delta as well
    if any(item.noise_multiplier < SMALLEST_NOISE_MULTIPLIER for item in spent):
        return math.inf  # the accountant's grid would grow without bound; no useful promise lives here
    if not spent:
        return 0.0
    if delta == 0:
        return math.inf  # the slack of more than 10^8 steps has used it up
    events = [_event(item) for item in merge(spent)]
    with warnings.catch_warnings():
        # It advises more orders where the last one is best; here it only decides whether to look closer.
        warnings.simplefilter("ignore", UserWarning)
        coarse = _compose(rdp.RdpAccountant(_ORDERS), events).get_epsilon(delta)
    if coarse > _LARGEST_TIGHT_EPSILON or delta < SMALLEST_DELTA / 2:
        return float(coarse) + slack
    steps = sum(item.steps for item in spent)
    grid = next((grid for grid in _GRIDS if _excess(grid, steps, coarse, delta) <= excess), _GRIDS[-1])
    # Powers of ten, so that nearly equal histories are looked at through the same grid.
    needed = 10.0 ** math.ceil(math.log10(coarse / _LARGEST_GRID)) if coarse > 0 else 0.0
    tight = pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=max(grid, needed)
    )
    return float(_compose(tight, events).get_epsilon(delta)) + slack


def _excess(grid: float, steps: int, epsilon: float, delta: float) -> float:
    """By what part of itself the accountant's epsilon may lie above that of an infinitely fine grid: an estimate.

    Connecting the dots (Doroshenko et al. 2022) moves the loss of a step to the grid's points on both its sides, which
    leaves its mean and adds at most grid^2 / 4 to its variance. The loss of many steps is nearly Gaussian with a mean
    of half its variance v, so that epsilon is about v / 2 + z sqrt(v), where z = sqrt(2 log(1 / delta)).
    """
    if epsilon <= 0:
        return math.inf
    z = math.sqrt(2 * math.log(1 / delta))
    deviation = 2 * epsilon / (math.sqrt(z * z + 2 * epsilon) + z)
    return steps * grid**2 / 4 * (0.5 + z / (2 * deviation)) / epsilon


def calibrate_noise(*, epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """A noise multiplier with which `steps` releases cost at most (epsilon, delta), and hardly less.

    `epsilon_spent` of the result, at its default excess, is at most epsilon, so a budget check agrees; of a
    multiplier 0.1 % smaller it is above epsilon.

    Returns 0 for an infinite epsilon, which promises nothing.

    Raises:
        PrivacyError: the promise cannot be met by any reasonable noise; the message says what would.
    """
    check_delta(delta)
    if math.isnan(epsilon) or epsilon <= 0:
        raise PrivacyError(f"epsilon {epsilon} is not above 0")
    if math.isinf(epsilon):
        return 0.0
    if steps < 1:
        raise PrivacyError(f"cannot calibrate noise for {steps} steps")

    def cost(exponent: int, excess: float = _EXCESS_IN_SEARCH) -> float:
        history = (GaussianSteps(_noise_multiplier(exponent), sampling_rate, steps),)
        return epsilon_spent(history, delta=delta, excess=excess)

    top = math.ceil(math.log(LARGEST_NOISE_MULTIPLIER / SMALLEST_NOISE_MULTIPLIER, _CALIBRATION_STEP))
    # Gallop from the small end, where the Renyi bound mostly answers alone.
    enough = 1
    stride = math.ceil(math.log(2, _CALIBRATION_STEP))
    while cost(enough) > epsilon:
        if enough == top:
            raise PrivacyError(
                f"epsilon {epsilon:g} at delta {delta:g} cannot be met over {steps} steps at sampling rate "
                f"{sampling_rate:g} even with noise multiplier {LARGEST_NOISE_MULTIPLIER:g}",
                hint=f"fewer rounds or local steps, or epsilon >= {round_up(cost(top)):g}",
            )
        enough = min(top, enough + stride)
    too_little = max(0, enough - stride)
    for guess in itertools.count(1):
        if enough - too_little <= 1:
            break
        # The logarithm of epsilon is nearly a line, which misses by little; every third guess halves what is left, as
        # does one where the accountant proves nothing at the lower end.
        share, above = 0.5, cost(too_little)
        if guess % 3 and math.isfinite(above):
            low, high = math.log(above / epsilon), math.log(cost(enough) / epsilon)
            share = low / (low - high)
        middle = min(max(too_little + round(share * (enough - too_little)), too_little + 1), enough - 1)
        too_little, enough = (too_little, middle) if cost(middle) <= epsilon else (middle, enough)
    # The coarse grid found a multiplier near the answer, mostly too large; the fine one walks to it, in steps as long
    # as the coarse slope says, so that few are needed.
    slope = max(1e-12, cost(max(0, enough - 20)) - cost(enough)) / 20
    enough_known, too_little = top + 1, -1
    while enough_known - too_little > 1:
        fine = cost(enough, _EXCESS)
        stride = max(1, math.ceil(abs(epsilon - fine) / slope)) if math.isfinite(fine) else 1
        if fine <= epsilon:
            enough_known = enough
            enough = max(too_little + 1, enough - stride)
        else:
            too_little = enough
            enough = min(enough_known - 1, enough + stride)
    if enough_known > top:
        raise PrivacyError(f"the accountant cannot prove epsilon {epsilon:g} at delta {delta:g} over {steps} steps")
    return _noise_multiplier(enough_known)


def _noise_multiplier(exponent: int) -> float:
    return SMALLEST_NOISE_MULTIPLIER * float(_CALIBRATION_STEP**exponent)


def _event(spent: GaussianSteps) -> dp_accounting.DpEvent:
    release: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(spent.noise_multiplier)
    if spent.sampling_rate < 1:
        release = dp_accounting.PoissonSampledDpEvent(spent.sampling_rate, release)
    return dp_accounting.SelfComposedDpEvent(release, spent.steps)


def _compose(
    accountant: dp_accounting.PrivacyAccountant, events: Iterable[dp_accounting.DpEvent]
) -> dp_accounting.PrivacyAccountant:
    for event in events:
        accountant.compose(event)
    return accountant


def merge(spent: tuple[GaussianSteps, ...]) -> tuple[GaussianSteps, ...]:
    """Add up the steps of equal mechanisms; composition does not depend on their order."""
    steps: dict[tuple[float, float], int] = {}
    for item in spent:
        key = (item.noise_multiplier, item.sampling_rate)
        steps[key] = steps.get(key, 0) + item.steps
    return tuple(GaussianSteps(*key, steps=count) for key, count in sorted(steps.items()))


def round_up(epsilon: float, digits: int = 3) -> float:
    """Round an epsilon for printing, never down."""
    scale: float = 10.0**digits
    if not math.isfinite(epsilon * scale):
        return epsilon
    units = math.ceil(epsilon * scale)
    # The product may have been rounded down to a whole number.
    rounded = units / scale if units / scale >= epsilon else (units + 1) / scale
    return max(rounded, epsilon)  # where doubles are further apart than the digits


def check_delta(delta: float) -> None:
    """Refuse a delta that is no probability, or too small for the accountant."""
    if not SMALLEST_DELTA <= delta < 1:
        raise PrivacyError(
            f"delta {delta} is not in [{SMALLEST_DELTA:g}, 1)", hint="a common choice is 1e-5, below 1/records"
        )
