"""llama.cpp's own server as a black box: `/completion` with token ids in, `n_probs` token ids out.

`n_probs` may be as large as the vocabulary, so answers can be full; each costs the server's JSON (96 bytes a token).
The token that is sampled on the way is forced to plain text by a logit bias, which the reported log-probabilities do
not see: where it was a fragment of a character, the server would leave them out.

The server has no log-probabilities of a prompt: a text is scored by asking about each of its prefixes, several in one
request, and the server's prompt cache makes each cost one more token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from fedpt_secure.crypto.structs import resolved
from fedpt_secure.data.token_bytes import TokenBytes
from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.errors import BlackBoxError, ModelError
from fedpt_secure.lm.vocabulary import Vocabulary
from fedpt_secure.proxy.black_box import Capabilities
from fedpt_secure.proxy.http_transport import ApiUsage, HttpTransport
from fedpt_secure.proxy.top_logprobs import TopLogprobs
from fedpt_secure.proxy.vocabulary_check import probe_text, require_same_ids

LARGEST_BIAS = 100.0
_BYTES_PER_TOKEN = 512
"""Room for one entry of an answer; llama.cpp needs about 96, and up to 300 for tokens of many bytes."""
_ANSWER_BYTES = 64 << 10
_CALL_BYTES = 32 << 20
"""Prefixes of a text share a request up to about this much answer."""
_IDS_AT_ONCE = 2048
_FORCED = 1e6
_PREFIXES_AT_ONCE = 8
"""The server answers a request when all its prompts are done; more would look like silence on a busy machine."""


@resolved
class _Entry(msgspec.Struct):
    id: int
    logprob: float


@resolved
class _Place(msgspec.Struct):
    id: int
    top_logprobs: list[_Entry]


@resolved
class _Completion(msgspec.Struct):
    tokens_evaluated: int
    truncated: bool
    index: int = 0
    tokens: list[int] = []
    completion_probabilities: list[_Place] = []


@resolved
class _Settings(msgspec.Struct):
    n_ctx: int


@resolved
class _Properties(msgspec.Struct):
    default_generation_settings: _Settings
    total_slots: int = 1
    chat_template: str = ""
    model_path: str = ""
    build_info: str = ""


@resolved
class _Meta(msgspec.Struct):
    n_vocab: int


@resolved
class _Model(msgspec.Struct):
    id: str
    meta: _Meta


@resolved
class _Models(msgspec.Struct):
    data: list[_Model]


@resolved
class _Tokens(msgspec.Struct):
    tokens: list[int]


@resolved
class _Content(msgspec.Struct):
    content: str


_FIELDS = ["index", "tokens", "tokens_evaluated", "truncated", "completion_probabilities"]
_decode_one: Callable[[bytes], _Completion] = msgspec.json.Decoder(_Completion).decode
_decode_many: Callable[[bytes], list[_Completion]] = msgspec.json.Decoder(list[_Completion]).decode


class LlamaCppSource:
    """`TopSource` over a llama.cpp server.

    Made by `connect`, which checks the server's vocabulary before anything else is sent.

    Attributes:
        chat_template: the server's own; ours is used, because texts are sent as ids.
        model_name: as the server calls it.
    """

    def __init__(
        self,
        transport: HttpTransport,
        vocabulary: Vocabulary,
        tokens: TokenBytes,
        *,
        width: int,
        context_length: int,
        model_name: str,
        slots: int = 1,
    ) -> None:
        self._transport = transport
        self._vocabulary = vocabulary
        self._tokens = tokens
        self._width = width
        self._url = transport.endpoint.url
        self.model_name = model_name
        self._slots = max(1, slots)
        self.chat_template = ""
        self._capabilities = Capabilities(
            full_vocabulary=True,
            largest_top_k=vocabulary.size,
            prompt_logprobs=False,
            stepwise_scoring=True,
            logit_bias=True,
            largest_bias=vocabulary.size,
            context_length=context_length,
            remote=True,
            leaves_this_machine=not transport.endpoint.on_this_machine,
        )

    @classmethod
    def connect(cls, transport: HttpTransport, vocabulary: Vocabulary, tokenizer: TextTokenizer) -> LlamaCppSource:
        """Ask the server what it is, and check that its tokens are ours.

        Raises:
            BlackBoxError: no llama.cpp server answers there.
            ModelError: its vocabulary is another one; the first differing tokens are named.
        """
        url = transport.endpoint.url
        properties = transport.get(
            f"{url}/props", msgspec.json.Decoder(_Properties).decode, largest_answer_bytes=4 << 20
        ).result()
        models = transport.get(
            f"{url}/v1/models", msgspec.json.Decoder(_Models).decode, largest_answer_bytes=1 << 20
        ).result()
        if not models.data:
            raise BlackBoxError(f"the server at {url} has no model loaded", hint="start llama-server with -m MODEL")
        source = cls(
            transport,
            vocabulary,
            tokenizer.token_bytes(),
            width=models.data[0].meta.n_vocab,
            context_length=properties.default_generation_settings.n_ctx,
            model_name=models.data[0].id.rsplit("/", 1)[-1],
            slots=properties.total_slots,
        )
        source.chat_template = properties.chat_template
        source._check_vocabulary(tokenizer)
        return source

    @property
    def capabilities(self) -> Capabilities:
        """Full answers, one position at a time; logit bias on what is sampled."""
        return self._capabilities

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's, checked against the server's."""
        return self._vocabulary

    @property
    def texts_at_once(self) -> int:
        """The server's slots: a further text would push another one out of its prompt cache."""
        return min(self._slots, 16)

    @property
    def usage(self) -> ApiUsage:
        """What was sent so far."""
        return self._transport.usage

    def close(self) -> None:
        """Close connections."""
        self._transport.close()

    def next_tokens(self, texts: Sequence[Sequence[int]], top_k: int) -> list[TopLogprobs]:
        """`TopSource.next_tokens`."""
        # A padded output layer has columns that are no token; they are asked for too, and dropped.
        probabilities = self._width if top_k >= self._vocabulary.size else top_k + self._width - self._vocabulary.size
        per_text = probabilities * _BYTES_PER_TOKEN
        at_once = max(1, min(_PREFIXES_AT_ONCE, _CALL_BYTES // per_text))
        answers: list[TopLogprobs] = []
        for first in range(0, len(texts), at_once):
            some = [list(text) for text in texts[first : first + at_once]]
            body = {
                "prompt": some,
                "n_predict": 1,
                "n_probs": probabilities,
                "temperature": 0.0,
                "logit_bias": [[self._tokens.plain, _FORCED]],
                "cache_prompt": True,
                "response_fields": _FIELDS,
            }
            completions = self._transport.post(
                f"{self._url}/completion",
                body,
                _decode_many if len(some) > 1 else _decode_one_or_many,
                largest_answer_bytes=len(some) * (per_text + _ANSWER_BYTES),
                prompt_tokens=sum(map(len, some)),
            ).result()
            answers += self._in_order(completions, some, top_k)
        return answers

    def last_positions(self, text: Sequence[int], count: int, top_k: int) -> list[TopLogprobs]:
        """`TopSource.last_positions`: each prefix is a question of its own."""
        return self.next_tokens([text[:end] for end in range(len(text) - count + 1, len(text) + 1)], top_k)

    def token_scores(self, text: Sequence[int], candidates: Sequence[int]) -> list[float]:
        """Not offered: asking for a larger `top_k` is cheaper."""
        raise BlackBoxError(
            "llama.cpp's server scores no single tokens", hint="raise api.top_k, up to the whole vocabulary"
        )

    def biased_token(self, text: Sequence[int], bias: dict[int, float], *, temperature: float, top_p: float) -> int:
        """`TopSource.biased_token`."""
        body = {
            "prompt": list(text),
            "n_predict": 1,
            "logit_bias": [[token, max(-LARGEST_BIAS, min(LARGEST_BIAS, offset))] for token, offset in bias.items()],
            "temperature": temperature,
            "samplers": ["temperature", "top_p"],
            "top_p": top_p,
            "repeat_penalty": 1.0,
            "return_tokens": True,
            "cache_prompt": True,
            "response_fields": _FIELDS,
        }
        completion = self._transport.post(
            f"{self._url}/completion",
            body,
            _decode_one,
            largest_answer_bytes=_ANSWER_BYTES,
            prompt_tokens=len(text),
        ).result()
        self._check_prompt(completion, text)
        if len(completion.tokens) != 1 or not 0 <= completion.tokens[0] < self._vocabulary.size:
            raise BlackBoxError(f"the server answered with the tokens {completion.tokens} where one was asked for")
        return completion.tokens[0]

    def _in_order(
        self, completions: list[_Completion], texts: Sequence[Sequence[int]], top_k: int
    ) -> list[TopLogprobs]:
        by_index = {completion.index: completion for completion in completions}
        if sorted(by_index) != list(range(len(texts))) or len(completions) != len(texts):
            raise BlackBoxError(f"the server answered {len(completions)} of {len(texts)} prompts")
        answers = []
        for index, text in enumerate(texts):
            self._check_prompt(by_index[index], text)
            places = by_index[index].completion_probabilities
            if len(places) != 1:
                raise BlackBoxError(
                    f"the server gave the probabilities of {len(places)} tokens where one was asked for"
                )
            entries = places[0].top_logprobs
            answers.append(
                TopLogprobs.checked(
                    [entry.id for entry in entries],
                    [entry.logprob for entry in entries],
                    asked=top_k,
                    vocabulary_size=self._vocabulary.size,
                    width=self._width,
                )
            )
        return answers

    def _check_prompt(self, completion: _Completion, text: Sequence[int]) -> None:
        if completion.truncated or completion.tokens_evaluated != len(text):
            raise BlackBoxError(
                f"the server read {completion.tokens_evaluated} of the {len(text)} tokens it was sent",
                hint="start it with a larger context (-c), or use a smaller --context-length",
            )

    def _check_vocabulary(self, tokenizer: TextTokenizer) -> None:
        size, server = self._vocabulary.size, f"the server at {self._url}"
        if self._width < size:
            raise ModelError(
                f"{server} has {self._width} tokens; our tokenizer has {size}",
                hint="give the tokenizer the server's model was published with (--large-tokenizer)",
            )
        tokens = self._tokens
        text = probe_text(tokenizer, tokens)
        require_same_ids(tokenizer.ids(text), self._tokenize(text, control=False), tokens, server=server)
        for special in sorted({self._vocabulary.separator_id, *self._vocabulary.end_ids}):
            name = self._vocabulary.tokens[special]
            require_same_ids([special], self._tokenize(name, control=True), tokens, server=server)
        self._compare_strings(tokens, server)

    def _compare_strings(self, tokens: TokenBytes, server: str) -> None:
        """Every token that is text by itself must be the same text there; blocks first, then the one that differs."""
        readable = []
        for token_id in range(self._vocabulary.size):
            try:
                readable.append((token_id, tokens[token_id].decode()))
            except UnicodeDecodeError:  # part of a character: the server shows it as U+FFFD, like any other
                continue
        for first in range(0, len(readable), _IDS_AT_ONCE):
            block = readable[first : first + _IDS_AT_ONCE]
            while len(block) > 1 and self._detokenize(block) != "".join(text for _, text in block):
                half = len(block) // 2
                left = block[:half]
                block = left if self._detokenize(left) != "".join(text for _, text in left) else block[half:]
            if len(block) == 1 and (theirs := self._detokenize(block)) not in (block[0][1], block[0][1].strip()):
                raise ModelError(
                    f"token {block[0][0]} is {block[0][1]!r} for our tokenizer and {theirs!r} for {server}",
                    hint="give the tokenizer the server's model was published with (--large-tokenizer)",
                )

    def _tokenize(self, text: str, *, control: bool) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": control}
        decode = msgspec.json.Decoder(_Tokens).decode
        return (
            self._transport.post(
                f"{self._url}/tokenize", body, decode, largest_answer_bytes=_ANSWER_BYTES + 16 * len(text.encode())
            )
            .result()
            .tokens
        )

    def _detokenize(self, block: Sequence[tuple[int, str]]) -> str:
        body = {"tokens": [token_id for token_id, _ in block]}
        decode = msgspec.json.Decoder(_Content).decode
        limit = _ANSWER_BYTES + _BYTES_PER_TOKEN * len(block)
        return (
            self._transport.post(f"{self._url}/detokenize", body, decode, largest_answer_bytes=limit).result().content
        )


def _decode_one_or_many(body: bytes) -> list[_Completion]:
    """A list of one prompt may be answered by a bare object."""
    return _decode_many(body) if body.lstrip()[:1] == b"[" else [_decode_one(body)]
