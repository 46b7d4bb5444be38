"""A black box that runs here: a Transformers causal LM from a local directory.

The weights lie in this process, but only log-probabilities leave this class: it offers what an API would and computes
without gradients, so whatever works with it works with a model that is really out of reach.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from fedpt_secure.errors import BlackBoxError, ModelError
from fedpt_secure.lm.vocabulary import Vocabulary
from fedpt_secure.proxy.black_box import Capabilities
from fedpt_secure.proxy.causal_lm import (
    CachedContinuation,
    context_length,
    forward_keywords,
    log_distribution,
    score_batches,
)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LocalTransformersLM:
    """`BlackBoxLM` over a directory with `config.json`, `tokenizer.json` and safetensors weights.

    Guarantees: no gradient is ever recorded; answers are float32 and normalised over the real tokens, whatever dtype
    the model runs in and however wide its output layer is padded; no code from the directory is run and nothing is
    fetched from a network.

    Args:
        path: the model's directory.
        device: where it runs.
        dtype: the arithmetic of the model. `bfloat16` halves the memory and changes the loss in the third digit
            (docs/proxy.md has the figures), so it is chosen by name only.
        batch_tokens: positions per forward pass; bounds the memory to about `8 * batch_tokens * V` bytes beside the
            weights.
        adapter: directory of a LoRA adapter in PEFT's format that is merged into the weights: a model tuned directly.

    Raises:
        ModelError: files are missing or corrupt, weights are absent or of another shape, the adapter does not fit, or
            the output layer is narrower than the vocabulary.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch_tokens: int = 1024,
        adapter: Path | None = None,
    ) -> None:
        self._vocabulary = Vocabulary.from_file(path / "tokenizer.json")
        model = load_causal_lm(path, _DTYPES[dtype], adapter=adapter)
        width = model.get_output_embeddings().weight.shape[0]
        if width < self._vocabulary.size:
            raise ModelError(
                f"the model in {path} has {width} output columns for {self._vocabulary.size} tokens",
                hint="its tokenizer.json belongs to another model",
            )
        self._model = model.to(device).eval().requires_grad_(False)
        self._device = device
        self._batch_tokens = batch_tokens
        self._keywords = forward_keywords(model)
        self._capabilities = Capabilities(
            full_vocabulary=True,
            largest_top_k=self._vocabulary.size,
            prompt_logprobs=True,
            logit_bias=False,
            context_length=context_length(model.config),
            draft_scoring=True,
        )

    @property
    def capabilities(self) -> Capabilities:
        """Dense answers for whole texts; no logit bias."""
        return self._capabilities

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's tokens."""
        return self._vocabulary

    def score(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """`BlackBoxLM.score`. Neighbours share a batch, so put sequences of similar length next to each other."""
        scores = score_batches(self._forward, sequences, batch_tokens=self._batch_tokens, device=self._device)
        for logits in scores:
            yield log_distribution(logits, self._vocabulary.size)

    def start(self, prompts: Sequence[Sequence[int]]) -> _LocalSession:
        """`BlackBoxLM.start`, with a key-value cache."""
        if not prompts or not all(prompts):
            raise BlackBoxError("a continuation needs a prompt of at least one token")
        continuation = CachedContinuation(
            self._forward, self._model.config, prompts, device=self._device, keywords=self._keywords
        )
        return _LocalSession(continuation, self._vocabulary.size)

    def _forward(self, **inputs: Any) -> Any:
        with torch.no_grad():  # answers of inference mode could not be changed in place by whoever gets them
            return self._model(**inputs)


class _LocalSession:
    def __init__(self, continuation: CachedContinuation, size: int) -> None:
        self._continuation = continuation
        self._size = size

    def logprobs(self) -> Tensor:
        return log_distribution(self._continuation.logits, self._size)

    def append(self, ids: Sequence[int]) -> None:
        self._continuation.append(ids)

    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        self._continuation.join(prompts)

    def select(self, rows: Sequence[int]) -> None:
        self._continuation.select(rows)

    def score_draft(self, drafts: Sequence[Sequence[int]]) -> list[Tensor]:
        return [log_distribution(logits[0], self._size) for logits in self._continuation.score(drafts)]

    def keep(self, counts: Sequence[int]) -> None:
        self._continuation.keep(counts)


def load_causal_lm(path: Path, dtype: torch.dtype, *, adapter: Path | None = None) -> Any:
    """The model of a directory, complete or not at all; with a LoRA adapter merged in where one is given.

    Raises:
        ModelError: files are missing or corrupt, weights are absent or of another shape, or the adapter does not fit.
    """
    hint = "copy or convert the model again; it needs config.json and *.safetensors"
    try:
        with _quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"cannot load the language model in {path}: {reason}", hint=hint) from error
    model, report = loaded
    # Transformers fills absent weights with random ones and only logs it: such a model would answer with noise.
    for what in ("missing_keys", "mismatched_keys"):
        if report[what]:
            first = sorted(map(str, report[what]))[0]
            raise ModelError(
                f"the weights in {path} are incomplete: {what.replace('_', ' ')}, first {first}", hint=hint
            )
    return model if adapter is None else _merged(model, adapter)


def _merged(model: Any, adapter: Path) -> Any:
    """The model with a LoRA adapter added to its weights."""
    try:
        with warnings.catch_warnings():
            # PEFT reads a name that Transformers deprecates.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            # A key the adapter lacks or has too much is a warning of PEFT's; here it means another model.
            warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
            return PeftModel.from_pretrained(model, str(adapter), local_files_only=True).merge_and_unload()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, UserWarning) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the adapter in {adapter} does not fit the language model: {reason}", hint="it belongs to another model"
        ) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep Transformers' own bars and reports off the terminal while it loads."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
