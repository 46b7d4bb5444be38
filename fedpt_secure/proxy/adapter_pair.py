"""`SmallPair` from one model: base with the LoRA adapter switched off, tuned with it on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from fedpt_secure.errors import ModelError
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.proxy.causal_lm import (
    CachedContinuation,
    Forward,
    context_length,
    forward_keywords,
    log_distribution,
    score_copies,
)
from fedpt_secure.proxy.folded_adapter import FoldedAdapter
from fedpt_secure.proxy.row_cache import layer_count


class AdapterPair:
    """Base and tuned predictions of a LoRA model, in small token ids.

    Guarantees: the model is left as it was found after every call, whatever happens in between: adapter on, training or
    evaluation mode as before, and the same parameters trainable (PEFT's own switch would make *every* LoRA matrix
    trainable again, also those the run has frozen).

    Args:
        model: a model with one LoRA adapter, active.
        token_map: how its vocabulary sits in the large one; its output layer may be wider (padding).
        batch_tokens: positions per forward pass; bounds the memory to about `8 * batch_tokens * width` bytes.
        one_pass: compute both sides in one pass where that is exact (`proxy.folded_adapter`), else one after the other.

    Raises:
        ModelError: the output layer is narrower than the token map.
    """

    def __init__(
        self, model: PeftModel, token_map: TokenMap, *, batch_tokens: int = 1024, one_pass: bool = True
    ) -> None:
        base: Any = model.get_base_model()
        width = base.get_output_embeddings().weight.shape[0]
        if width < token_map.small_vocabulary_size:
            raise ModelError(
                f"the small LM has {width} output columns;"
                f" the token map has {token_map.small_vocabulary_size} small tokens",
                hint="the token map belongs to another model",
            )
        self._model = model
        self._token_map = token_map
        self._batch_tokens = batch_tokens
        self._config = base.config
        self._keywords = forward_keywords(base)
        self._folded = FoldedAdapter.of(model) if one_pass else None

    @property
    def token_map(self) -> TokenMap:
        """How the small vocabulary sits in the large one."""
        return self._token_map

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and continuation together."""
        return context_length(self._config)

    def score(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """`SmallPair.score`.

        Raises:
            ModelError: a sequence is empty or longer than the context.
        """
        self._check(sequences)
        size = self._token_map.small_vocabulary_size
        passes = [
            score_copies(
                forward, sequences, copies=copies[-1], batch_tokens=self._batch_tokens, device=self._model.device
            )
            for forward, copies in self._passes()
        ]
        for scores in zip(*passes, strict=True):
            base, tuned = (side for sides in scores for side in sides)
            yield log_distribution(base, size), log_distribution(tuned, size)

    def start(self, prompts: Sequence[Sequence[int]]) -> _AdapterSession:
        """`SmallPair.start`, with key-value caches; below the first adapted layer both sides share one.

        Raises:
            ModelError: there is no prompt, or one is empty or longer than the context.
        """
        self._check(prompts)
        runs = [
            CachedContinuation(
                forward,
                self._config,
                prompts,
                device=self._model.device,
                keywords=self._keywords,
                copies=copies,
            )
            for forward, copies in self._passes()
        ]
        return _AdapterSession(runs, self)

    def _passes(self) -> list[tuple[Forward, list[int]]]:
        """One pass for both sides, or one each: the forward, and how many rows its layers compute per row."""
        if self._folded is not None:
            return [(self._both, self._folded.copies)]
        ones = [1] * layer_count(self._config)
        return [(self._base, ones), (self._tuned, ones)]

    def _check(self, sequences: Sequence[Sequence[int]]) -> None:
        if not sequences or not all(sequences):
            raise ModelError("the small LM was given an empty text", hint="open every text with the separator token")
        longest = max(map(len, sequences))
        if longest > self.context_length:
            raise ModelError(
                f"a text of {longest} tokens is longer than the small LM's context of {self.context_length}",
                hint="cut the text to a shorter context length",
            )

    def _both(self, **inputs: Any) -> Any:
        if self._folded is None:
            raise ModelError("this adapter cannot be computed together with its base in one pass")
        with torch.no_grad(), evaluating(self._model):
            return self._folded(**inputs)

    def _base(self, **inputs: Any) -> Any:
        with torch.no_grad(), evaluating(self._model), adapter_off(self._model):
            return self._model(**inputs)

    def _tuned(self, **inputs: Any) -> Any:
        with torch.no_grad(), evaluating(self._model):
            return self._model(**inputs)


class _AdapterSession:
    """`SmallSession` over one pass for both sides, or over one for each; the sides come base first."""

    def __init__(self, runs: list[CachedContinuation], pair: AdapterPair) -> None:
        self._runs = runs
        self._pair = pair
        self._size = pair.token_map.small_vocabulary_size

    def logprobs(self) -> tuple[Tensor, Tensor]:
        base, tuned = log_distribution(torch.cat([run.logits for run in self._runs]), self._size).chunk(2)
        return base, tuned

    def append(self, ids: Sequence[int]) -> None:
        self._require_room([1] * len(ids))
        for run in self._runs:
            run.append(ids)

    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        self._pair._check(prompts)
        for run in self._runs:
            run.join(prompts)

    def select(self, rows: Sequence[int]) -> None:
        for run in self._runs:
            run.select(rows)

    def score_draft(self, drafts: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
        self._require_room(list(map(len, drafts)))
        scored = []
        for sides in zip(*(run.score(drafts) for run in self._runs), strict=True):
            base, tuned = torch.cat(sides)
            scored.append((log_distribution(base, self._size), log_distribution(tuned, self._size)))
        return scored

    def keep(self, counts: Sequence[int]) -> None:
        for run in self._runs:
            run.keep(counts)

    def rewind(self, counts: Sequence[int]) -> None:
        for run in self._runs:
            run.rewind(counts)

    def _require_room(self, added: Sequence[int]) -> None:
        lengths = self._runs[0].lengths
        if any(length + more > self._pair.context_length for length, more in zip(lengths, added, strict=True)):
            raise ModelError(
                "the continuation would pass the small LM's context",
                hint="ask for fewer new tokens or give a shorter prompt",
            )


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Run the base model inside the block. Afterwards the adapter is on and the same parameters are trainable.

    PEFT's `disable_adapter()` inspects the whole model on every call, which a decoding step would feel, and on the way
    out it marks every matrix of the adapter trainable, frozen A matrices included.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    lora: Any = model.base_model
    lora.disable_adapter_layers()
    try:
        yield
    finally:
        lora.enable_adapter_layers()
        for parameter, trainable in flags:
            parameter.requires_grad_(trainable)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode inside the block (no dropout), then in the mode it was in."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()
