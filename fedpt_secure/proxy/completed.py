"""A black box of truncated answers as one of whole distributions: the tail is filled in by the small base LM's shape.

    what the API returned       exact
    the small LM's own favourites, base and tuned, that it did not return      exact where the API scores single tokens
                                                                               (`candidates`; in decoding only)
    every other token           the mass that is left, in the proportions of the small base LM (`top_logprobs.complete`)

The last line is an approximation, and `Capabilities.exact_tokens` says so wherever the result goes; docs/proxy.md has
what it costs in held-out loss by k. The shape is the *base* LM's, which tuning does not change: so the large model's
own arm is the same before and after tuning, and the shift of proxy tuning is not counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from fedpt_secure.errors import BlackBoxError, ConfigError, ModelError
from fedpt_secure.lm.vocabulary import Vocabulary
from fedpt_secure.proxy.arithmetic import spread_logprobs
from fedpt_secure.proxy.black_box import Capabilities, Session
from fedpt_secure.proxy.http_transport import ApiUsage
from fedpt_secure.proxy.small_pair import SmallPair, SmallSession
from fedpt_secure.proxy.top_logprobs import TopLogprobs, complete
from fedpt_secure.proxy.top_source import TopSource

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class CompletedLM:
    """`BlackBoxLM` over a `TopSource` and the small base LM.

    Guarantees: rows are normalised; a returned token keeps the API's probability, up to the normalisation of float32;
    no token the API left out gets probability 0, or more than the least likely returned one.

    Args:
        source: the API.
        small: the small LM; only its base side shapes the tail.
        top_k: how many tokens a position the API is asked for.
        candidates: while decoding, so many of the most likely tokens of the small base and tuned LM are scored one by
            one where the API left them out; a request more per token. 0 switches it off.

    Raises:
        BlackBoxError: more is asked of the API than it can do.
        ModelError: the small LM's map is for another vocabulary.
        ConfigError: a number below its least.
    """

    def __init__(self, source: TopSource, small: SmallPair, *, top_k: int, candidates: int = 0) -> None:
        api = source.capabilities
        if top_k < 1 or candidates < 0:
            raise ConfigError(f"top_k is {top_k}, candidates {candidates}; at least 1 and 0 make sense")
        if top_k > api.largest_top_k:
            raise BlackBoxError(
                f"{top_k} tokens a position were asked for; this API gives {api.largest_top_k}",
                hint="lower api.top_k" if api.largest_top_k else "`generate_biased` steers it by its logit bias",
            )
        if candidates and not api.token_scores:
            raise BlackBoxError(
                "this API scores no tokens of the caller's choice", hint="set api.candidates to 0, or raise api.top_k"
            )
        if small.token_map.large_vocabulary_size != source.vocabulary.size:
            raise ModelError(
                f"the small LM's map is for {small.token_map.large_vocabulary_size} large tokens;"
                f" the black box has {source.vocabulary.size}"
            )
        self._source = source
        self._small = small
        self.top_k = top_k
        self.candidates = candidates
        self._capabilities = replace(
            api,
            full_vocabulary=True,
            exact_tokens=top_k,
            # Waiting for an answer does not leave this process free: the small LM computes, and one model cannot run
            # with its adapter on for one thread and off for another.
            remote=False,
            context_length=min(api.context_length, small.context_length),
        )

    @property
    def capabilities(self) -> Capabilities:
        """The API's, with whole answers of which `exact_tokens` are its own."""
        return self._capabilities

    @property
    def vocabulary(self) -> Vocabulary:
        """The API's."""
        return self._source.vocabulary

    @property
    def usage(self) -> ApiUsage:
        """What was sent so far."""
        return self._source.usage

    def close(self) -> None:
        """Close connections."""
        self._source.close()

    def score(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """`BlackBoxLM.score`; a few texts are asked about ahead of the one that is read."""
        small = self._small.score([self._small.token_map.to_small(sequence) for sequence in sequences])
        tops = ahead(
            lambda text: self._source.last_positions(text, len(text), self.top_k), sequences, self._source.texts_at_once
        )
        for answers, (base, _) in zip(tops, small, strict=True):
            yield self.filled(answers, base)

    def start(self, prompts: Sequence[Sequence[int]]) -> Session:
        """`BlackBoxLM.start`."""
        return _CompletedSession(self, self._source, self._small, prompts)

    def filled(self, answers: Sequence[TopLogprobs], base: Tensor, *, asked: Sequence[TopLogprobs] = ()) -> Tensor:
        """Rows `[len(answers), V]` of answers and small base predictions `[len(answers), v]`.

        `asked` are the API's own answers where `answers` hold more tokens than those.
        """
        rows = torch.empty(len(answers), self.vocabulary.size)
        for row, (answer, plain) in enumerate(zip(answers, asked or answers, strict=True)):
            shape = spread_logprobs(base[row].cpu(), self._small.token_map)
            least = float(plain.logprobs[-1])
            rows[row] = complete(answer, shape, bound=least if least > -torch.inf else None)
        return rows


class _CompletedSession:
    """Rows of ids; the API is asked anew for each step, the small LM keeps its cache while rows only grow."""

    def __init__(self, box: CompletedLM, source: TopSource, small: SmallPair, prompts: Sequence[Sequence[int]]) -> None:
        self._box = box
        self._source = source
        self._pair = small
        self._rows = [list(prompt) for prompt in prompts]
        self._session: SmallSession | None = None
        self._answer: Tensor | None = None
        self._drafts: list[list[int]] = []

    def logprobs(self) -> Tensor:
        if self._answer is None:
            with ThreadPoolExecutor(1) as pool:  # the small LM computes while the API does
                asked = pool.submit(self._source.next_tokens, self._rows, self._box.top_k)
                if self._session is None:
                    self._session = self._pair.start([self._pair.token_map.to_small(row) for row in self._rows])
                base, tuned = self._session.logprobs()
                tops = asked.result()
            answers = [
                self._with_candidates(text, top, (plain, moved))
                for text, top, plain, moved in zip(self._rows, tops, base, tuned, strict=True)
            ]
            self._answer = self._box.filled(answers, base, asked=tops)
        return self._answer

    def append(self, ids: Sequence[int]) -> None:
        for row, token in zip(self._rows, ids, strict=True):
            row.append(token)
        if self._session is not None:
            self._session.append(self._pair.token_map.to_small(list(ids)))
        self._answer = None

    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        self._rows += [list(prompt) for prompt in prompts]
        self._session = self._answer = None

    def select(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[row] for row in rows]
        self._session = self._answer = None

    def score_draft(self, drafts: Sequence[Sequence[int]]) -> list[Tensor]:
        self._drafts = [list(draft) for draft in drafts]
        texts = [row + draft for row, draft in zip(self._rows, self._drafts, strict=True)]
        counts = [len(draft) + 1 for draft in self._drafts]
        tops = ahead(
            lambda item: self._source.last_positions(item[0], item[1], self._box.top_k),
            list(zip(texts, counts, strict=True)),
            self._source.texts_at_once,
        )
        small = self._pair.score([self._pair.token_map.to_small(text) for text in texts])
        return [
            self._box.filled(answers, base[-count:])
            for answers, (base, _), count in zip(tops, small, counts, strict=True)
        ]

    def keep(self, counts: Sequence[int]) -> None:
        for row, draft, count in zip(self._rows, self._drafts, counts, strict=True):
            row += draft[:count]
        self._drafts = []
        self._session = self._answer = None

    def _with_candidates(self, text: Sequence[int], top: TopLogprobs, small: Sequence[Tensor]) -> TopLogprobs:
        count = self._box.candidates
        if not count:
            return top
        returned = set(top.ids.tolist())
        wanted: dict[int, None] = {}
        for side in small:
            spread = spread_logprobs(side.cpu(), self._pair.token_map)
            wanted |= dict.fromkeys(token for token in spread.topk(count).indices.tolist() if token not in returned)
        if not wanted:
            return top
        return top.with_scores(list(wanted), self._source.token_scores(text, list(wanted)))


def ahead(ask: Callable[[_Item], _Result], items: Sequence[_Item], at_once: int) -> Iterator[_Result]:
    """The results of `ask` for each item, in order; `at_once` are under way while one is used."""
    with ThreadPoolExecutor(at_once) as pool:
        waiting: list[Future[_Result]] = [pool.submit(ask, item) for item in items[:at_once]]
        try:
            for item in [*items[at_once:], *[None] * min(at_once, len(items))]:
                yield waiting.pop(0).result()
                if item is not None:
                    waiting.append(pool.submit(ask, item))
        finally:
            for future in waiting:
                future.cancel()
