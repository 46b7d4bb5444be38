"""Where a black box that is not on this disk answers: which API it speaks, at which address, under which model name.

    llama.cpp:http://127.0.0.1:8080            llama.cpp's own server
    openai:https://host/v1#model-name          anything with OpenAI's /v1/completions

Prompts are text of the run, held-out records among it, so an address is judged before anything is sent: plain http is
for this machine alone unless a setting says otherwise, and no address carries a key.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import urlsplit

from fedpt_secure.errors import ConfigError

Api = Literal["llama.cpp", "openai"]
_FORMS = "llama.cpp:http://127.0.0.1:8080 or openai:https://host/v1#model-name"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One API at one address.

    Attributes:
        api: what it speaks.
        url: its address without a closing slash; `/completion` or `/completions` is put behind it.
        model: the name the API knows the model by; None where it serves one only.
    """

    api: Api
    url: str
    model: str | None = None

    @classmethod
    def parse(cls, spec: str) -> Endpoint | None:
        """The endpoint a user's `--large` means, or None where it means weights.

        Raises:
            ConfigError: an address that is no http address, or carries a user, a password or a query.
        """
        api, colon, address = spec.partition(":")
        if not colon or api not in get_args(Api):
            return None
        parts = urlsplit(address)
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ConfigError(f"{spec!r} has no http or https address with a host", hint=f"write {_FORMS}")
        if parts.username is not None or parts.password is not None or parts.query:
            # The address is shown and stored with the run; so the message leaves it out as well.
            raise ConfigError(
                f"the address of {parts.hostname} carries a user, a password or a query, which would be stored and"
                " shown with the run",
                hint="keys are read from the environment (api.key_variable)",
            )
        if api == "llama.cpp" and parts.fragment:
            raise ConfigError(f"{spec!r} names a model; a llama.cpp server has one only", hint=f"write {_FORMS}")
        if any(character.isspace() or not character.isprintable() for character in spec):
            raise ConfigError(f"{spec!r} holds a space or a control character", hint=f"write {_FORMS}")
        url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        return cls("llama.cpp" if api == "llama.cpp" else "openai", url, parts.fragment or None)

    @property
    def host(self) -> str:
        """The machine's name or number."""
        return urlsplit(self.url).hostname or ""

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    @property
    def on_this_machine(self) -> bool:
        """Whether the host is a loopback address; else what is sent leaves for somebody else's machine."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def require_safe(self, *, plain_http: bool) -> None:
        """Return if prompts and keys may be sent there.

        Raises:
            ConfigError: plain http to another machine, which `plain_http` does not allow.
        """
        if self.url.startswith("http://") and not self.on_this_machine and not plain_http:
            raise ConfigError(
                f"{self.url} is plain http to another machine: everybody on the way reads the prompts and the key",
                hint="use https, a tunnel to 127.0.0.1, or allow it with api.plain_http",
            )

    def __str__(self) -> str:
        return f"{self.api}:{self.url}" + (f"#{self.model}" if self.model else "")
