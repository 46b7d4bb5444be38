"""Many continuations at once: rows join a running batch, advance together, and leave it when they end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fedpt_secure.errors import BlackBoxError, ConfigError, ModelError
from fedpt_secure.proxy.answer_text import AnswerText
from fedpt_secure.proxy.arithmetic import spread_logprobs
from fedpt_secure.proxy.black_box import BlackBoxLM, Session, check_request, guard
from fedpt_secure.proxy.continuation_row import EngineCounts, Request, Row, TokenEvent
from fedpt_secure.proxy.drafting import Draft, Drafter
from fedpt_secure.proxy.lane import Lane
from fedpt_secure.proxy.sampling import draw, shaped
from fedpt_secure.proxy.small_pair import SmallPair, SmallSession
from fedpt_secure.proxy.speculation import Speculation, accept
from fedpt_secure.proxy.steering import SteeringRule, steered_logprobs

_Result = TypeVar("_Result")


class DecodingEngine:
    """Continuations of a proxied large model in one batch. Used by one thread at a time.

    Guarantees: a row's tokens depend on its request alone, beyond rounding: neither on the other rows nor on when it
    joined. Without speculation a row takes one random number a token from its own seed. With speculation the tokens are
    others, the distribution is the same (`proxy.speculation`); at temperature 0 the tokens are the same.
    A model that no row needs is not run. After an error in `step` all rows are gone, and new ones can be added.

    Args:
        black_box: the large model; must return the full vocabulary.
        small: base and tuned small LM; None only where no request's rule needs it.
        decode: the text of some large ids (`TextTokenizer.text`); needed for stop strings and for text in the events.
        speculation: guess several tokens per call; needs a black box with `draft_scoring`.
        largest_batch: most rows at once; further requests wait. The black box's own limit holds too.
    """

    def __init__(
        self,
        black_box: BlackBoxLM,
        small: SmallPair | None,
        *,
        decode: Callable[[Sequence[int]], str] | None = None,
        speculation: Speculation | None = None,
        largest_batch: int = 32,
    ) -> None:
        self._box = guard(black_box)
        abilities = self._box.capabilities
        if speculation is not None and not abilities.draft_scoring:
            raise BlackBoxError(
                "this black box cannot score several tokens of a continuation in one call",
                hint="decode without speculation",
            )
        if largest_batch < 1:
            raise ConfigError(f"largest_batch is {largest_batch}; it must be at least 1")
        self._small = small
        self._decode = decode
        self._largest_batch = min(largest_batch, abilities.largest_batch or largest_batch)
        self._ends = frozenset(self._box.vocabulary.end_ids)
        self._large_lane: Lane[Session] = Lane(self._box.start, list)
        self._small_lane: Lane[SmallSession] | None = Lane(small.start, small.token_map.to_small) if small else None
        self._drafter = Drafter(speculation, small, self._small_lane) if speculation is not None else None
        # While a remote model is waited for, this process computes the small one.
        self._beside = ThreadPoolExecutor(1, "large-lm") if abilities.remote else None
        self._rows: dict[int, Row] = {}
        self._waiting: dict[int, Row] = {}
        self._next_handle = 0
        self.counts = EngineCounts()

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and continuation together, for a request that both models work on."""
        large = self._box.capabilities.context_length
        return large if self._small is None else min(large, self._small.context_length)

    @property
    def handles(self) -> tuple[int, ...]:
        """Requests that have not ended, in the order they came."""
        return (*self._rows, *self._waiting)

    def add(self, request: Request, sampling_rng: np.random.Generator | None = None) -> int:
        """Queue a request; the next step with room takes it in.

        Args:
            request: checked before anything is computed.
            sampling_rng: in place of a generator from the request's seed.

        Returns:
            The handle that its events carry.

        Raises:
            ConfigError: the rule needs a small LM and there is none, the first place is negative, or there are stop
                strings and no decoder.
            BlackBoxError: the black box's context is too short, or the prompt holds ids that are not its own.
            ModelError: the small LM's context is too short.
        """
        settings = request.settings
        answer = AnswerText(self._decode, settings.stop) if self._decode else None
        row = Row(request, sampling_rng or np.random.default_rng(settings.seed), answer)
        self._check(row)
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self._waiting[handle] = row
        return handle

    def remove(self, handle: int) -> None:
        """Forget a request; nothing happens if it has ended already."""
        self._waiting.pop(handle, None)
        self._rows.pop(handle, None)

    def step(self) -> list[TokenEvent]:
        """Take in waiting requests and choose the first token of each, or else advance every row.

        Rows that end are left out of the batch from the next step on. No events only where there is nothing to do.

        Raises:
            BlackBoxError, ModelError: a model failed; all rows that were taken in are gone.
        """
        try:
            living = self._rows
            self._large_lane.keep_only(living)
            if self._small_lane is not None:
                self._small_lane.keep_only(living)
            if self._waiting and len(self._rows) < self._largest_batch:
                events = self._take_in()
            elif not self._rows:
                return []
            else:
                events = self._speculate(self._drafter) if self._drafter is not None else self._advance()
        except BaseException:
            # One model may be ahead of the other now; no row can go on.
            self._rows = {}
            self._large_lane.keep_only(())
            if self._small_lane is not None:
                self._small_lane.keep_only(())
            raise
        for event in events:
            if event.ending is not None:
                del self._rows[event.handle]
        return events

    def run(self, requests: Iterable[Request]) -> Iterator[TokenEvent]:
        """Add requests and step until all that were added have ended. Handles count up in the requests' order."""
        for request in requests:
            self.add(request)
        while self.handles:
            yield from self.step()

    def close(self) -> None:
        """End the thread that waits for a remote model."""
        if self._beside is not None:
            self._beside.shutdown()

    def _check(self, row: Row) -> None:
        request = row.request
        if request.first_place < 0:
            raise ConfigError(f"first_place is {request.first_place}; the first token of a text has place 0")
        if request.settings.stop and self._decode is None:
            raise ConfigError("there are stop strings, but the engine has no decoder to make text of tokens")
        check_request(request.prompt, 0, self._box.capabilities, self._box.vocabulary)
        length = len(request.prompt) + request.settings.max_new_tokens
        hint = "ask for fewer new tokens or give a shorter prompt"
        if request.voice == "steered" and length > self._box.capabilities.context_length:
            raise BlackBoxError(
                f"{len(request.prompt)} prompt tokens and {request.settings.max_new_tokens} new ones pass the black"
                f" box's context of {self._box.capabilities.context_length}",
                hint=hint,
            )
        if not row.needs_small:
            return
        if self._small is None:
            raise ConfigError(
                f"alpha is {request.settings.rule.alpha}, but there is no small LM to steer by",
                hint="set alpha to 0 and leave out the shares",
            )
        if length > self._small.context_length:
            raise ModelError(
                f"{len(request.prompt)} prompt tokens and {request.settings.max_new_tokens} new ones pass the small"
                f" LM's context of {self._small.context_length}",
                hint=hint,
            )

    def _take_in(self) -> list[TokenEvent]:
        room = self._largest_batch - len(self._rows)
        fresh = {handle: self._waiting.pop(handle) for handle in list(self._waiting)[:room]}
        self._rows |= fresh
        prompts = {handle: row.request.prompt for handle, row in fresh.items()}
        asked = {handle: prompt for handle, prompt in prompts.items() if fresh[handle].request.voice != "small"}
        helped = {handle: prompt for handle, prompt in prompts.items() if fresh[handle].needs_small}
        return self._choose_next(
            list(fresh), lambda: self._large_lane.join(asked), lambda lane: lane.join(helped), len(asked)
        )

    def _advance(self) -> list[TokenEvent]:
        pending = {handle: row.tokens[-1] for handle, row in self._rows.items()}
        return self._choose_next(
            list(self._rows),
            lambda: self._large_lane.append(pending),
            lambda lane: lane.append(pending),
            len(self._large_lane.handles),
        )

    def _choose_next(
        self,
        handles: Sequence[int],
        bring_large_up: Callable[[], None],
        bring_small_up: Callable[[Lane[SmallSession]], None],
        asked: int,
    ) -> list[TokenEvent]:
        def large() -> Tensor | None:
            bring_large_up()
            return self._large_lane.session.logprobs() if asked else None

        def small() -> tuple[Tensor, Tensor] | None:
            if self._small_lane is None:
                return None
            bring_small_up(self._small_lane)
            return self._small_lane.session.logprobs() if self._small_lane.handles else None

        large_answers, small_answers = self._side_by_side(large, small)
        self._count(asked, asked)
        large_rows = _by_handle(self._large_lane, large_answers)
        sides = small_answers or (None, None)
        base_rows, tuned_rows = (_by_handle(self._small_lane, side) for side in sides)
        alone = {handle: large_rows[handle] for handle in handles if handle in large_rows}
        answers = self._answers(handles, alone, base_rows, tuned_rows)
        return [self._chosen(handle, answers[handle], alone.get(handle)) for handle in handles]

    def _answers(
        self,
        handles: Sequence[int],
        alone: dict[int, Tensor],
        base: dict[int, Tensor],
        tuned: dict[int, Tensor],
    ) -> dict[int, Tensor]:
        """What each row's voice says about its next token, `[V]`; rows of one rule in one computation."""
        found: dict[int, Tensor] = {}
        steered: dict[SteeringRule, list[int]] = {}
        for handle in handles:
            row = self._rows[handle]
            if row.request.voice == "small" and self._small is not None:
                found[handle] = spread_logprobs(tuned[handle], self._small.token_map)
            elif row.needs_small:
                steered.setdefault(row.request.settings.rule, []).append(handle)
            else:
                found[handle] = alone[handle]
        for rule, group in steered.items():
            sides = [torch.stack([side[handle] for handle in group]) for side in (alone, base, tuned)]
            places = [self._rows[handle].request.first_place + len(self._rows[handle].tokens) for handle in group]
            found |= dict(zip(group, self._steer(sides[0], sides[1], sides[2], rule, places), strict=True))
        return found

    def _steer(self, large: Tensor, base: Tensor, tuned: Tensor, rule: SteeringRule, places: Sequence[int]) -> Tensor:
        if self._small is None:
            raise LookupError("rows that need the small LM are refused without one")
        base, tuned = base.to(large.device), tuned.to(large.device)
        return steered_logprobs(
            large, base, tuned, self._small.token_map, rule, torch.tensor(places, device=large.device)
        )

    def _speculate(self, drafter: Drafter) -> list[TokenEvent]:
        """One call of the large model for several tokens of each row."""
        drafts = drafter.drafts(self._rows)
        scores: dict[int, Tensor] = {}
        if self._large_lane.handles:
            blocks = {handle: [row.tokens[-1], *drafts[handle].ids] for handle, row in self._rows.items()}
            answers = self._large_lane.session.score_draft(self._large_lane.blocks(blocks))
            # What comes before the pending token is known already.
            scores = {handle: answer[1:] for handle, answer in zip(self._large_lane.handles, answers, strict=True)}
            self._count(len(self._large_lane.handles), sum(len(drafts[handle].ids) for handle in scores), drafts=True)
        events: list[TokenEvent] = []
        accepted: dict[int, int] = {}
        for handle, draft in drafts.items():
            accepted[handle] = self._settle(handle, draft, scores.get(handle), events)
        if self._large_lane.handles:
            self._large_lane.session.keep([1 + accepted[handle] for handle in self._large_lane.handles])
        if self._small_lane is not None and self._small_lane.handles:
            self._small_lane.session.rewind(
                [len(drafts[handle].ids) - accepted[handle] for handle in self._small_lane.handles]
            )
        return events

    def _settle(self, handle: int, draft: Draft, large: Tensor | None, events: list[TokenEvent]) -> int:
        """Accept a beginning of a row's draft and choose one more token; how many were accepted."""
        row = self._rows[handle]
        settings = row.request.settings
        accepted = examined = 0
        while True:
            alone = large[accepted] if large is not None else None
            sides = draft.small[accepted] if draft.small else None
            answer = self._answers(
                [handle],
                {} if alone is None else {handle: alone},
                {} if sides is None else {handle: sides[0]},
                {} if sides is None else {handle: sides[1]},
            )[handle]
            target = shaped(answer, settings, row.penalised)
            if accepted == len(draft.ids):
                events.append(self._taken(handle, draw(target, row.sampling_rng), answer, alone))
                break
            examined += 1
            kept, token = accept(target, draft.ids[accepted], draft.guessed_by[accepted], row.sampling_rng)
            events.append(self._taken(handle, token, answer, alone))
            if not kept:
                break
            accepted += 1
            if events[-1].ending is not None:
                break
        if draft.ids:
            rate = row.rates.lookup if draft.from_lookup else row.rates.small
            rate.update(accepted=accepted, examined=examined)
            self.counts.accepted += accepted
        return accepted

    def _taken(self, handle: int, token: int, answer: Tensor, alone: Tensor | None) -> TokenEvent:
        row = self._rows[handle]
        self.counts.tokens += row.request.voice != "small"
        return row.take(handle, token, answer, alone, self._ends)

    def _chosen(self, handle: int, answer: Tensor, alone: Tensor | None) -> TokenEvent:
        row = self._rows[handle]
        token = draw(shaped(answer, row.request.settings, row.penalised), row.sampling_rng)
        return self._taken(handle, token, answer, alone)

    def _side_by_side(
        self, large: Callable[[], _Result], small: Callable[[], tuple[Tensor, Tensor] | None]
    ) -> tuple[_Result, tuple[Tensor, Tensor] | None]:
        if self._beside is None:
            return large(), small()
        waiting = self._beside.submit(large)
        try:
            small_answers = small()
        except BaseException:
            waiting.exception()  # the session must be at rest before anybody goes on
            raise
        return waiting.result(), small_answers

    def _count(self, rows: int, scored: int, *, drafts: bool = False) -> None:
        self.counts.large_calls += rows > 0
        self.counts.row_calls += rows
        if drafts:
            self.counts.drafted += scored


def _by_handle(lane: Lane[Session] | Lane[SmallSession] | None, rows: Tensor | None) -> dict[int, Tensor]:
    return {} if lane is None or rows is None else dict(zip(lane.handles, rows, strict=True))
