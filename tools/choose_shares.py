"""Choose alpha and the shares of a steering rule on public text; judge them, and richer rules, on other public text.

    python tools/choose_shares.py WORK/positions-*.npz --judge answers,Henrik-Ibsen [--json]

The files are those that `choose_alpha.py` leaves behind. Constants are chosen on the domains that are not named by
`--judge`, by the mean of the domains' losses, so that a large domain does not outvote a small one; the named ones only
judge. Rules:

- *linear*: alpha alone; *one share*: alpha and a share for all places; *by place*: alpha, and a share in each of
  `PLACES`. Given alpha the shares are exact minima, because a domain's loss is a sum over places.
- *by place and FEATURE*: another share in each third of a feature (entropy of the large or the tuned LM, divergence of
  large from base, overlap of large and tuned), thirds of the choosing domains.
- *by place, posterior*: fixed-share mixing (Herbster and Warmuth 1998) inside a record: the weights of the shifted
  model, at three alphas, and of the tuned small LM follow from how well each predicted the tokens already seen, and at
  each step a part `forgetting` of them goes back to the constants by place. `forgetting` 1 is *by place*.
- *mixture*, *temperature*, *top*: log-linear mixtures, tempered and top-100 shifts, the best of a few.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from steering_positions import ALPHAS

PLACES = (0, 1, 2, 4, 8, 16, 32, 64)
SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
FEATURES = ("entropy-large", "entropy-tuned", "divergence", "overlap")
FORGETTING = (0.02, 0.05, 0.1, 0.2, 0.4)

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Domain:
    """One rehearsal: arrays `[positions]` of `steering_positions.positions`."""

    name: str
    noise: float
    arrays: dict[str, npt.NDArray[np.float32]]

    @classmethod
    def load(cls, path: Path) -> Domain:
        """Read one of `choose_alpha.py`'s files; its name holds domain and noise."""
        name, noise = path.stem.removeprefix("positions-").rsplit("-", 2)[:2]
        with np.load(path) as arrays:
            return cls(name, float(noise), {key: arrays[key] for key in arrays.files})

    def loss(self, logprobs: Values) -> float:
        """Nats per token."""
        return float(-logprobs.mean())

    @property
    def bucket(self) -> npt.NDArray[np.int64]:
        """Index into `PLACES` of each position."""
        return np.searchsorted(PLACES, self.arrays["place"], side="right") - 1

    def blended(self, share: npt.ArrayLike, alpha: float) -> Values:
        """Log-probability of each token where the tuned small LM has a share (a number, or one a position)."""
        linear, tuned = (self.arrays[name].astype(np.float64) for name in (f"linear-{alpha:g}", "tuned"))
        with np.errstate(divide="ignore"):
            return np.logaddexp(np.log1p(-np.asarray(share)) + linear, np.log(share) + tuned)


@dataclass(frozen=True)
class Rule:
    """Alpha, and a share for each cell of a partition of the positions."""

    alpha: float
    shares: Values
    loss: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--judge", default="", help="comma-separated domains that only judge")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    domains = [Domain.load(path) for path in options.files]
    names = options.judge.split(",")
    choosing = [domain for domain in domains if domain.name not in names]
    lines = compare(choosing, [domain for domain in domains if domain.name in names])
    if options.json:
        print("\n".join(json.dumps(line) for line in lines))
        return
    for line in lines:
        constants = ", ".join(f"{key} {value}" for key, value in line["constants"].items())
        losses = "  ".join(f"{name} {loss:.4f}" for name, loss in line["losses"].items())
        print(f"{line['rule']:28} {losses}\n{'':28} {constants}")


def compare(choosing: Sequence[Domain], judging: Sequence[Domain]) -> list[dict]:
    """One line a rule: its constants, chosen on `choosing`, and the loss on every domain."""
    found = []

    def add(rule: str, constants: dict, losses: Iterable[float]) -> None:
        named = {f"{domain.name}/{domain.noise:g}": loss for domain, loss in zip(everything, losses, strict=True)}
        found.append({"rule": rule, "constants": constants, "losses": named})

    everything = [*choosing, *judging]
    add("large alone", {}, (domain.loss(domain.arrays["large"]) for domain in everything))
    for key in sorted(set(everything[0].arrays) - {"record", "place", "large", *FEATURES}):
        add(key, {}, (domain.loss(domain.arrays[key]) for domain in everything))
    for name, cells in (
        ("one share", lambda domain: np.zeros(len(domain.bucket), dtype=np.int64)),
        ("by place", lambda domain: domain.bucket),
    ):
        rule = choose(choosing, cells)
        add(name, _constants(rule), (score(domain, cells, rule) for domain in everything))
    by_place = rule
    for feature in FEATURES:
        thirds = np.quantile(np.concatenate([domain.arrays[feature] for domain in choosing]), (1 / 3, 2 / 3))

        def cells(domain: Domain, feature: str = feature, thirds: Values = thirds) -> npt.NDArray[np.int64]:
            return 3 * domain.bucket + np.searchsorted(thirds, domain.arrays[feature])

        rule = choose(choosing, cells)
        add(f"by place and {feature}", {"alpha": rule.alpha}, (score(domain, cells, rule) for domain in everything))
    for forgetting in FORGETTING:
        losses = [domain.loss(posterior(domain, by_place, forgetting)) for domain in everything]
        add("by place, posterior", {"forgetting": forgetting}, losses)
    return found


def choose(domains: Sequence[Domain], cells, alphas: Sequence[float] = ALPHAS) -> Rule:
    """The alpha and the share of each cell with the least mean loss over the domains.

    Args:
        domains: equally weighted.
        cells: a function of a domain that numbers the cell of each of its positions.
    """
    numbered = [cells(domain) for domain in domains]
    count = 3 * len(PLACES)  # cells that no domain reaches keep share 0
    best: Rule | None = None
    for alpha in alphas:
        sums = np.zeros((len(SHARES), count))
        for domain, cell in zip(domains, numbered, strict=True):
            for index, share in enumerate(SHARES):
                sums[index] -= np.bincount(cell, domain.blended(share, alpha), minlength=count) / len(cell)
        rule = Rule(alpha, np.array(SHARES)[sums.argmin(0)], float(sums.min(0).sum()) / len(domains))
        if best is None or rule.loss < best.loss:
            best = rule
    if best is None:
        raise ValueError("there is no alpha to choose from")
    return best


def score(domain: Domain, cells, rule: Rule) -> float:
    """The loss of a rule on a domain."""
    return domain.loss(domain.blended(rule.shares[cells(domain)], rule.alpha))


def posterior(domain: Domain, rule: Rule, forgetting: float) -> Values:
    """Log-probability of each token under fixed-share mixing, from the tokens of its record before it alone."""
    experts = ("linear-0", f"linear-{rule.alpha:g}", "linear-1", "tuned")
    logs = np.stack([domain.arrays[name].astype(np.float64) for name in experts], axis=1)
    share = rule.shares[domain.bucket]
    start = np.stack([0.1 * (1 - share), 0.8 * (1 - share), 0.1 * (1 - share), share], axis=1)
    places, records = domain.arrays["place"], domain.arrays["record"]
    result = np.empty(len(places))
    weights = np.zeros((int(records.max()) + 1, len(experts)))
    for place in range(int(places.max()) + 1):
        rows = np.flatnonzero(places == place)
        who = records[rows].astype(np.int64)
        kept = 0.0 if place == 0 else 1 - forgetting
        mixed = kept * weights[who] + (1 - kept) * start[rows]
        joint = np.log(np.maximum(mixed, 1e-300)) + logs[rows]
        result[rows] = np.logaddexp.reduce(joint, axis=1)
        weights[who] = np.exp(joint - result[rows, None])
    return result


def _constants(rule: Rule) -> dict:
    return {"alpha": rule.alpha, "shares": dict(zip(PLACES, rule.shares.tolist(), strict=False))}


if __name__ == "__main__":
    main()
