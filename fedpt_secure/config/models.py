"""The two language models, the API that one may be behind, and the adapter of the other."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from fedpt_secure.config.settings import Positive, Settings
from fedpt_secure.endpoint import Endpoint
from fedpt_secure.errors import ConfigError


class ModelConfig(Settings):
    """The two language models and where they run."""

    small: str = "builtin"
    """The proxy that clients tune: `builtin`, or a Transformers causal LM (directory or Hugging Face id)."""
    large: str | None = None
    """The black box: nothing for SmolLM2-135M-Instruct, a Transformers directory or Hugging Face id, or an API:
    `llama.cpp:http://127.0.0.1:8080`, `openai:https://host/v1#model-name` (`[api]` has its settings)."""
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:N` or `mps`."""
    context_length: Annotated[int, Field(ge=8, le=8192)] = 128
    """Records are cut to this many tokens."""
    training_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products in a client's training; `auto`: bfloat16 where the processor has it. Gradients are clipped in
    float64 either way, one example a pass (docs/dp_training.md)."""
    activation_cache_mb: Annotated[int, Field(ge=0, le=1_000_000)] = 512
    """Most memory for activations below the first trained module, which no step changes; 0 computes them anew."""

    @field_validator("large")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        try:
            Endpoint.parse(value or "")
        except ConfigError as error:
            raise ValueError(f"{error.message}; {error.hint}") from None
        return value

    @property
    def endpoint(self) -> Endpoint | None:
        """The API that the black box is behind, if it is."""
        return Endpoint.parse(self.large or "")


class ApiConfig(Settings):
    """How a black box behind an API is asked, where `models.large` names one. Keys are read from the environment."""

    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    """Folder with the `tokenizer.json` (and chat template) of the API's model; nothing for the built-in proxy's."""
    key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "FEDPT_API_KEY"
    """Environment variable that holds the key. Another vendor's variable is sent nowhere unless it is named here."""
    top_k: Annotated[int, Field(ge=0)] | None = None
    """Log-probabilities asked for a position; the rest is filled in by the small LM's shape. Nothing for what such an
    API usually grants, 0 for one that has none and is steered by its logit bias (`generate` only)."""
    candidates: Annotated[int, Field(ge=0, le=64)] | None = None
    """While decoding, so many favourites of the small LM are scored one by one where the API left them out; nothing for
    4 where the API can, else 0."""
    context_length: Annotated[int, Field(ge=8)] | None = None
    """Of the API's model, where the API does not tell."""
    plain_http: bool = False
    """Allow plain http to another machine, where everybody on the way reads prompts and key."""
    connect_timeout_s: Positive = 5.0
    read_timeout_s: Positive = 60.0
    """Longest silence within an answer."""
    total_timeout_s: Positive = 300.0
    """Of one attempt, however it drips."""
    attempts: Annotated[int, Field(ge=1, le=100)] = 4
    longest_wait_s: Positive = 60.0
    """Of a back-off, or of what a server asks for by Retry-After; a longer wish is an error."""
    requests_per_second: Positive | None = None
    concurrency: Annotated[int, Field(ge=1, le=256)] = 4
    """Requests under way at once."""


class LoraSettings(Settings):
    """Which weights of the small LM are trained: the B matrices of LoRA; A is public and frozen.

    With A frozen, averaging B over clients is exact (FFA-LoRA, Sun et al. 2024), and half as many
    parameters carry noise.
    """

    rank: Annotated[int, Field(ge=1, le=1024)] = 32
    scale: Positive = 2.0
    """Factor on the adapter's output (PEFT's `lora_alpha / r`)."""
    layers: Annotated[int, Field(ge=0, le=1000)] = 1
    """Train only the last this many layers; 0 for all."""
    modules: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = ("down_proj",)
    """Linear layers that get an adapter. Few trained parameters carry little noise (docs/LOG.md)."""
    directions: Literal["auto", "public", "random"] = "auto"
    """Where A comes from: principal directions of public text, or random; `auto`: public if the small LM has them."""
    whitening: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    """How much the weaker public directions are raised to the energy of the strongest: 0 not at all, 1 fully."""
    output_bias: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    """Train a bias of every output class too, in units of this (`lm.output_bias`): what it takes of the clip norm and
    how fast it moves. Some 0.03; 0 trains none. Classes' public frequencies come from the built-in public text."""
