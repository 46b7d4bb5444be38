"""`Engine` over a black box and a small pair: one forward pass of each model advances all rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedpt_secure.proxy import (
    BlackBoxLM,
    DecodingSettings,
    Session,
    SmallPair,
    SmallSession,
    SteeringRule,
    choose_token,
    guard,
    spread_logprobs,
    steered_logprobs,
)
from fedpt_secure.serving.engine import Choice, Job, LargeAlone


class _Rows(Protocol):
    def append(self, ids: Sequence[int]) -> None: ...
    def join(self, prompts: Sequence[Sequence[int]]) -> None: ...
    def select(self, rows: Sequence[int]) -> None: ...


SessionType = TypeVar("SessionType", bound=_Rows)


class _Lane(Generic[SessionType]):
    """One model's session, and which rows lie in it in what order."""

    def __init__(
        self,
        start: Callable[[Sequence[Sequence[int]]], SessionType],
        ids_of: Callable[[Sequence[int]], Sequence[int]],
    ) -> None:
        self._start = start
        self._ids_of = ids_of
        self.session: SessionType | None = None
        self.rows: list[int] = []

    def join(self, prompts: Mapping[int, Sequence[int]]) -> None:
        if not prompts:
            return
        texts = [list(self._ids_of(prompt)) for prompt in prompts.values()]
        if self.session is None:
            self.session = self._start(texts)
        else:
            self.session.join(texts)
        self.rows += prompts

    def keep_only(self, living: Mapping[int, _Row]) -> None:
        kept = [place for place, row in enumerate(self.rows) if row in living]
        if len(kept) == len(self.rows):
            return
        if not kept or self.session is None:
            self.session, self.rows = None, []
            return
        self.session.select(kept)
        self.rows = [self.rows[place] for place in kept]

    def append(self, tokens: Mapping[int, int]) -> None:
        if self.session is not None:
            self.session.append(self._ids_of([tokens[row] for row in self.rows]))

    def forget(self) -> None:
        self.session, self.rows = None, []


@dataclass(slots=True)
class _Row:
    job: Job
    settings: DecodingSettings
    rng: np.random.Generator
    pending: int | None = None
    produced: int = 0


class BatchEngine:
    """Continuations of a proxied large LM, of the large LM alone and of the tuned small LM alone, in one batch.

    Guarantees: a row's answer depends on its job alone, beyond rounding; a model that no row needs is not run. After a
    failure of a model every row fails, and the engine starts afresh once they have been dropped.

    Args:
        black_box: returns the full vocabulary.
        pair: base and tuned small LM.
    """

    def __init__(self, black_box: BlackBoxLM, pair: SmallPair) -> None:
        self._box = guard(black_box)
        self._pair = pair
        self._ends = frozenset(black_box.vocabulary.end_ids)
        self._large: _Lane[Session] = _Lane(self._box.start, list)
        self._small: _Lane[SmallSession] = _Lane(pair.start, pair.token_map.to_small)
        self._rows: dict[int, _Row] = {}
        self._next = 0
        self._failure: Exception | None = None

    @property
    def context_length(self) -> int:
        """The shorter of the two models' contexts."""
        return min(self._box.capabilities.context_length, self._pair.context_length)

    def admit(self, jobs: Sequence[Job]) -> list[int]:
        """`Engine.admit`."""
        self._take_in_pending()
        fresh = {self._next + place: _opened(job) for place, job in enumerate(jobs)}
        self._next += len(fresh)
        try:
            self._large.join({row: opened.job.prompt for row, opened in fresh.items() if opened.job.arm != "small"})
            self._small.join({row: opened.job.prompt for row, opened in fresh.items() if _needs_small(opened.job)})
        except Exception:
            self._drop_strangers()
            raise
        self._rows |= fresh
        return list(fresh)

    def step(self) -> Mapping[int, Choice]:
        """`Engine.step`."""
        self._take_in_pending()
        large = self._large.session.logprobs() if self._large.session is not None else None
        small = self._small.session.logprobs() if self._small.session is not None else None
        return {
            row: self._choose(self._rows[row], alone, answer)
            for row, (alone, answer) in self._distributions(large, small).items()
        }

    def drop(self, row: int) -> None:
        """`Engine.drop`."""
        del self._rows[row]
        if not self._rows:
            self._large.forget()
            self._small.forget()
            self._failure = None

    def _take_in_pending(self) -> None:
        """Leave out dropped rows, then extend every model's rows by the tokens chosen last."""
        if self._failure is not None:
            raise self._failure
        try:
            self._drop_strangers()
            tokens = {number: row.pending for number, row in self._rows.items() if row.pending is not None}
            if tokens:
                self._large.append(tokens)
                self._small.append(tokens)
            for row in self._rows.values():
                row.pending = None
        except Exception as error:
            # One model may be a token ahead of the other now; no row can go on.
            self._failure = error
            raise

    def _drop_strangers(self) -> None:
        self._large.keep_only(self._rows)
        self._small.keep_only(self._rows)

    def _distributions(
        self, large: Tensor | None, small: tuple[Tensor, Tensor] | None
    ) -> dict[int, tuple[Tensor | None, Tensor]]:
        """For each row what the large LM alone says (where it is asked) and what the row's arm says, `[V]` each."""
        large_at = {row: place for place, row in enumerate(self._large.rows)}
        small_at = {row: place for place, row in enumerate(self._small.rows)}
        found: dict[int, tuple[Tensor | None, Tensor]] = {}
        steered: dict[SteeringRule, list[int]] = {}
        for number, row in self._rows.items():
            if row.job.arm == "small" and small is not None:
                found[number] = (None, spread_logprobs(small[1][small_at[number]], self._pair.token_map))
            elif _needs_small(row.job):
                steered.setdefault(row.job.rule, []).append(number)
            elif large is not None:
                found[number] = (large[large_at[number]], large[large_at[number]])
        for rule, numbers in steered.items():
            if large is None or small is None:
                raise RuntimeError("steered rows without both models")
            alone = large[[large_at[number] for number in numbers]]
            base, tuned = (side[[small_at[number] for number in numbers]].to(alone.device) for side in small)
            rows = [self._rows[number] for number in numbers]
            places = torch.tensor([row.job.first_place + row.produced for row in rows], device=alone.device)
            answers = steered_logprobs(alone, base, tuned, self._pair.token_map, rule, places)
            found |= {number: (alone[place], answers[place]) for place, number in enumerate(numbers)}
        return found

    def _choose(self, row: _Row, alone: Tensor | None, answer: Tensor) -> Choice:
        greedy = row.settings.temperature == 0
        token = int(answer.argmax()) if greedy else choose_token(answer, row.settings, row.rng)
        row.pending = token
        row.produced += 1
        top = torch.topk(answer, min(row.job.top_logprobs, len(answer)))
        return Choice(
            token=token,
            logprob=float(answer[token]),
            top=tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
            alone=_alone(alone, answer, token) if row.job.told_apart and alone is not None else None,
            ends=token in self._ends,
        )


def _needs_small(job: Job) -> bool:
    return job.arm == "small" or (job.arm == "proxied" and job.rule.needs_the_small_lm)


def _opened(job: Job) -> _Row:
    settings = DecodingSettings(
        rule=job.rule, max_new_tokens=job.max_new_tokens, temperature=job.temperature, top_p=job.top_p
    )
    return _Row(job, settings, np.random.default_rng(job.seed))


def _alone(large: Tensor, answer: Tensor, token: int) -> LargeAlone:
    best = int(large.argmax())
    return LargeAlone(
        token=best,
        token_logprob=float(large[best]),
        chosen_logprob=float(large[token]),
        changed=int(answer.argmax()) != best,
    )
