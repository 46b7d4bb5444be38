"""Shares as the server collects them, and the secrets rebuilt from them, checked against what owners published."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedpt_secure.crypto.context import RoundContext
from fedpt_secure.crypto.errors import InvalidShare, MalformedMessage, ReconstructionFailed
from fedpt_secure.crypto.neighbours import share_point
from fedpt_secure.crypto.shamir import decode_share, reconstruct


class ShareCollection:
    """Shares of many owners by many holders. Which secret a share is of, the survivor list says."""

    def __init__(self, context: RoundContext) -> None:
        self._context = context
        self._shares: dict[int, dict[int, bytes]] = {}
        self._false_points: set[int] = set()

    @property
    def disputed_holders(self) -> tuple[int, ...]:
        """Holders whose share did not fit while others' made up for it, as far as secrets were rebuilt.

        The holder sent another share than it was dealt, or the owner dealt it a false one: the shares do not say which.
        """
        return tuple(point - 1 for point in sorted(self._false_points))

    def add(self, shares: Mapping[int, bytes], *, holder: int) -> None:
        """File one holder's shares, by owner: all of them or none.

        Raises:
            MalformedMessage: one encodes no element of the field.
        """
        for owner, share in shares.items():
            try:
                decode_share(share)
            except InvalidShare:
                names = self._context.cohort
                raise MalformedMessage(
                    f"client {names[holder]!r} sent bytes that are no share of {names[owner]!r}"
                ) from None
        for owner, share in shares.items():
            self._shares.setdefault(owner, {})[share_point(holder)] = share

    def rebuild(self, owner: int, is_genuine: Callable[[bytearray], bool]) -> bytearray:
        """The secret that `owner` shared, which `is_genuine` compares with what it published.

        If the first shares give another one and there are more, each of them is left out in turn: one false share among
        them is outvoted, and its holder is known. A holder whose share of another owner was outvoted is asked last, not
        never: an owner that dealt it a false share must not be able to silence it.

        Raises:
            ReconstructionFailed: no such choice of shares gives the genuine secret.
        """
        threshold = self._context.threshold
        filed = self._shares.get(owner, {})
        order = sorted(filed, key=lambda point: (point in self._false_points, point))
        first = order[:threshold]
        for left_out in (None, *first):
            chosen = [point for point in order if point != left_out][:threshold]
            if len(chosen) < threshold:
                break
            try:
                secret = reconstruct({point: filed[point] for point in chosen}, threshold=threshold)
            except InvalidShare:
                continue
            if is_genuine(secret):
                if left_out is not None:
                    self._false_points.add(left_out)
                return secret
        name = self._context.cohort[owner]
        raise ReconstructionFailed(
            f"the shares of client {name!r} do not give the secret that it committed to",
            owner=name,
            holders=[self._context.cohort[point - 1] for point in first],
            hint="the owner or one of the holders sent a false share; no sum was computed",
        )

    def clear(self) -> None:
        """Forget all shares; whose did not fit stays known."""
        self._shares.clear()
