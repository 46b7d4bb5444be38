"""OpenAI's response objects, as JSON values."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedpt_secure.proxy import TokenEvent
from fedpt_secure.serving.answers import Delta
from fedpt_secure.serving.token_text import TokenText

SMALLEST_LOGPROB = -9999.0
"""What an excluded token is reported with, as OpenAI does: JSON has no minus infinity."""


def _finite(value: float) -> float:
    return max(value, SMALLEST_LOGPROB) if not math.isnan(value) else SMALLEST_LOGPROB


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Usage:
    """Tokens read and computed."""

    prompt_tokens: int
    generated: dict[int, int] = field(default_factory=dict)

    def count(self, delta: Delta) -> None:
        """Note how far an answer has come."""
        self.generated[delta.index] = delta.generated

    @property
    def completion_tokens(self) -> int:
        """Over all answers; end tokens and the tokens of a stop string were computed too."""
        return sum(self.generated.values())

    def to_json(self) -> dict[str, int]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class CompletionShape:
    """Objects of `/v1/completions`."""

    kind = whole_kind = "text_completion"

    def __init__(self, model: str, token_text: TokenText, *, logprobs: int | None) -> None:
        self.head = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._token_text = token_text
        self._logprobs = logprobs
        self._offsets: dict[int, int] = {}

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """What one answer grew by."""
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logs(delta.index, delta.choices),
            "finish_reason": delta.finish_reason,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """Nothing comes before the first text."""
        return None

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """One answer, from all of its deltas."""
        return self.chunk(_joined(deltas))

    def _logs(self, index: int, choices: Sequence[TokenEvent]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        tokens, offsets = [], []
        for choice in choices:
            text, _ = self._token_text.token(choice.token)
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
            tokens.append(text)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(choice.logprob) for choice in choices],
            "top_logprobs": [self._top(choice) for choice in choices],
            "text_offset": offsets,
        }

    def _top(self, choice: TokenEvent) -> dict[str, float]:
        """Alternatives by text; of several tokens with one text (parts of characters) the likeliest."""
        top: dict[str, float] = {}
        for token, logprob in choice.top:
            top.setdefault(self._token_text.token(token)[0], _finite(logprob))
        return top


class ChatShape:
    """Objects of `/v1/chat/completions`."""

    kind, whole_kind = "chat.completion.chunk", "chat.completion"

    def __init__(self, model: str, token_text: TokenText, *, logprobs: bool) -> None:
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._token_text = token_text
        self._logprobs = logprobs

    def opening(self, index: int) -> dict[str, Any] | None:
        """Who speaks, before the first text."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """What one answer grew by."""
        return {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.text or delta.choices else {},
            "logprobs": self._logs(delta.choices),
            "finish_reason": delta.finish_reason,
        }

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """One answer, from all of its deltas."""
        delta = _joined(deltas)
        return {
            "index": delta.index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": self._logs(delta.choices),
            "finish_reason": delta.finish_reason,
        }

    def _logs(self, choices: Sequence[TokenEvent]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            self._one(choice.token, choice.logprob) | {"top_logprobs": [self._one(*top) for top in choice.top]}
            for choice in choices
        ]
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text, content = self._token_text.token(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(content)}


def _joined(deltas: Sequence[Delta]) -> Delta:
    return Delta(
        index=deltas[-1].index,
        text="".join(delta.text for delta in deltas),
        choices=tuple(choice for delta in deltas for choice in delta.choices),
        finish_reason=deltas[-1].finish_reason,
        generated=deltas[-1].generated,
    )


def compared(delta: Delta, arm: str, token_text: TokenText, *, logprobs: bool) -> dict[str, Any]:
    """What one arm of `/v1/compare` grew by: tokens, and for the steered one where tuning changed the choice.

    With `logprobs` also `shift`, the log of how much likelier tuning made the chosen token, and the two probabilities.
    """
    tokens = []
    for choice in delta.choices:
        entry: dict[str, Any] = {"text": token_text.token(choice.token)[0]}
        if choice.alone is not None:
            entry["changed"] = choice.alone.changed
            entry["large_token"] = token_text.token(choice.alone.token)[0]
            if logprobs:
                entry["logprob"] = _finite(choice.logprob)
                entry["large_logprob"] = _finite(choice.alone.chosen_logprob)
                entry["shift"] = _finite(choice.logprob) - _finite(choice.alone.chosen_logprob)
        tokens.append(entry)
    return {"arm": arm, "text": delta.text, "tokens": tokens, "finish_reason": delta.finish_reason}
