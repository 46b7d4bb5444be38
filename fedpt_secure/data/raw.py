"""What a source yields before anything is partitioned, deduplicated or split."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fedpt_secure.data.records import Record

EMPTY = "empty"
NOT_TEXT = "not text"
NOT_UNICODE = "not valid Unicode"


@dataclass(frozen=True, slots=True)
class Row:
    """One usable record with whatever the source says about it.

    Attributes:
        record: its text is not blank.
        client_id: the owner; None where the source names none.
        label: the class a Dirichlet partition may skew by.
    """

    record: Record
    client_id: str | None = None
    label: str | None = None


@dataclass(slots=True)
class RawText:
    """All usable rows of a source, in its order, and the count of the others by reason."""

    name: str
    description: str
    rows: list[Row] = field(default_factory=list)
    unusable: Counter[str] = field(default_factory=Counter)
    seen: int = 0

    def add(self, text: Any, *, prompt: Any = "", client_id: str | None = None, label: str | None = None) -> None:
        """Keep a row if text (and prompt, if any is given) is text; count it either way.

        A blank prompt is fine: a response may stand alone. A blank text is not: there would be nothing to learn.
        """
        self.seen += 1
        prompt_fault = _fault(prompt)
        fault = _fault(text) or ("" if prompt_fault == EMPTY else prompt_fault)
        if fault:
            self.unusable[fault] += 1
        else:
            self.rows.append(Row(Record(text, prompt or ""), client_id, label))

    def reject(self, reason: str) -> None:
        """Count a row that cannot be used for a reason other than its text."""
        self.seen += 1
        self.unusable[reason] += 1


def _fault(cell: Any) -> str:
    if cell is None:
        return EMPTY
    if not isinstance(cell, str):
        return NOT_TEXT
    if not cell.strip():
        return EMPTY
    try:
        cell.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and no tokenizer can read
        return NOT_UNICODE
    return ""
