"""What an OpenAI-compatible server answers, checked and read into distributions over our tokens.

The answers are untrusted: what they lack, name wrongly or leave out of a distribution's range is an error of the API,
never a guess. Which fields are read follows the dialect (`openai_api.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import msgspec

from fedpt_secure.crypto.structs import resolved
from fedpt_secure.data.token_bytes import TokenBytes
from fedpt_secure.errors import BlackBoxError
from fedpt_secure.proxy.top_logprobs import TopLogprobs

_TOKEN_ID = re.compile(r"token_id:(\d{1,9})")
_BYTES = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)")


class _Content(msgspec.Struct):
    """llama.cpp's entries, in the style of chat completions."""

    logprob: float
    id: int | None = None
    top_logprobs: list[_Content] = []


resolved(_Content)  # it names itself, which it can once it has its name


@resolved
class _Logprobs(msgspec.Struct):
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None
    content: list[_Content] | None = None


@resolved
class _PromptEntry(msgspec.Struct):
    logprob: float
    decoded_token: str | None = None


@resolved
class Choice(msgspec.Struct):
    """The answer to one prompt of a request."""

    index: int = 0
    text: str = ""
    logprobs: _Logprobs | None = None
    prompt_logprobs: list[dict[str, _PromptEntry] | None] | None = None


@resolved
class _UsageField(msgspec.Struct):
    prompt_tokens: int | None = None


@resolved
class Completion(msgspec.Struct):
    """The answer of `/v1/completions`."""

    choices: list[Choice]
    usage: _UsageField | None = None


@resolved
class _Meta(msgspec.Struct):
    n_ctx: int | None = None
    n_vocab: int | None = None


@resolved
class Model(msgspec.Struct):
    """One model of `/v1/models`: what servers tell of it beyond its id differs."""

    id: str
    owned_by: str | None = None
    max_model_len: int | None = None
    meta: _Meta | None = None


@resolved
class Models(msgspec.Struct):
    """The answer of `/v1/models`."""

    data: list[Model]


@resolved
class Tokens(msgspec.Struct):
    """The answer of `/tokenize`."""

    tokens: list[int]


decode_completion: Callable[[bytes], Completion] = msgspec.json.Decoder(Completion).decode
decode_models: Callable[[bytes], Models] = msgspec.json.Decoder(Models).decode
decode_tokens: Callable[[bytes], Tokens] = msgspec.json.Decoder(Tokens).decode


class NoLogprobs(BlackBoxError):
    """An answer without the log-probabilities that were asked for."""


class AnswerReader:
    """Reads the choices of one server.

    Args:
        tokens: our tokens' bytes, by which an answer's names are found.
        vocabulary_size: of our tokenizer.
        width: of the server's output, at least `vocabulary_size`; columns beyond it are padding, and dropped.
        echo: log-probabilities of the prompt come in the fields of the answer's own tokens, by `echo`, and not in
            vLLM's `prompt_logprobs`.
    """

    def __init__(self, tokens: TokenBytes, *, vocabulary_size: int, width: int, echo: bool) -> None:
        self._tokens = tokens
        self._vocabulary_size = vocabulary_size
        self._width = width
        self._echo = echo

    def generated(self, choice: Choice, top_k: int, *, place: int = 0) -> TopLogprobs:
        """The distribution of the fresh token, which stands at `place` of the answer's positions.

        Raises:
            NoLogprobs: the answer has none at all.
            BlackBoxError: what it has is no distribution over our tokens.
        """
        logprobs = choice.logprobs
        if logprobs is None or (logprobs.content is None and logprobs.top_logprobs is None):
            raise NoLogprobs("the API returned no log-probabilities")
        if logprobs.content is not None:
            if not logprobs.content:
                raise BlackBoxError("the API returned the log-probabilities of no position")
            entries = logprobs.content[0].top_logprobs
            if any(entry.id is None for entry in entries):
                raise BlackBoxError("the API's log-probabilities name no token ids")
            ids = [-1 if entry.id is None else entry.id for entry in entries]
            return self._checked(ids, [entry.logprob for entry in entries], top_k, strict=True)
        return self._by_name(logprobs.top_logprobs or [], place, top_k)

    def at(self, choice: Choice, place: int, length: int, top_k: int) -> TopLogprobs:
        """The distribution of the token at `place` of a prompt of `length` tokens.

        Raises:
            NoLogprobs: the answer does not score the prompt.
            BlackBoxError: it scores another number of positions, or not this one.
        """
        if self._echo:
            logprobs = choice.logprobs
            if logprobs is None or logprobs.top_logprobs is None:
                raise NoLogprobs("the API returned no log-probabilities of the prompt")
            if len(logprobs.top_logprobs) != length + 1:
                raise NoLogprobs(f"the API scored {len(logprobs.top_logprobs)} positions of {length + 1}")
            return self._by_name(logprobs.top_logprobs, place, top_k)
        scored = choice.prompt_logprobs
        if scored is None:
            raise NoLogprobs("the API returned no log-probabilities of the prompt")
        entries = scored[place] if len(scored) == length else None
        if entries is None:
            raise BlackBoxError(f"the API scored {len(scored)} positions of a prompt of {length}, one of them absent")
        return self._checked(
            [_number(name) for name in entries], [entry.logprob for entry in entries.values()], top_k, strict=True
        )

    def own_score(self, choice: Choice, place: int, token: int) -> float:
        """The log-probability of the prompt's own token at `place`.

        Raises:
            BlackBoxError: it was not scored, or is none.
        """
        value: float | None = None
        if self._echo and choice.logprobs is not None and choice.logprobs.token_logprobs is not None:
            scores = choice.logprobs.token_logprobs
            value = scores[place] if place < len(scores) else None
        elif choice.prompt_logprobs is not None and place < len(choice.prompt_logprobs):
            entry = (choice.prompt_logprobs[place] or {}).get(str(token))
            value = entry.logprob if entry is not None else None
        if value is None:
            raise BlackBoxError(f"the API did not score token {token} where it was asked to")
        return float(TopLogprobs.checked([token], [value], asked=1, vocabulary_size=self._vocabulary_size).logprobs[0])

    def chosen(self, choice: Choice, *, names_ids: bool) -> int:
        """The id of the token that the server chose.

        Args:
            names_ids: the server names tokens by id, as vLLM does on request. llama.cpp's entries carry ids in any
                case; of other servers the text alone says which token it is.

        Raises:
            BlackBoxError: it is not exactly one token of ours.
        """
        if choice.logprobs is not None and choice.logprobs.content:
            token = choice.logprobs.content[0].id
        elif names_ids and choice.logprobs is not None and choice.logprobs.tokens:
            token = self._id_of(choice.logprobs.tokens[0])
        else:
            ids = self._tokens.ids_of(choice.text.encode())
            token = ids[0] if len(ids) == 1 else None
        if token is None or not 0 <= token < self._vocabulary_size:
            raise BlackBoxError(
                f"the API chose {choice.text!r}, which is not exactly one token of ours",
                hint="this server cannot be steered token by token; one that returns token ids can (vLLM, llama.cpp)",
            )
        return token

    def _by_name(self, places: Sequence[Mapping[str, float] | None], place: int, top_k: int) -> TopLogprobs:
        entries = places[place] if place < len(places) else None
        if entries is None:
            raise BlackBoxError(f"the API returned the log-probabilities of {len(places)} positions, {place} not among")
        ranked = sorted(entries.items(), key=lambda entry: -entry[1])
        named = [(self._id_of(name), logprob) for name, logprob in ranked]
        lossless = all(token is not None for token, _ in named)
        if not lossless:
            # Texts that fall together leave room where the text's own token, added last, would pass as a likely one.
            named = named[: min(top_k, len(named) - 1)]
        known = [(token, logprob) for token, logprob in named if token is not None]
        if not known:
            raise BlackBoxError(
                f"none of the API's {len(entries)} tokens is one of ours, the first being {next(iter(entries), '')!r}",
                hint="give the tokenizer the server's model was published with (--large-tokenizer)",
            )
        return self._checked([token for token, _ in known], [logprob for _, logprob in known], top_k, strict=lossless)

    def _id_of(self, name: str) -> int | None:
        """The id a name in an answer means; None for a text that is no single token of ours.

        Raises:
            BlackBoxError: a whole text that no token of ours stands for.
        """
        if match := _TOKEN_ID.fullmatch(name):
            return int(match[1])
        content = bytes.fromhex(match[1].replace("\\x", "")) if (match := _BYTES.fullmatch(name)) else name.encode()
        ids = self._tokens.ids_of(content)
        if not ids and "\ufffd" not in name:
            raise BlackBoxError(
                f"the API answered with the token {name!r}, which our tokenizer does not have",
                hint="give the tokenizer the server's model was published with (--large-tokenizer)",
            )
        return ids[0] if len(ids) == 1 else None

    def _checked(self, ids: Sequence[int], logprobs: Sequence[float], top_k: int, *, strict: bool) -> TopLogprobs:
        return TopLogprobs.checked(
            ids, logprobs, asked=top_k, vocabulary_size=self._vocabulary_size, width=self._width, strict=strict
        )


def _number(name: str) -> int:
    if not name.isdecimal() or len(name) > 9:
        raise BlackBoxError(f"the API names a token {name!r} where an id was expected")
    return int(name)
