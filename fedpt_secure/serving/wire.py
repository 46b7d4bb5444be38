"""What clients may send: OpenAI's parameters, each checked; one that would be ignored is refused instead.

Parameters that this server lacks are accepted only with the value that means "not used", because client libraries send
those. `alpha`, `top_k` and `repetition_penalty` are extensions.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedpt_secure.config import Alpha
from fedpt_secure.serving.engine import Arm

Text = Annotated[str, Field(max_length=1 << 24)]
_MOST_STOPS = 4
_LONGEST_STOP = 200


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @field_validator("*")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError("holds half of a surrogate pair, which is no text")
        return value


class StreamOptions(_Wire):
    """What a stream tells beside its text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Sampling(_Wire):
    """Parameters that completions and chat share."""

    model: Text
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    """OpenAI's default, 1, where nothing is said. 0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | list[Text] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    user: Text | None = None
    """Accepted, never stored."""
    alpha: Alpha | None = None
    """Weight of the small LM's shift; the run's where nothing is said. Of the proxy-tuned model only."""
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """Sample from this many most likely tokens; 0 for all."""
    repetition_penalty: Annotated[float, Field(ge=1, le=10)] | None = None
    """Makes tokens less likely that stand in the prompt or the answer; 1 changes nothing."""

    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @field_validator("temperature")
    @classmethod
    def _divides(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < 1e-3:
            raise ValueError("must be 0 or from 0.001 to 2")
        return value

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > _MOST_STOPS or any(not 1 <= len(stop) <= _LONGEST_STOP for stop in stops):
            raise ValueError(f"must be at most {_MOST_STOPS} strings of 1 to {_LONGEST_STOP} characters")
        return value

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> _Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream = true only")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class CompletionRequest(_Sampling):
    """`POST /v1/completions`."""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    """Text, or token ids of the large model's vocabulary; a list of either is a batch."""
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _no_ranking(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported: it must be absent or equal to n")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The batch, a single prompt being a batch of one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class TextPart(_Wire):
    """A part of a message; text only."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Wire):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Literal[""] | None = None
    refusal: None = None

    @property
    def text(self) -> str:
        """The parts together."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(_Wire):
    """Plain text."""

    type: Literal["text"]


class ChatRequest(_Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same: send one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs = true only")
        return self


class CompareRequest(_Wire):
    """`POST /v1/compare`, our own: one prompt, answered by several arms at once."""

    prompt: Text
    chat: bool = False
    """Put the prompt into the model's chat format, as one message of a user."""
    arms: Annotated[list[Arm], Field(min_length=1, max_length=3)] = Field(default_factory=lambda: list(get_args(Arm)))
    alpha: Alpha | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @field_validator("arms")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("names an arm twice")
        return value

    @field_validator("temperature")
    @classmethod
    def _divides(cls, value: float) -> float:
        if 0 < value < 1e-3:
            raise ValueError("must be 0 or from 0.001 to 2")
        return value
