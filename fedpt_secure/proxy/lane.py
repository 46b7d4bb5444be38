"""One model's session within a batch whose rows come and go, and which row of it belongs to whom."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Generic, Protocol, TypeVar


class Rows(Protocol):
    """What the sessions of the large and of the small LM have in common."""

    def append(self, ids: Sequence[int]) -> None: ...

    def join(self, prompts: Sequence[Sequence[int]]) -> None: ...

    def select(self, rows: Sequence[int]) -> None: ...

    def keep(self, counts: Sequence[int]) -> None: ...


SessionType = TypeVar("SessionType", bound=Rows)


class Lane(Generic[SessionType]):
    """A session that is there while it has rows.

    Args:
        start: begins a session from prompts in the model's own ids.
        ids_of: the model's own ids of large ids.

    Attributes:
        handles: whose rows they are, in the session's order.
    """

    def __init__(
        self,
        start: Callable[[Sequence[Sequence[int]]], SessionType],
        ids_of: Callable[[Sequence[int]], Sequence[int]],
    ) -> None:
        self._start = start
        self._ids_of = ids_of
        self._session: SessionType | None = None
        self.handles: list[int] = []

    @property
    def session(self) -> SessionType:
        """The session; ask only where there are `handles`."""
        if self._session is None:
            raise LookupError("a lane without rows has no session")
        return self._session

    def join(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """Add rows, by handle."""
        if not prompts:
            return
        texts = [self._ids_of(prompt) for prompt in prompts.values()]
        if self._session is None:
            self._session = self._start(texts)
        else:
            self._session.join(texts)
        self.handles += prompts

    def append(self, tokens: Mapping[int, int]) -> None:
        """Extend every row by its token."""
        if self.handles:
            self.session.append(self._ids_of([tokens[handle] for handle in self.handles]))

    def blocks(self, tokens: Mapping[int, Sequence[int]]) -> list[Sequence[int]]:
        """Each row's tokens in the model's own ids; none for a row that is not named."""
        return [self._ids_of(tokens.get(handle, ())) for handle in self.handles]

    def keep_only(self, living: Collection[int]) -> None:
        """Forget the rows of all others."""
        kept = [place for place, handle in enumerate(self.handles) if handle in living]
        if len(kept) == len(self.handles):
            return
        self.handles = [self.handles[place] for place in kept]
        if kept:
            self.session.select(kept)
        else:
            self._session = None
