"""Chat messages to token ids by the large model's own template, so that no message can spell a control token."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from fedpt_secure.data.examples import PairTemplate
from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.errors import ConfigError, ModelError

_LONGEST_TEMPLATE = 1 << 18


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; roles are the template's (`system`, `user`, `assistant`)."""

    role: str
    content: str


class ChatFormat:
    """How a conversation becomes one prompt.

    Guarantees: the template's own text may hold control tokens, the messages never do: `<|im_end|>` in a message is
    those characters. For that, the template is rendered with a random placeholder for each message, and template and
    messages are encoded apart; a template that changes, drops or repeats a message is refused, not followed.

    Args:
        template: Jinja, as Transformers writes and renders it: in a sandbox without access to attributes or files.
        tokenizer: encodes messages.
        spelling: the same tokenizer, which reads control tokens; encodes the template.
        names: what the template may call `bos_token` and `eos_token`.

    Raises:
        ModelError: the template is not one, or does not keep a message as it is.
    """

    def __init__(
        self, template: str, tokenizer: TextTokenizer, spelling: Tokenizer, *, names: dict[str, str] | None = None
    ) -> None:
        self._template = template
        self._names: dict[str, Any] = dict(names or {})
        self._tokenizer = tokenizer
        self._spelling = spelling
        try:
            self.ids([Message("user", "hello")])
        except ConfigError as error:
            raise ModelError(f"the large model's chat template cannot be used: {error.message}") from None

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt, up to the place where the assistant's next turn begins.

        Raises:
            ConfigError: the template does not take these messages (an unknown role, an order it refuses).
        """
        marks = [secrets.token_hex(16) for _ in messages]
        turns = [{"role": turn.role, "content": mark} for turn, mark in zip(messages, marks, strict=True)]
        try:
            rendered = render_jinja_template(
                [turns], chat_template=self._template, add_generation_prompt=True, **self._names
            )[0][0]
        except (TemplateError, TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"the model's chat template refuses these messages: {reason}") from None
        ids: list[int] = []
        for turn, mark in zip(messages, marks, strict=True):
            before, found, rendered = rendered.partition(mark)
            if not found or mark in rendered:
                raise ConfigError(
                    "the model's chat template drops, repeats or reorders messages, so that they cannot be kept apart "
                    "from control tokens",
                    hint="use /v1/completions",
                )
            ids += self._fixed(before)
            ids += self._tokenizer.ids(turn.content)
        return ids + self._fixed(rendered)

    def _fixed(self, text: str) -> list[int]:
        return list(self._spelling.encode(text, add_special_tokens=False).ids)


def load_chat_format(directory: Path, tokenizer: TextTokenizer, spelling: Tokenizer) -> ChatFormat | None:
    """The chat template beside a model's weights; None where it has none.

    `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`. A model without either whose vocabulary has
    the chat tokens that runs are trained with (`PairTemplate`) gets that format.

    Raises:
        ModelError: a file is damaged.
    """
    settings: Any = {}
    try:
        if (path := directory / "tokenizer_config.json").is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
        template = settings.get("chat_template")
        if (path := directory / "chat_template.jinja").is_file():
            template = path.read_text(encoding="utf-8")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"cannot read the chat template in {directory}: {error}", hint="copy its files again"
        ) from None
    if isinstance(template, list):  # several by name
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    if template is None and len(PairTemplate.of(tokenizer).opening) > 0:
        template = _CHAT_TOKENS
    if template is None:
        return None
    if not isinstance(template, str) or len(template) > _LONGEST_TEMPLATE:
        raise ModelError(f"the chat template in {directory} is not a text of at most {_LONGEST_TEMPLATE} characters")
    names = {name: _spelt(settings.get(name)) for name in ("bos_token", "eos_token")}
    return ChatFormat(template, tokenizer, spelling, names={name: text for name, text in names.items() if text})


_CHAT_TOKENS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


def _spelt(token: Any) -> str:
    """A special token's text, which Transformers writes as a string or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""
