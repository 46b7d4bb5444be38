"""The privacy statement: the one object that every printed epsilon comes from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedpt_secure.privacy.accounting import ACCOUNTANT, GaussianSteps, epsilon_spent, merge, round_up
from fedpt_secure.privacy.ring_mechanism import RingMechanism

SCHEMA = "fedpt-secure/privacy/2"

Adversary = Literal["outsider", "server", "server_with_clients", "malicious_server_with_clients"]
ANY_NUMBER = "any number"
_OUTSIDER = "whoever holds the released adapter, or queries the proxy-tuned model"
_NOT_ADAPTIVE = (
    "who takes part, who drops out, and what later work is asked for, do not depend on what was released before"
)
_BESIDE = (
    "the run's own files beside the adapter: record counts, a digest of the text and times in summary.json and "
    "transcript.jsonl are exact"
)
_FIGURES = (
    "the figures of reports, evaluations and audits: held-out ones are averages over private records that were never "
    "trained on, those of a ceiling (`evaluate --ceiling`) come from a model trained on all records without privacy"
)
_SERVER = "the server, honest but curious, which sees every message"


@dataclass(frozen=True, slots=True)
class Guarantee:
    """What holds against one adversary.

    Attributes:
        adversary: which one.
        sees: what it sees, in words.
        colluding_clients: how many clients of a round share all they know with it, or `ANY_NUMBER`.
        epsilon: an upper bound at the statement's delta, or None where nothing is promised.
    """

    adversary: Adversary
    sees: str
    colluding_clients: int | str
    epsilon: float | None


@dataclass(frozen=True, slots=True)
class PrivacyStatement:
    """What is promised to whom, against whom, and under which assumptions.

    Attributes:
        epsilon: an upper bound over the clients, against the strongest adversary; None where nothing is promised.
        delta: the probability the promise does not cover.
        unit: what is protected.
        neighbouring: which two data sets must look alike.
        adversary: whom the promise holds against.
        mechanism: what was done to the data.
        accountant: how the number was computed.
        guarantees: one epsilon for each adversary of SECURITY.md.
        noise_multiplier, sampling_rate, steps: of the client that was used most, against the strongest adversary.
        assumptions: what must be true for the promise to hold.
        not_covered: what it does not say.
        private: False where nothing is promised (no noise, or noise that anybody can recompute).
    """

    epsilon: float | None
    delta: float
    unit: str
    neighbouring: str
    adversary: str
    mechanism: str
    accountant: str
    guarantees: tuple[Guarantee, ...]
    noise_multiplier: float
    sampling_rate: float
    steps: int
    assumptions: tuple[str, ...]
    not_covered: tuple[str, ...]
    private: bool

    def to_json(self) -> dict[str, Any]:
        """The content of `privacy.json`."""
        return {"schema": SCHEMA, "claim": self.claim(), **dataclasses.asdict(self)}

    def claim(self) -> str:
        """The promise in one sentence."""
        if not self.private or self.epsilon is None:
            return "NOT PRIVATE: no differential privacy is promised."
        return (
            f"epsilon <= {self.epsilon} at delta = {self.delta} for each {self.unit}; neighbouring: "
            f"{self.neighbouring}; against {self.adversary}."
        )


def local_statement(
    histories: Mapping[str, Sequence[GaussianSteps]], *, delta: float, clip_norm: float, noise_is_private: bool
) -> PrivacyStatement:
    """The statement of mode `local` over what each client's ledger says was really spent.

    Each client's noise protects its own records, whoever else is honest; the run's epsilon is the largest.

    Args:
        histories: client id -> its releases in this run.
        noise_is_private: False for noise from a seed.
    """
    worst: tuple[GaussianSteps, ...] = ()
    epsilon = 0.0
    for history in {tuple(item) for item in histories.values()}:
        spent = epsilon_spent(history, delta=delta)
        if spent >= epsilon:
            epsilon, worst = spent, history
    private = noise_is_private and math.isfinite(epsilon)
    multiplier, rate, steps = _figures(worst)
    printed = round_up(epsilon) if private else None
    return PrivacyStatement(
        epsilon=printed,
        delta=delta,
        unit="single record of a client",
        neighbouring="add or remove one record of one client's prepared training set",
        adversary=(
            "anyone who sees all the client ever sends, bare: the server, other clients, all of them together, "
            "and whoever holds the released adapter or queries the proxy-tuned model"
        ),
        mechanism=(
            f"DP-SGD at each client: per-record gradients clipped to {clip_norm:g}, Gaussian noise of standard "
            f"deviation {multiplier:.4g} x {clip_norm:g} added by the client, each record in a step with "
            f"probability {rate:g} (Poisson), at most {steps} steps per client; sums divided by a public constant"
        ),
        accountant=ACCOUNTANT,
        guarantees=(
            Guarantee("outsider", _OUTSIDER, 0, printed),
            Guarantee("server", _SERVER, 0, printed),
            Guarantee("server_with_clients", "all messages, bare, and all that the clients know", ANY_NUMBER, printed),
        ),
        noise_multiplier=multiplier,
        sampling_rate=rate,
        steps=steps,
        assumptions=(
            "the client's own device, code and random generator are honest",
            *(("nobody learns which records a step sampled",) if rate < 1 else ()),
            "which clients take part, and the prepared sets' boundaries, are not secret",
            _NOT_ADAPTIVE,
            "noise drawn, added and kept in double precision stands for real numbers",
        ),
        not_covered=(
            "one person's records in several conversations together: k records cost about k times epsilon",
            _FIGURES,
            _BESIDE,
            "what the same data is used for elsewhere; the client's ledger counts only what it sees",
        ),
        private=private,
    )


def ring_statement(
    rounds: Mapping[str, Sequence[int]],
    *,
    survivors: Mapping[int, int],
    mechanism: RingMechanism,
    by_client: bool,
    sampling_rate: float,
    delta: float,
    clip_norm: str,
    corrupt_clients: int,
    noise_is_private: bool,
) -> PrivacyStatement:
    """The statement of the modes whose noise is the sum of the honest survivors' shares.

    Against an honest-but-curious server a completed round's noise is what its survivors added, less the colluders'
    shares. Against a malicious one, and for a round that was counted but not completed, it is the fewest honest shares
    that any opened sum has; that is also what the ledgers count, and the statement's epsilon.

    Args:
        rounds: client id -> the rounds that its ledger counts.
        survivors: completed round -> how many clients' shares its sum holds.
        by_client: the unit is a client, not a record.
        clip_norm: what was clipped to, in words.
        corrupt_clients: most colluders that the promise covers.
        noise_is_private: False for noise from a seed.
    """

    def history(counted: Iterable[int], shares: Mapping[int, int]) -> tuple[GaussianSteps, ...]:
        multipliers = (mechanism.noise_multiplier(shares.get(index, mechanism.honest_shares)) for index in counted)
        return merge(tuple(GaussianSteps(multiplier, sampling_rate, steps=1) for multiplier in multipliers))

    def spent(shares: Mapping[int, int]) -> tuple[float, tuple[GaussianSteps, ...]]:
        histories = {history(counted, shares) for counted in rounds.values()}
        costs = ((epsilon_spent(item, delta=delta), item) for item in histories)
        return max(costs, key=lambda cost: cost[0], default=(0.0, ()))

    # A malicious server may have opened sums over as few survivors as the clients let it, whatever it says.
    epsilon, worst = spent({})
    private = noise_is_private and math.isfinite(epsilon)
    multiplier, rate, steps = _figures(worst)

    def curious(colluding: int) -> float | None:
        honest = {index: count - colluding for index, count in survivors.items()}
        return round_up(spent(honest)[0]) if private else None

    printed = round_up(epsilon) if private else None
    what = "client's whole update" if by_client else "record's gradient"
    return PrivacyStatement(
        epsilon=printed,
        delta=delta,
        unit="client, with all its records" if by_client else "single record of a client",
        neighbouring=(
            "one client's records all there, or none of them; it takes part either way"
            if by_client
            else "add or remove one record of one client's prepared training set"
        ),
        adversary=(
            f"the server, malicious too, together with at most {corrupt_clients} clients of a round, who see secure "
            "sums and nothing else of other clients, and whoever holds the released adapter or queries the proxy-tuned "
            "model"
        ),
        mechanism=(
            f"each {what} clipped to {clip_norm}, {'a client contributing' if by_client else 'each record in a round'} "
            f"with probability {rate:g} by a secret coin; every client adds a discrete Gaussian share of "
            f"{mechanism.share_sigma / mechanism.encoding.scale:.4g} clip norms in the ring Z_2^"
            f"{mechanism.encoding.ring_bits}, and only the secure sum is seen; the honest shares of a round together "
            f"make a noise multiplier of at least {multiplier:.4g}; at most {steps} rounds per client; sums divided by "
            "public numbers"
        ),
        accountant=ACCOUNTANT + ", plus a bound on what discreteness adds",
        guarantees=(
            Guarantee("outsider", _OUTSIDER, 0, curious(0)),
            Guarantee("server", _SERVER, 0, curious(0)),
            *(
                Guarantee(
                    "server_with_clients", "the secure sums, and all that these clients know", count, curious(count)
                )
                for count in _colluder_counts(corrupt_clients)
            ),
            Guarantee(
                "malicious_server_with_clients",
                f"secure sums over as few as {mechanism.honest_shares + corrupt_clients} survivors",
                corrupt_clients,
                printed,
            ),
        ),
        noise_multiplier=multiplier,
        sampling_rate=rate,
        steps=steps,
        assumptions=(
            "each honest client's own device, code and random generator are honest",
            f"of any opened round's survivors, at most {corrupt_clients} collude; all others add their noise shares",
            "secure aggregation holds: its roster, thresholds and primitives (SECURITY.md)",
            *(("nobody learns who or what a round sampled",) if rate < 1 else ()),
            "which clients take part is not secret",
            _NOT_ADAPTIVE,
            "floating-point error adds less than a thousandth of the clip norm to what one unit moves a sum by",
        ),
        not_covered=(
            "a server with more colluding clients: nothing is promised against it",
            *(
                ()
                if by_client
                else ("one person's records in several conversations together: k records cost about k times epsilon",)
            ),
            _FIGURES,
            _BESIDE,
            "what the same data is used for elsewhere; the client's ledger counts only what it sees",
        ),
        private=private,
    )


def _colluder_counts(most: int) -> list[int]:
    """1, 2, 4, ... and the bound itself: epsilon grows with the count, so that the next listed one bounds the rest."""
    doubling = {2**power for power in range(most.bit_length()) if 2**power < most}
    return sorted(doubling | ({most} if most else set()))


def _figures(history: Sequence[GaussianSteps]) -> tuple[float, float, int]:
    """Smallest noise multiplier, largest rate, and number of steps of a history."""
    return (
        min((item.noise_multiplier for item in history), default=0.0),
        max((item.sampling_rate for item in history), default=0.0),
        sum(item.steps for item in history),
    )
