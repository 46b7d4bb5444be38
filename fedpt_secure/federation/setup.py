"""The models of a run: the small LM under its adapter, and the black box, loaded only when it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fedpt_secure.config import RunConfig
from fedpt_secure.data import Cache
from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.lm.devices import resolve_device
from fedpt_secure.lm.large_weights import LargeWeights, resolve_large
from fedpt_secure.lm.small import SmallLM, load_base
from fedpt_secure.lm.vocabulary import Vocabulary, load_tokenizer
from fedpt_secure.progress import Progress
from fedpt_secure.proxy import AdapterPair, BlackBoxLM, LocalTransformersLM, guard


@dataclass(slots=True)
class RunModels:
    """What a run computes with.

    Attributes:
        tokenizer: the large model's; it cuts all text.
        pair: the small LM with its adapter off and on.
        weights: where the large model's files are and where they came from.
    """

    tokenizer: TextTokenizer
    vocabulary: Vocabulary
    small: SmallLM
    pair: AdapterPair
    weights: LargeWeights
    device: torch.device
    _black_box: BlackBoxLM | None = field(default=None)

    def black_box(self, progress: Progress) -> BlackBoxLM:
        """The large model behind its checks; loaded on the first call."""
        if self._black_box is None:
            with progress.task("loading the large LM", None):
                self._black_box = guard(LocalTransformersLM(self.weights.path, device=self.device))
        return self._black_box


def load_models(config: RunConfig, *, cache: Cache, progress: Progress) -> RunModels:
    """Load the small LM and attach a fresh adapter; find (or fetch) the large LM's files.

    Raises:
        ModelError: weights missing, corrupt, or of different tokenizers.
    """
    weights = resolve_large(config.models.large, cache=cache, progress=progress)
    backend = load_tokenizer(weights.path / "tokenizer.json")
    vocabulary = Vocabulary.from_tokenizer(backend)
    tokenizer = TextTokenizer(backend, separator_id=vocabulary.separator_id)
    device = resolve_device(config.models.device)
    small = SmallLM(load_base(config.models.small, vocabulary), config.lora, seed=config.seed, device=device)
    return RunModels(
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        small=small,
        pair=AdapterPair(small.model, small.token_map),
        weights=weights,
        device=device,
    )
