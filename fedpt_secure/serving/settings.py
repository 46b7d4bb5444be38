"""How a run is served: where, to whom, and how much of it at once."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from fedpt_secure.config import Count, Settings
from fedpt_secure.errors import ConfigError
from fedpt_secure.serving.keys import ApiKeys

DEFAULT_LOGPROBS = 5
"""OpenAI's own cap. Log-probabilities of all tokens reveal the tuned small LM exactly (docs/proxy.md)."""

ALL_INTERFACES_HINT = "fedpt-secure serve --host 127.0.0.1, or --api-key-file FILE with a key of 16 characters or more"


class ServeSettings(Settings):
    """What `serve` is asked for. Limits that a client can run into are errors that it is told."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 takes a free one."""
    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The model's name in the API; `NAME:large` and `NAME:small` are the large LM alone and the tuned small one."""
    max_logprobs: Annotated[int, Field(ge=0, le=1_000_000)] = DEFAULT_LOGPROBS
    """Most alternatives per token that an answer may tell; 0 tells no log-probability at all."""
    concurrent_requests: Count = 64
    """Answers that are computed or wait at a time (a request with n = 3 is three); more is a 429."""
    batch_rows: Annotated[int, Field(ge=1, le=1024)] = 32
    """Answers that one forward pass advances."""
    requests_per_minute: Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)] = 600.0
    """Of each key, or of each address where no key is asked for."""
    body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 1 << 20
    """Largest request body; a longer one is a 413."""
    body_seconds: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 30.0
    """Time that a request body may take to arrive."""
    prompt_tokens: Count = 4096
    """Longest prompt, the template's tokens included; the models' contexts bound it too."""
    new_tokens: Count = 1024
    """Longest answer."""
    choices: Annotated[int, Field(ge=1, le=128)] = 8
    """Most answers per request: prompts times `n`."""
    shutdown_seconds: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 30.0
    """Time that running answers have to end after SIGTERM or Ctrl-C."""
    tls_certificate: Path | None = None
    tls_key: Path | None = None

    @field_validator("host")
    @classmethod
    def _is_host(cls, value: str) -> str:
        if not value or any(character.isspace() for character in value):
            raise ValueError("must be an address such as 127.0.0.1")
        return value

    @model_validator(mode="after")
    def _whole_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether nobody outside this machine can connect. A name other than `localhost` counts as public."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def require_key_if_public(settings: ServeSettings, keys: ApiKeys) -> None:
    """Refuse to open a port to others without an API key.

    Raises:
        ConfigError: the address is not a loopback address, and there is no key.
    """
    if not settings.is_loopback and not keys:
        raise ConfigError(
            f"{settings.host} can be reached from other machines, and no API key is set: anybody could use the models "
            "and read their answers",
            hint=ALL_INTERFACES_HINT,
        )
