"""A finished run as something that answers: models, names, text in and out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedpt_secure.data import Cache
from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.errors import RunDirectoryError
from fedpt_secure.federation import RunDirectory
from fedpt_secure.federation.setup import load_models
from fedpt_secure.federation.state import released_adapter
from fedpt_secure.lm.vocabulary import load_tokenizer
from fedpt_secure.progress import Progress
from fedpt_secure.proxy import DecodingEngine, SteeringRule
from fedpt_secure.serving.chat import ChatFormat, Message, load_chat_format
from fedpt_secure.serving.engine import Arm, Engine
from fedpt_secure.serving.errors import ApiError
from fedpt_secure.serving.token_text import TokenText


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to continue, and the place of the first new token in its text (`proxy.steering`)."""

    ids: tuple[int, ...]
    first_place: int
    response: bool
    """Whether it is answered, as a prompt is, and not continued."""


@dataclass(frozen=True)
class ServedRun:
    """What the HTTP side needs of a run.

    Attributes:
        rule: how the run steers texts that are continued; response_rule: how responses to a prompt.
        created: when the run was finished, seconds since 1970.
        privacy: the content of `privacy.json`; None for a run that has not been finished.
        engine: computes; used by one thread.
        tokenizer: cuts prompts; no text becomes a control token.
        token_text: reads answers.
        chat: the large model's chat format; None where it has none.
        vocabulary_size: of the large model.
        large_model_at: where prompts and answers are sent to, if the large model does not run here.
    """

    rule: SteeringRule
    response_rule: SteeringRule
    created: int
    privacy: dict[str, Any] | None
    engine: Engine
    tokenizer: TextTokenizer
    token_text: TokenText
    chat: ChatFormat | None
    vocabulary_size: int
    large_model_at: str | None = None

    def rule_at(self, alpha: float | None, prompt: Prompt) -> SteeringRule:
        """The run's rule for such a prompt, turned to another strength where one is given (0: the large model)."""
        rule = self.response_rule if prompt.response else self.rule
        return rule if alpha is None else rule.at_strength(alpha)

    def text_prompt(self, prompt: str) -> Prompt:
        """A plain text to continue, opened by the separator as in training."""
        ids = self.tokenizer.ids(prompt)
        return Prompt((self.tokenizer.separator_id, *ids), first_place=len(ids), response=False)

    def id_prompt(self, prompt: Sequence[int]) -> Prompt:
        """Token ids of the caller's, as they are; a separator in front does not count as text.

        Raises:
            ApiError: there is none, or one is not in the vocabulary.
        """
        if not prompt:
            raise ApiError(400, "a prompt of token ids is empty", param="prompt")
        for token in prompt:
            if not 0 <= token < self.vocabulary_size:
                raise ApiError(
                    400, f"{token} is not one of the model's {self.vocabulary_size} token ids", param="prompt"
                )
        first_place = len(prompt) - (prompt[0] == self.tokenizer.separator_id)
        return Prompt(tuple(prompt), first_place=first_place, response=False)

    def chat_prompt(self, messages: Sequence[Message]) -> Prompt:
        """A conversation in the large model's own chat format.

        Raises:
            ApiError: the model has none.
            ConfigError: its template does not take these messages.
        """
        if self.chat is None:
            raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
        return Prompt(tuple(self.chat.ids(messages)), first_place=0, response=True)


ARM_SUFFIXES: dict[str, Arm] = {"": "proxied", ":large": "large", ":small": "small"}


def arm_of(model: str, name: str) -> Arm:
    """Who answers under a model name of the API.

    Raises:
        ApiError: 404 for a name that is none.
    """
    arms = {name + suffix: arm for suffix, arm in ARM_SUFFIXES.items()}
    if model not in arms:
        raise ApiError(404, f"no such model; this server has {', '.join(arms)}", param="model", code="model_not_found")
    return arms[model]


def load_run(directory: RunDirectory, *, batch_rows: int, cache: Cache, progress: Progress) -> ServedRun:
    """Load a run's models, the large one too, or connect to it.

    Args:
        directory: of the run; it is only read.
        batch_rows: most answers that one forward pass advances.
        cache: where weights are.
        progress: is told what is loaded, and where prompts will be sent.

    Raises:
        RunDirectoryError: the run has no checkpoint yet, or is damaged.
        ModelError: weights, tokenizer or chat template cannot be used.
        ConfigError: a setting of the run is not acceptable here.
    """
    config = directory.config()
    checkpoint = directory.load_checkpoint()
    if checkpoint is None:
        raise RunDirectoryError(f"{directory.path} has no checkpoint yet", hint="let it finish a round first")
    models = load_models(config, cache=cache, progress=progress)
    models.small.load_adapter_vector(released_adapter(checkpoint, config))
    black_box = models.black_box(progress)
    large_model_at = models.weights.source if models.source is not None else None
    if large_model_at is not None:
        progress.note(f"every prompt and answer is sent to {large_model_at}")
    spelling = load_tokenizer(models.weights.path / "tokenizer.json")
    spelling.no_truncation()
    spelling.no_padding()
    privacy_path = directory.path / "privacy.json"
    return ServedRun(
        rule=SteeringRule.of(config.proxy, responses=False),
        response_rule=SteeringRule.of(config.proxy, responses=True),
        created=int((directory.path / "checkpoint" / "state.safetensors").stat().st_mtime),
        privacy=directory.read_json(privacy_path) if privacy_path.exists() else None,
        engine=DecodingEngine(black_box, models.pair, largest_batch=batch_rows),
        tokenizer=models.tokenizer,
        token_text=TokenText(spelling),
        chat=load_chat_format(models.weights.path, models.tokenizer, spelling),
        vocabulary_size=black_box.vocabulary.size,
        large_model_at=large_model_at,
    )
