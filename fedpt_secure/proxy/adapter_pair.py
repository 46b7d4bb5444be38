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
    context_length,
    forward_keywords,
    log_distribution,
    score_batches,
)


class AdapterPair:
    """Base and tuned predictions of a LoRA model, in small token ids.

    Guarantees: the model is left as it was found after every call, whatever happens in between: adapter on, training or
    evaluation mode as before, and the same parameters trainable (PEFT's own switch would make *every* LoRA matrix
    trainable again, also those the run has frozen).

    Args:
        model: a model with one LoRA adapter, active.
        token_map: how its vocabulary sits in the large one; its output layer may be wider (padding).
        batch_tokens: positions per forward pass; bounds the memory to about `8 * batch_tokens * width` bytes.

    Raises:
        ModelError: the output layer is narrower than the token map.
    """

    def __init__(self, model: PeftModel, token_map: TokenMap, *, batch_tokens: int = 1024) -> None:
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
        base, tuned = (
            score_batches(forward, sequences, batch_tokens=self._batch_tokens, device=self._model.device)
            for forward in (self._base, self._tuned)
        )
        for base_logits, tuned_logits in zip(base, tuned, strict=True):
            yield log_distribution(base_logits, size), log_distribution(tuned_logits, size)

    def start(self, prompts: Sequence[Sequence[int]]) -> _AdapterSession:
        """`SmallPair.start`, with a key-value cache for either side.

        Raises:
            ModelError: there is no prompt, or one is empty or longer than the context.
        """
        self._check(prompts)
        base, tuned = (
            CachedContinuation(forward, self._config, prompts, device=self._model.device, keywords=self._keywords)
            for forward in (self._base, self._tuned)
        )
        return _AdapterSession(base, tuned, self._token_map.small_vocabulary_size, self)

    def _check(self, sequences: Sequence[Sequence[int]]) -> None:
        if not sequences or not all(sequences):
            raise ModelError("the small LM was given an empty text", hint="open every text with the separator token")
        longest = max(map(len, sequences))
        if longest > self.context_length:
            raise ModelError(
                f"a text of {longest} tokens is longer than the small LM's context of {self.context_length}",
                hint="cut the text to a shorter context length",
            )

    def _base(self, **inputs: Any) -> Any:
        with torch.no_grad(), evaluating(self._model), adapter_off(self._model):
            return self._model(**inputs)

    def _tuned(self, **inputs: Any) -> Any:
        with torch.no_grad(), evaluating(self._model):
            return self._model(**inputs)


class _AdapterSession:
    def __init__(self, base: CachedContinuation, tuned: CachedContinuation, size: int, pair: AdapterPair) -> None:
        self._base = base
        self._tuned = tuned
        self._size = size
        self._pair = pair

    def logprobs(self) -> tuple[Tensor, Tensor]:
        return log_distribution(self._base.logits, self._size), log_distribution(self._tuned.logits, self._size)

    def append(self, ids: Sequence[int]) -> None:
        if max(self._base.lengths) >= self._pair.context_length:
            raise ModelError(
                "the continuation would pass the small LM's context",
                hint="ask for fewer new tokens or give a shorter prompt",
            )
        for side in (self._base, self._tuned):
            side.append(ids)

    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        self._pair._check(prompts)
        for side in (self._base, self._tuned):
            side.join(prompts)

    def select(self, rows: Sequence[int]) -> None:
        for side in (self._base, self._tuned):
            side.select(rows)


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
