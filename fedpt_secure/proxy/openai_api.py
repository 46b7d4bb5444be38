"""Any server with OpenAI's `/v1/completions` as a black box: vLLM, llama.cpp, vendors.

The format is spoken in dialects, told apart when the connection is made (`/v1/models` names its owner, a probe shows
the rest):

| | ids of the answer's tokens | log-probabilities of the prompt |
| --- | --- | --- |
| vLLM | `token_id:N` on request | `prompt_logprobs` |
| llama.cpp | beside each token | none |
| others | by the token's bytes | `echo` with `logprobs`, where it works |

Prompts are sent as token ids, so the server's own template and tokenizer never touch them. Where an answer names tokens
by text, a text that several tokens share (fragments of a character) is no token, and its mass is left to the tail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fedpt_secure.data.token_bytes import TokenBytes
from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.errors import BlackBoxError, ConfigError, ModelError
from fedpt_secure.lm.vocabulary import Vocabulary
from fedpt_secure.proxy.black_box import Capabilities
from fedpt_secure.proxy.http_transport import ApiRefusal, ApiUsage, HttpTransport
from fedpt_secure.proxy.openai_answers import (
    AnswerReader,
    Choice,
    Completion,
    NoLogprobs,
    decode_completion,
    decode_models,
    decode_tokens,
)
from fedpt_secure.proxy.top_logprobs import TopLogprobs
from fedpt_secure.proxy.vocabulary_check import probe_text, require_same_ids

Dialect = Literal["vllm", "llamacpp", "other"]

LARGEST_BIAS = 100.0
LARGEST_BIAS_TOKENS = 300
"""OpenAI's limits of `logit_bias`: offsets within +-100, for this many tokens."""
USUAL_TOP_K: Mapping[Dialect, int] = {"vllm": 20, "llamacpp": 1000, "other": 5}
"""What servers grant unless they were started otherwise; llama.cpp grants all, at a price (`proxy/connection.py`)."""

_TEXTS_AT_ONCE = 32
_BYTES_PER_ENTRY = 512
_ANSWER_BYTES = 64 << 10
_PROBE_TOKENS = 16
_FORCED = 1e6


class OpenAISource:
    """`TopSource` over `/v1/completions`. Made by `connect`, which finds out what the server is and can do."""

    def __init__(
        self,
        transport: HttpTransport,
        vocabulary: Vocabulary,
        tokens: TokenBytes,
        *,
        model: str,
        dialect: Dialect,
        top_k: int,
        prompt_logprobs: bool,
        context_length: int,
        width: int,
    ) -> None:
        self._transport = transport
        self._vocabulary = vocabulary
        self._tokens = tokens
        self._model = model
        self._url = transport.endpoint.url
        self._width = width
        self.dialect: Dialect = dialect
        self._echo = prompt_logprobs and dialect == "other"
        self._reader = AnswerReader(tokens, vocabulary_size=vocabulary.size, width=width, echo=self._echo)
        self._capabilities = Capabilities(
            full_vocabulary=top_k >= vocabulary.size,
            largest_top_k=top_k,
            prompt_logprobs=prompt_logprobs,
            stepwise_scoring=top_k > 0,
            draft_scoring=prompt_logprobs,
            token_scores=prompt_logprobs,
            logit_bias=True,
            largest_bias=LARGEST_BIAS_TOKENS,
            context_length=context_length,
            remote=True,
            leaves_this_machine=not transport.endpoint.on_this_machine,
        )

    @classmethod
    def connect(
        cls,
        transport: HttpTransport,
        vocabulary: Vocabulary,
        tokenizer: TextTokenizer,
        *,
        top_k: int | None = None,
        context_length: int | None = None,
    ) -> OpenAISource:
        """Find the model, the dialect and what it can do; check that its tokens are ours.

        Args:
            top_k: how many log-probabilities a position are asked for; None for what such servers usually grant, 0
                where the API has none and is steered by its logit bias.
            context_length: of the model; None to ask the server, which not every one tells.

        Raises:
            BlackBoxError: no such API answers there, or not that many log-probabilities.
            ConfigError: the model has to be named, or the context length.
            ModelError: the server's vocabulary is another one; the first differing tokens are named.
        """
        model, dialect, context, width = _identify(transport)
        wanted = min(USUAL_TOP_K[dialect] if top_k is None else top_k, vocabulary.size)
        if (context_length or context) is None:
            raise ConfigError(
                f"the server at {transport.endpoint.url} does not tell its context length",
                hint="set api.context_length to the model's",
            )
        source = cls(
            transport,
            vocabulary,
            tokenizer.token_bytes(),
            model=model,
            dialect=dialect,
            top_k=wanted,
            prompt_logprobs=dialect != "llamacpp",
            context_length=context_length or context or 0,
            width=max(width or 0, vocabulary.size),
        )
        return source._settled(tokenizer)

    @property
    def capabilities(self) -> Capabilities:
        """What the probe found."""
        return self._capabilities

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's, checked against the server's."""
        return self._vocabulary

    @property
    def texts_at_once(self) -> int:
        """As many as the transport sends side by side."""
        return self._transport.concurrency

    @property
    def usage(self) -> ApiUsage:
        """What was sent so far."""
        return self._transport.usage

    @property
    def model_name(self) -> str:
        """As the server calls it."""
        return self._model

    def close(self) -> None:
        """Close connections."""
        self._transport.close()

    def next_tokens(self, texts: Sequence[Sequence[int]], top_k: int) -> list[TopLogprobs]:
        """`TopSource.next_tokens`."""
        self._require(top_k)
        answers: list[TopLogprobs] = []
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            some = [list(text) for text in texts[first : first + _TEXTS_AT_ONCE]]
            # llama.cpp: padding is asked for too and dropped, and the sampled token is forced to plain text, because a
            # fragment of a character would come without log-probabilities; what is reported does not see the bias.
            options: dict[str, Any] = {}
            if self.dialect == "llamacpp":
                options["logit_bias"] = {str(self._tokens.plain): _FORCED}
            columns = top_k + self._width - self._vocabulary.size
            for choice in self._complete(some, logprobs=columns, positions=len(some), **options):
                answers.append(self._reader.generated(choice, top_k))
        return answers

    def last_positions(self, text: Sequence[int], count: int, top_k: int) -> list[TopLogprobs]:
        """`TopSource.last_positions`: one call where the server has log-probabilities of prompts."""
        self._require(top_k)
        if not self._capabilities.prompt_logprobs:
            return self.next_tokens([text[:end] for end in range(len(text) - count + 1, len(text) + 1)], top_k)
        options: dict[str, Any] = {"echo": True} if self._echo else {"prompt_logprobs": top_k}
        (choice,) = self._complete([list(text)], logprobs=top_k, positions=len(text) + 1, **options)
        first = len(text) - count + 1  # predicted from the token before it
        inner = [self._reader.at(choice, place, len(text), top_k) for place in range(first, len(text))]
        return [*inner, self._reader.generated(choice, top_k, place=len(text) if self._echo else 0)]

    def token_scores(self, text: Sequence[int], candidates: Sequence[int]) -> list[float]:
        """`TopSource.token_scores`: each candidate behind the text, as the last token of a prompt."""
        if not self._capabilities.token_scores:
            raise BlackBoxError("this API scores no tokens of the caller's choice", hint="raise api.top_k")
        options: dict[str, Any] = {"echo": True} if self._echo else {"prompt_logprobs": 0}
        scores = []
        for first in range(0, len(candidates), _TEXTS_AT_ONCE):
            some = candidates[first : first + _TEXTS_AT_ONCE]
            texts = [[*text, candidate] for candidate in some]
            # The reply of `logprobs=1` is needed by echo only; the fresh token is not looked at.
            choices = self._complete(texts, logprobs=1, positions=2 * sum(map(len, texts)), **options)
            for candidate, choice in zip(some, choices, strict=True):
                scores.append(self._reader.own_score(choice, len(text), candidate))
        return scores

    def biased_token(self, text: Sequence[int], bias: dict[int, float], *, temperature: float, top_p: float) -> int:
        """`TopSource.biased_token`."""
        if len(bias) > LARGEST_BIAS_TOKENS:
            raise BlackBoxError(
                f"a logit bias of {len(bias)} tokens was asked for; this API takes {LARGEST_BIAS_TOKENS}",
                hint="bias the most moved tokens only",
            )
        clamped = {str(token): max(-LARGEST_BIAS, min(LARGEST_BIAS, offset)) for token, offset in bias.items()}
        options: dict[str, Any] = {"logit_bias": clamped, "temperature": temperature, "top_p": top_p}
        # vLLM and llama.cpp tell the id; another server may have no log-probabilities at all, and tells the text.
        (choice,) = self._complete(
            [list(text)], logprobs=None if self.dialect == "other" else 1, positions=1, **options
        )
        return self._reader.chosen(choice, names_ids=self.dialect == "vllm")

    def _settled(self, tokenizer: TextTokenizer) -> OpenAISource:
        """The source as it is used: with what a probe of known ids shows."""
        text = probe_text(tokenizer, self._tokens)
        self._check_cut(text, tokenizer.ids(text))
        probe = [self._vocabulary.separator_id, *tokenizer.ids(text)[:_PROBE_TOKENS]]
        top_k = self._capabilities.largest_top_k
        prompt_logprobs = self._capabilities.prompt_logprobs and top_k > 0
        if prompt_logprobs:
            try:
                self.last_positions(probe, len(probe), top_k)
            except ApiRefusal as refusal:
                if self.dialect != "other":
                    raise _too_many(top_k, refusal) from refusal
                prompt_logprobs = False
            except NoLogprobs:
                prompt_logprobs = False
        if not prompt_logprobs and top_k > 0:
            try:
                self.next_tokens([probe], top_k)
            except ApiRefusal as refusal:
                raise _too_many(top_k, refusal) from refusal
            except NoLogprobs:
                top_k = 0
        return OpenAISource(
            self._transport,
            self._vocabulary,
            self._tokens,
            model=self._model,
            dialect=self.dialect,
            top_k=top_k,
            prompt_logprobs=prompt_logprobs,
            context_length=self._capabilities.context_length,
            width=self._width,
        )

    def _check_cut(self, text: str, ours: Sequence[int]) -> None:
        """By the server's own tokenizer where it shows it (vLLM, llama.cpp), else by its count of the text's tokens."""
        server = f"the server at {self._url}"
        if self.dialect != "other" and (theirs := self._tokenize(text)) is not None:
            require_same_ids(ours, theirs, self._tokens, server=server)
            for special in sorted({self._vocabulary.separator_id, *self._vocabulary.end_ids}):
                named = self._tokenize(self._vocabulary.tokens[special])
                require_same_ids([special], named or [], self._tokens, server=server)
            return
        body = {"model": self._model, "prompt": text, "max_tokens": 1, "temperature": 0.0}
        completion = self._ask(body, limit=_ANSWER_BYTES, prompt_tokens=len(ours))
        counted = completion.usage.prompt_tokens if completion.usage else None
        if counted is not None and counted not in (len(ours), len(ours) + 1):
            raise ModelError(
                f"{server} counts {counted} tokens in a probe text of {len(ours)}: its tokenizer is another one",
                hint="give the tokenizer the server's model was published with (--large-tokenizer)",
            )

    def _tokenize(self, text: str) -> list[int] | None:
        """A text in the server's own tokens, control tokens by name; None where the server does not show them."""
        body = {"content": text, "prompt": text, "model": self._model, "add_special_tokens": False}
        try:
            answer = self._transport.post(
                f"{self._transport.endpoint.origin}/tokenize",
                body,
                decode_tokens,
                largest_answer_bytes=_ANSWER_BYTES + 32 * len(text),
            ).result()
        except ApiRefusal as refusal:
            if refusal.status not in (404, 405):
                raise
            return None
        return answer.tokens

    def _complete(
        self, texts: list[list[int]], *, logprobs: int | None, positions: int, **options: Any
    ) -> list[Choice]:
        """One request for a token after each text; choices in the order of the texts."""
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": texts if len(texts) > 1 else texts[0],
            "max_tokens": 1,
            "temperature": 0.0,
        }
        if logprobs is not None:
            body["logprobs"] = logprobs
        if self.dialect == "vllm":
            body["return_tokens_as_token_ids"] = True
        entries = positions * ((logprobs or 0) + 2)
        completion = self._ask(
            body | options,
            limit=len(texts) * _ANSWER_BYTES + entries * _BYTES_PER_ENTRY,
            prompt_tokens=sum(map(len, texts)),
        )
        by_index = {choice.index: choice for choice in completion.choices}
        if sorted(by_index) != list(range(len(texts))) or len(completion.choices) != len(texts):
            raise BlackBoxError(f"the API gave {len(completion.choices)} choices for {len(texts)} prompts")
        return [by_index[index] for index in range(len(texts))]

    def _ask(self, body: Mapping[str, Any], *, limit: int, prompt_tokens: int) -> Completion:
        return self._transport.post(
            f"{self._url}/completions", body, decode_completion, largest_answer_bytes=limit, prompt_tokens=prompt_tokens
        ).result()

    def _require(self, top_k: int) -> None:
        if top_k > self._capabilities.largest_top_k:
            raise BlackBoxError(
                f"{top_k} log-probabilities a position were asked for;"
                f" this API gives {self._capabilities.largest_top_k}",
                hint="ask for fewer and fill the rest in by the small LM's shape (`CompletedLM`)",
            )


def _identify(transport: HttpTransport) -> tuple[str, Dialect, int | None, int | None]:
    """The model's name, the server's dialect, and the context length and output columns where the server tells them."""
    url, wanted = transport.endpoint.url, transport.endpoint.model
    try:
        models = transport.get(f"{url}/models", decode_models, largest_answer_bytes=4 << 20).result().data
    except ApiRefusal as refusal:
        if refusal.status not in (404, 405):
            raise
        models = []
    found = next((model for model in models if model.id == wanted), None)
    if wanted is None:
        if len(models) != 1:
            names = ", ".join(repr(model.id) for model in models[:5]) or "it does not say which"
            raise ConfigError(
                f"the server at {url} has {len(models)} models: {names}", hint=f"name one: openai:{url}#model-name"
            )
        found = models[0]
    elif models and found is None:
        names = ", ".join(repr(model.id) for model in models[:5])
        raise ConfigError(f"the server at {url} has no model {wanted!r}; it has {names}", hint="check the name")
    if found is None:
        return str(wanted), "other", None, None
    owners: dict[str, Dialect] = {"vllm": "vllm", "llamacpp": "llamacpp"}
    context = found.max_model_len or (found.meta.n_ctx if found.meta else None)
    width = found.meta.n_vocab if found.meta else None
    return found.id, owners.get(found.owned_by or "", "other"), context, width


def _too_many(top_k: int, refusal: ApiRefusal) -> BlackBoxError:
    return BlackBoxError(
        f"{refusal.message} (asked for {top_k} log-probabilities a position)",
        hint="set api.top_k to what the server grants (vLLM: --max-logprobs)",
    )
