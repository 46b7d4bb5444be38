"""The models of a run: the small LM under its adapter, and the black box, loaded only when it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from fedpt_secure.config import ApiConfig, RunConfig
from fedpt_secure.data import Cache
from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.errors import ConfigError, ModelError
from fedpt_secure.lm.base import BUILTIN, BaseLM, builtin_directory, load_base
from fedpt_secure.lm.devices import resolve_device
from fedpt_secure.lm.large_weights import LargeWeights, resolve_endpoint, resolve_large
from fedpt_secure.lm.output_classes import count_classes
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.lm.training_compute import TrainingCompute, training_dtype
from fedpt_secure.lm.vocabulary import Vocabulary, load_tokenizer
from fedpt_secure.progress import Progress
from fedpt_secure.proxy import (
    AdapterPair,
    AnswerCache,
    BlackBoxLM,
    DistillationReport,
    LocalTransformersLM,
    PublicAnswers,
    PublicText,
    SteeringRule,
    TopSource,
    ask_black_box,
    black_box_of,
    connect,
    distil,
    guard,
    usage_document,
)

PASSAGE_SEPARATOR = "\n%%\n"
PUBLIC_PASSAGES = 200
"""Passages of public text that the black box is asked about once; 40 or so tokens each keep the cost to a minute."""


@dataclass(slots=True)
class RunModels:
    """What a run computes with.

    Attributes:
        tokenizer: the large model's; it cuts all text.
        pair: the small LM with its adapter off and on.
        weights: where the large model's files are and where they came from.
        source: the API that the large model is behind, connected and checked; None where it runs here.
    """

    tokenizer: TextTokenizer
    vocabulary: Vocabulary
    small: SmallLM
    pair: AdapterPair
    weights: LargeWeights
    device: torch.device
    cache: Cache
    source: TopSource | None = None
    api: ApiConfig = field(default_factory=ApiConfig)
    _black_box: BlackBoxLM | None = None
    _answers: PublicAnswers | None = None

    def black_box(self, progress: Progress) -> BlackBoxLM:
        """The large model behind its checks; loaded on the first call.

        Raises:
            ModelError: its weights cannot be used.
            BlackBoxError: it is behind an API without log-probabilities.
        """
        if self._black_box is None and self.source is not None:
            self._black_box = guard(black_box_of(self.source, self.api, self.pair, progress=progress))
        if self._black_box is None:
            with progress.task("loading the large LM", None):
                self._black_box = guard(LocalTransformersLM(self.weights.path, device=self.device))
        return self._black_box

    @property
    def shows_logprobs(self) -> bool:
        """Whether the large model shows any log-probabilities; else it can only be steered by its logit bias."""
        return self.source is None or (self.source.capabilities.largest_top_k > 0 and self.api.top_k != 0)

    def black_box_document(self) -> dict[str, Any]:
        """Where the large model is and what was sent to it so far, for reports."""
        return usage_document(self.weights.endpoint, self._black_box, self.source)

    def distil(self, config: RunConfig, round_index: int, progress: Progress) -> DistillationReport:
        """FedPT's last step after a round: teach the tuned small LM what its proxied large LM says on public text."""
        if self._answers is None:
            text = load_public_text(self.tokenizer, context_length=config.models.context_length)
            exact = self.black_box(progress).capabilities.exact_tokens
            completed = "" if exact is None else f", top {exact} completed by {self.small.name}"
            kept = AnswerCache(
                self.cache.root / "answers",
                model=self.weights.digest + completed,
                token_map=self.small.token_map,
                top_k=config.proxy.distill_top_k,
            )
            self._answers = ask_black_box(self.black_box(progress), self.small.token_map, text, kept, progress)
        report = distil(
            self.small.model,
            self._answers,
            rule=SteeringRule.of(config.proxy, responses=False),
            steps=config.proxy.distill_steps,
            learning_rate=config.proxy.distill_learning_rate,
            temperature=config.proxy.distill_temperature,
            seed=config.seed + round_index,
            progress=progress,
        )
        progress.note(
            f"distilled on public text: KL to the proxied large LM {report.divergence_before:.4f} -> "
            f"{report.divergence_after:.4f} nats a position, on a tenth it did not learn from"
        )
        return report


def load_public_text(tokenizer: TextTokenizer, *, context_length: int) -> PublicText:
    """The public text that ships with the built-in proxy, one sequence per passage.

    Raises:
        ModelError: the file is missing.
    """
    sequences = [
        (tokenizer.separator_id, *tokenizer.ids(passage)[: context_length - 1])
        for passage in _public_passages()[:PUBLIC_PASSAGES]
    ]
    return PublicText("sampled from SmolLM2-135M-Instruct (Apache-2.0)", tuple(sequences))


def _public_passages() -> list[str]:
    path = builtin_directory() / "public_text.txt"
    try:
        passages = path.read_text(encoding="utf-8").split(PASSAGE_SEPARATOR)
    except OSError as error:
        raise ModelError(f"the built-in public text is damaged: {error}", hint="reinstall fedpt-secure") from None
    return [passage.strip() for passage in passages if passage.strip()]


@dataclass(frozen=True, slots=True)
class TrainingModels:
    """What a client trains with, and a server that never asks the black box: the small LM, and how text is cut."""

    tokenizer: TextTokenizer
    small: SmallLM


def load_training_models(config: RunConfig, *, cache: Cache, progress: Progress) -> TrainingModels:
    """Load the small LM under a fresh adapter; of the large one no more than its tokenizer, which the small one shares.

    Raises:
        ModelError: weights missing, corrupt, or of different tokenizers.
        FetchError: the tokenizer is only with the large model, which cannot be had.
    """
    backend = load_tokenizer(_tokenizer_folder(config, cache, progress) / "tokenizer.json")
    vocabulary = Vocabulary.from_tokenizer(backend)
    base = load_base(config.models.small, vocabulary)
    _check_contexts(config.models.context_length, base, None, None)
    tokenizer = TextTokenizer(backend, separator_id=vocabulary.separator_id)
    return TrainingModels(tokenizer, _small(config, base, tokenizer, resolve_device(config.models.device)))


def _tokenizer_folder(config: RunConfig, cache: Cache, progress: Progress) -> Path:
    # The large model's own where it lies here: a small LM of other tokens is refused before anybody pays for it.
    for place in (config.models.large, config.api.tokenizer, config.models.small):
        if place is not None and (Path(place) / "tokenizer.json").is_file():
            return Path(place)
    if config.models.small == BUILTIN:
        return builtin_directory()
    if config.models.endpoint is not None:
        return resolve_endpoint(config.models.endpoint, config.api.tokenizer).path
    return resolve_large(config.models.large, cache=cache, progress=progress).path


def _small(config: RunConfig, base: BaseLM, tokenizer: TextTokenizer, device: torch.device) -> SmallLM:
    compute = TrainingCompute(
        training_dtype(config.models.training_dtype, device), config.models.activation_cache_mb * 1_000_000
    )
    classes, counts = config.training.output_classes, None
    if classes is not None or config.lora.output_bias:
        token_map = base.token_map
        public = (token_map.to_small(tokenizer.ids(passage)) for passage in _public_passages())
        counts = count_classes(public, token_map.small_vocabulary_size)
    small = SmallLM(
        base,
        config.lora,
        seed=config.seed,
        device=device,
        compute=compute,
        class_counts=counts,
        classes_by=config.training.output_classes_by,
    )
    small.output_classes(classes, key=b"")  # one that cannot be trained so is refused now, not in a client's round
    return small


def load_models(config: RunConfig, *, cache: Cache, progress: Progress) -> RunModels:
    """Load the small LM and attach a fresh adapter; find (or fetch) the large LM's files, or connect to its API.

    Raises:
        ModelError: weights missing, corrupt, or of different tokenizers; or an API's tokens are not the tokenizer's.
        BlackBoxError: the API does not answer, or cannot do what is asked.
    """
    endpoint = config.models.endpoint
    if endpoint is not None:
        weights = resolve_endpoint(endpoint, config.api.tokenizer)
    else:
        weights = resolve_large(config.models.large, cache=cache, progress=progress)
    backend = load_tokenizer(weights.path / "tokenizer.json")
    vocabulary = Vocabulary.from_tokenizer(backend)
    tokenizer = TextTokenizer(backend, separator_id=vocabulary.separator_id)
    device = resolve_device(config.models.device)
    base = load_base(config.models.small, vocabulary)
    source = None
    if endpoint is not None:
        source = connect(endpoint, config.api, vocabulary, tokenizer, tokenizer_folder=weights.path, progress=progress)
    _check_contexts(config.models.context_length, base, weights, source)
    small = _small(config, base, tokenizer, device)
    return RunModels(
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        small=small,
        pair=AdapterPair(small.model, small.token_map),
        weights=weights,
        device=device,
        cache=cache,
        source=source,
        api=config.api,
    )


def _check_contexts(context_length: int, base: BaseLM, weights: LargeWeights | None, source: TopSource | None) -> None:
    """Both models must hold a whole record, and the small one must treat it alike in every batch."""
    small_positions = getattr(base.model.config, "max_position_embeddings", None)
    if source is not None:
        large_positions: int | None = source.capabilities.context_length
    elif weights is None:
        large_positions = None
    else:
        large_positions = getattr(AutoConfig.from_pretrained(weights.path), "max_position_embeddings", None)
    for name, most in (("small", small_positions), ("large", large_positions)):
        if most is not None and context_length > most:
            raise ConfigError(
                f"context_length is {context_length}, but the {name} LM has {most} positions",
                hint=f"--context-length {most}",
            )
    rope = getattr(base.model.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        raise ModelError(
            f"the small LM's {rope['rope_type']} rotary embedding depends on the longest text of a batch, so that a "
            "record's gradient would depend on other records and no privacy could be proved",
            hint="choose a small LM with plain rotary embeddings",
        )
