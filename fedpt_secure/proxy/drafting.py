"""Guesses for the rows of a batch, and what the small LM says along them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedpt_secure.proxy.continuation_row import Row
from fedpt_secure.proxy.lane import Lane
from fedpt_secure.proxy.sampling import Distribution, draw, point, shaped
from fedpt_secure.proxy.small_pair import SmallPair, SmallSession
from fedpt_secure.proxy.speculation import Speculation, look_up


@dataclass(slots=True)
class Draft:
    """Guessed tokens, whose guesses they are, and what the small LM says after the pending token and each of them."""

    ids: list[int] = field(default_factory=list)
    guessed_by: list[Distribution] = field(default_factory=list)
    from_lookup: bool = False
    small: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Drafter:
    """Makes drafts for rows whose last token is not yet in the small LM's session; reads it and the draft into it.

    A row's draft depends on the row alone: its text, its random numbers, and how its earlier drafts fared.

    Args:
        speculation: how much is guessed.
        small: None where no row needs the small LM; drafts are then looked up only.
        lane: the small LM's session.
    """

    def __init__(self, speculation: Speculation, small: SmallPair | None, lane: Lane[SmallSession] | None) -> None:
        self._speculation = speculation
        self._small = small
        self._lane = lane

    def drafts(self, rows: Mapping[int, Row]) -> dict[int, Draft]:
        """A guess for each row, none longer than what it may still say after its pending token and one more."""
        drafts = {handle: self._looked_up(row) for handle, row in rows.items()}
        lane = self._lane
        if lane is None or not lane.handles:
            return drafts
        self._extend({handle: [rows[handle].tokens[-1], *drafts[handle].ids] for handle in lane.handles}, drafts)
        wanted = {handle: self._small_length(rows[handle], drafts[handle]) for handle in lane.handles}
        while guessing := [handle for handle in lane.handles if len(drafts[handle].ids) < wanted[handle]]:
            for handle in guessing:
                row, draft = rows[handle], drafts[handle]
                guess = self._small_guess(draft.small[-1][1], row, draft)
                draft.guessed_by.append(guess)
                draft.ids.append(draw(guess, row.sampling_rng))
            self._extend({handle: [drafts[handle].ids[-1]] for handle in guessing}, drafts)
        return drafts

    def _extend(self, tokens: dict[int, list[int]], drafts: dict[int, Draft]) -> None:
        """Let the small LM read some tokens, for now, and note what it says after each of them."""
        if self._lane is None:
            return
        blocks = self._lane.blocks(tokens)
        answers = self._lane.session.score_draft(blocks)
        self._lane.session.keep([len(block) for block in blocks])
        for handle, (base, tuned) in zip(self._lane.handles, answers, strict=True):
            drafts[handle].small += zip(base[1:], tuned[1:], strict=True)

    def _looked_up(self, row: Row) -> Draft:
        wanted = self._speculation
        longest = self._longest_draft(row)
        if not wanted.lookup or longest < 1:
            return Draft()
        length = row.rates.lookup.best_length(longest, wanted.lookup_cost)
        ids = look_up(row.text, longest=length, shortest_match=wanted.shortest_match)
        return Draft(ids, [point(token) for token in ids], from_lookup=bool(ids))

    def _small_length(self, row: Row, draft: Draft) -> int:
        """How many tokens the small LM shall guess: none behind a lookup, none for its own voice."""
        wanted = self._speculation
        longest = self._longest_draft(row)
        if draft.ids or not wanted.small or longest < 1:
            return 0
        return row.rates.small.best_length(longest, wanted.small_cost)

    def _longest_draft(self, row: Row) -> int:
        if row.request.voice == "small":
            return 0
        return min(self._speculation.longest, row.request.settings.max_new_tokens - len(row.tokens) - 1)

    def _small_guess(self, tuned: Tensor, row: Row, draft: Draft) -> Distribution:
        """The tuned small LM's next token in large ids, shaped as the target is; never the unknown class."""
        if self._small is None:
            raise LookupError("guesses of the small LM are made only where there is one")
        token_map = self._small.token_map
        known = tuned.clone()
        if token_map.unknown_id is not None:
            known[token_map.unknown_id] = -torch.inf
        seen = token_map.to_small([*row.penalised, *draft.ids]) if row.penalised else []
        guess = shaped(known, row.request.settings, seen)
        ids = token_map.small_to_large[guess.ids]
        order = np.argsort(ids)
        return Distribution(ids[order], guess.probabilities[order])
