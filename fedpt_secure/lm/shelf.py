"""What need not be computed again, kept within a bound of memory that several kinds of it share."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value", bound=_Sized)


@dataclass(slots=True)
class MemoryBound:
    """Bytes that shelves may hold together, and those they hold.

    Attributes:
        limit: the most.
        held: by all shelves under this bound.
    """

    limit: int
    held: int = 0


class Shelf(Generic[Key, Value]):
    """Values by key, under a shared bound.

    **Guarantees** What the shelves under a bound hold never exceeds it. What is full stays as it is: dropping the
    oldest would, over passes in one order, drop every value before its use.
    """

    def __init__(self, bound: MemoryBound) -> None:
        self._bound = bound
        self._values: dict[Key, Value] = {}

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._values)

    def get(self, key: Key) -> Value | None:
        """What is kept under a key."""
        return self._values.get(key)

    def keep(self, key: Key, value: Value) -> None:
        """Keep a value in place of what the key had, if there is room; else nothing changes."""
        before = self._values.get(key)
        more = value.nbytes - (0 if before is None else before.nbytes)
        if self._bound.held + more <= self._bound.limit:
            self._values[key] = value
            self._bound.held += more

    def drop(self, key: Key) -> None:
        """Forget what is kept under a key, if anything is."""
        value = self._values.pop(key, None)
        if value is not None:
            self._bound.held -= value.nbytes

    def clear(self) -> None:
        """Forget all."""
        for key in list(self._values):
            self.drop(key)
