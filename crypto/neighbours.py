"""Who masks with whom, and who holds whose shares.

The complete graph is Bonawitz et al. 2017. The k-regular graph is Bell et al. 2020: a Harary graph on a
random permutation of the clients whose keys are in the directory. The permutation comes from a hash of that
directory, which every client computes for itself, so that nobody is told who its neighbours are.

What the hash does and does not give. The keys of honest clients are fresh and signed, so no one can predict
the graph. A server that controls some clients may still try many variants of *their* keys, or leave out
clients, and keep the graph it likes best; each doubling of its tries costs one bit of the graph's failure
probability. `parameters.GRINDING_BITS` is the room that parameters leave for that, and that clients insist on;
`docs/protocol.md`, "Why one sum", has the argument.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final, Literal

from fedpt_secure.crypto.context import RoundContext
from fedpt_secure.crypto.labels import Label, digest
from fedpt_secure.crypto.prg import Keystream

_DRAW_BYTES: Final = 8


class NeighbourGraph:
    """The symmetric graph over the members of the key directory (positions in the cohort)."""

    def __init__(self, context: RoundContext, *, directory_digest: bytes, members: Sequence[int]) -> None:
        self._members = tuple(members)
        self._reach = 0
        if context.degree is not None and context.degree < len(self._members) - 1:
            self._reach = context.degree // 2
            seed = digest(Label.GRAPH, (context.session_digest, directory_digest))
            self._ring = _permutation(self._members, seed)
            self._position = {member: position for position, member in enumerate(self._ring)}

    def holders(self, member: int) -> tuple[int, ...]:
        """The member and its neighbours, sorted: those who hold shares of its secrets, and whose shares it holds."""
        if not self._reach:
            return self._members
        size, here = len(self._ring), self._position[member]
        return tuple(sorted(self._ring[(here + step) % size] for step in range(-self._reach, self._reach + 1)))

    def neighbours(self, member: int) -> tuple[int, ...]:
        """`holders` without the member itself: those it shares a pairwise mask with."""
        return tuple(other for other in self.holders(member) if other != member)

    def fewest_holders(self, owners: Iterable[int], present: Collection[int]) -> int:
        """Over all owners, the least number of holders of an owner's shares that are present."""
        here = frozenset(present)
        if not self._reach:
            return len(here.intersection(self._members))
        return min((len(here.intersection(self.holders(owner))) for owner in owners), default=0)


def share_point(holder: int) -> int:
    """The point at which a client holds shares: its cohort position plus one, since zero is the secret's place."""
    return holder + 1


def mask_sign(owner: int, peer: int) -> Literal[1, -1]:
    """Whether `owner` adds (1) or subtracts (-1) the mask it shares with `peer`; the peer does the opposite."""
    return 1 if owner < peer else -1


def _permutation(members: Sequence[int], seed: bytes) -> list[int]:
    """A uniform permutation (Fisher-Yates) expanded from a 32-byte seed."""
    stream = Keystream(seed)
    shuffled = list(members)
    for last in range(len(shuffled) - 1, 0, -1):
        # Draws above the largest multiple are thrown away: taking them modulo (last + 1) would favour low
        # positions.
        limit = 2 ** (8 * _DRAW_BYTES) // (last + 1) * (last + 1)
        draw = limit
        while draw >= limit:
            draw = int.from_bytes(stream.read(_DRAW_BYTES), "big")
        chosen = draw % (last + 1)
        shuffled[last], shuffled[chosen] = shuffled[chosen], shuffled[last]
    return shuffled
