"""What a client insists on, whatever the server proposes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from threading import Lock
from typing import Protocol

from fedpt_secure.crypto.context import RoundContext
from fedpt_secure.crypto.errors import ParameterError, PolicyViolation, RoundReplayed
from fedpt_secure.crypto.parameters import GRINDING_BITS, LARGEST_SECURITY_BITS, graph_withstands


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientPolicy:
    """A client's own floors. They come from its configuration, never from the server.

    Attributes:
        minimum_cohort: clients that must be invited.
        minimum_survivors: masked vectors that a sum must hold, the client's own among them. The client hides
            among the *honest* ones of these.
        minimum_threshold: floor of the context's threshold.
        tolerated_corruptions: share holders of one client that may collude with a malicious server; the client
            insists on 2 t > holders + tolerated_corruptions, so that two disjoint views of the survivors cannot both
            reach t shares (Bonawitz et al. 2017, on active adversaries).
        tolerated_corrupt_clients: clients of the whole cohort that may collude; in the k-regular graph the client
            insists on 2 minimum_survivors > n + tolerated_corrupt_clients, so that all honest clients sign one list.
            In the complete graph everybody is a share holder, and `tolerated_corruptions` says it all.
        minimum_degree: neighbours that a client must have where the graph is not complete.
        graph_security_bits: where the graph is not complete, the client works out for itself how likely a random
            graph of that degree and threshold lets the server see more than one sum, with `tolerated_corrupt_clients`
            accomplices and whomever else `minimum_survivors` lets it call lost (`parameters.graph_withstands`). It
            insists on less than 2^-graph_security_bits after 2^64 tries at a graph.
    """

    minimum_cohort: int = 3
    minimum_survivors: int = 2
    minimum_threshold: int = 2
    tolerated_corruptions: int = 0
    tolerated_corrupt_clients: int = 0
    minimum_degree: int = 2
    graph_security_bits: int = 40

    def __post_init__(self) -> None:
        # A field that is not here has no floor of its own, and may be zero.
        floors = {"minimum_cohort": 2, "minimum_survivors": 2, "minimum_threshold": 2, "minimum_degree": 2}
        problems = []
        for name in (field.name for field in fields(self)):
            value, floor = getattr(self, name), floors.get(name, 0)
            # Comparisons with something that is no number, NaN for one, would let every round pass.
            if type(value) is not int or value < floor:
                problems.append(f"{name} is {value!r}; it must be an integer of at least {floor}")
        if type(self.graph_security_bits) is int and self.graph_security_bits > LARGEST_SECURITY_BITS:
            problems.append(f"graph_security_bits is {self.graph_security_bits}; at most {LARGEST_SECURITY_BITS}")
        if problems:
            raise ParameterError("; ".join(problems))

    def check(self, context: RoundContext) -> None:
        """Accept the round or refuse it, naming everything that is wrong with it.

        Raises:
            PolicyViolation: a floor is not met.
        """
        problems = [
            f"{name} is {proposed}, below this client's minimum of {floor}"
            for name, proposed, floor in (
                ("the cohort", len(context.cohort), self.minimum_cohort),
                ("minimum_survivors", context.minimum_survivors, self.minimum_survivors),
                ("threshold", context.threshold, self.minimum_threshold),
                ("degree", context.degree, self.minimum_degree),
            )
            if proposed is not None and proposed < floor
        ]
        if 2 * context.threshold <= context.holders + self.tolerated_corruptions:
            problems.append(
                f"a threshold of {context.threshold} among {context.holders} share holders lets a malicious server "
                f"show two survivor lists: 2t must exceed {context.holders + self.tolerated_corruptions}"
            )
        everybody = len(context.cohort) + self.tolerated_corrupt_clients
        if context.degree is not None and 2 * context.minimum_survivors <= everybody:
            problems.append(
                f"{context.minimum_survivors} signatures on a survivor list leave room for a second list among "
                f"{len(context.cohort)} clients: twice as many must exceed {everybody}"
            )
        if context.degree is not None and not graph_withstands(
            cohort=len(context.cohort),
            degree=context.degree,
            threshold=context.threshold,
            corrupt=min(self.tolerated_corrupt_clients, len(context.cohort)),
            dropouts=len(context.cohort) - context.minimum_survivors,
            security_bits=self.graph_security_bits + GRINDING_BITS,
        ):
            problems.append(
                f"{context.degree} neighbours and a threshold of {context.threshold} let a malicious server split the "
                f"graph of {len(context.cohort)} clients too easily: the failure must stay below "
                f"2^-{self.graph_security_bits}"
            )
        if problems:
            raise PolicyViolation("; ".join(problems), hint="the client sent nothing")


class RoundRegister(Protocol):
    """A client's memory of rounds, kept for as long as its identity serves.

    Two sums over the same updates with different survivors differ by single updates. A register that outlives
    the process keeps a server from replaying a round, and from completing a second attempt of a round that
    was already opened.

    Both methods look and write in one step: two calls at once, from two threads or two processes that share one
    register, must not both succeed. What is written is durable before they return.
    """

    def begin(self, context: RoundContext) -> None:
        """Record that the client takes part in this attempt of the round.

        Raises:
            RoundReplayed: it already did, or it already released shares in another attempt of the round.
        """

    def release(self, context: RoundContext) -> None:
        """Record, before it does, that the client helps to open this session's sum, and no other attempt's.

        In the complete graph that is when it releases shares: a majority of the same holders is needed for every
        attempt. In the k-regular one it is when it signs the survivor list: holders are others in every attempt, but no
        two lists can have a quorum if everybody signs one. An attempt that fails after that cannot be repeated there.

        Raises:
            RoundReplayed: it already did so in another attempt of the round.
        """


class MemoryRoundRegister:
    """A `RoundRegister` that lasts as long as the process. Threads may share it."""

    def __init__(self) -> None:
        self._turn = Lock()
        self._begun: set[tuple[bytes, int, int]] = set()
        self._released: set[tuple[bytes, int]] = set()

    def begin(self, context: RoundContext) -> None:
        """See `RoundRegister.begin`."""
        session = (context.run_id, context.round_index, context.attempt)
        with self._turn:
            if session in self._begun:
                raise RoundReplayed(f"round {context.round_index}, attempt {context.attempt}, was begun before")
            self._check_not_released(context)
            self._begun.add(session)

    def release(self, context: RoundContext) -> None:
        """See `RoundRegister.release`."""
        with self._turn:
            self._check_not_released(context)
            self._released.add((context.run_id, context.round_index))

    def _check_not_released(self, context: RoundContext) -> None:
        if (context.run_id, context.round_index) in self._released:
            raise RoundReplayed(
                f"round {context.round_index} was already opened in another attempt",
                hint="a second sum over the same updates would give single updates away; go on with the next round",
            )
