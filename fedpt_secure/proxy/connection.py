"""From a run's settings to a black box behind an API: the connection, the checks at the start, and the announcement."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedpt_secure.config import ApiConfig
from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.endpoint import Endpoint
from fedpt_secure.errors import BlackBoxError
from fedpt_secure.lm.vocabulary import Vocabulary
from fedpt_secure.progress import Progress
from fedpt_secure.proxy.black_box import BlackBoxLM
from fedpt_secure.proxy.completed import CompletedLM
from fedpt_secure.proxy.http_transport import HttpTransport, TransportSettings
from fedpt_secure.proxy.llama_cpp import LlamaCppSource
from fedpt_secure.proxy.openai_api import OpenAISource
from fedpt_secure.proxy.small_pair import SmallPair
from fedpt_secure.proxy.top_source import RemoteLM, TopSource

USUAL_LLAMA_CPP_TOP_K = 1000
"""What llama.cpp is asked for unless a setting says otherwise: whole answers cost 0.6 s and 4.7 MB a position at 49,152
tokens, 1,000 tokens 35 ms (docs/proxy.md)."""
USUAL_CANDIDATES = 4


def connect(
    endpoint: Endpoint,
    settings: ApiConfig,
    vocabulary: Vocabulary,
    tokenizer: TextTokenizer,
    *,
    tokenizer_folder: Path | None = None,
    progress: Progress,
) -> TopSource:
    """Announce where prompts will go, connect, and check that the server's tokens are ours.

    Args:
        endpoint: where to.
        settings: how.
        vocabulary: of the tokenizer that cuts all text.
        tokenizer: that tokenizer.
        tokenizer_folder: where its chat template may lie, which is compared with the server's.
        progress: shows the announcement.

    Raises:
        ConfigError: plain http to another machine that is not allowed, or a key that no header can carry.
        BlackBoxError: no such API answers, or it cannot do what is asked.
        ModelError: its vocabulary is another one.
    """
    endpoint.require_safe(plain_http=settings.plain_http)
    key = os.environ.get(settings.key_variable) or None
    if endpoint.on_this_machine:
        progress.note(f"the large LM answers at {endpoint}")
    else:
        progress.note(
            f"PROMPTS LEAVE THIS MACHINE: held-out records, prompts and public text are sent to {endpoint.host}"
            f" ({endpoint}), {'with' if key else 'without'} a key from {settings.key_variable}"
        )
    transport = HttpTransport(
        endpoint,
        TransportSettings(
            connect_timeout_s=settings.connect_timeout_s,
            read_timeout_s=settings.read_timeout_s,
            total_timeout_s=settings.total_timeout_s,
            attempts=settings.attempts,
            longest_wait_s=settings.longest_wait_s,
            requests_per_second=settings.requests_per_second,
            concurrency=settings.concurrency,
        ),
        key=key,
    )
    try:
        if endpoint.api == "llama.cpp":
            source = LlamaCppSource.connect(transport, vocabulary, tokenizer)
            _compare_templates(source.chat_template, tokenizer_folder, progress)
            return source
        return OpenAISource.connect(
            transport,
            vocabulary,
            tokenizer,
            top_k=settings.top_k,
            context_length=settings.context_length,
        )
    except BaseException:
        transport.close()
        raise


def black_box_of(source: TopSource, settings: ApiConfig, small: SmallPair, *, progress: Progress) -> BlackBoxLM:
    """The API as a black box of whole distributions: its own where it gives them, else completed by the small LM.

    Raises:
        BlackBoxError: it has no log-probabilities, or not as many as were asked for.
    """
    api = source.capabilities
    if api.largest_top_k == 0 or settings.top_k == 0:
        raise BlackBoxError(
            "this API shows no log-probabilities, so nothing can be scored, and nothing decoded but by its logit bias",
            hint="`fedpt-secure generate` steers it so; other commands need an API with log-probabilities",
        )
    usual = USUAL_LLAMA_CPP_TOP_K if isinstance(source, LlamaCppSource) else api.largest_top_k
    top_k = min(usual if settings.top_k is None else settings.top_k, source.vocabulary.size)
    if top_k == source.vocabulary.size and api.full_vocabulary:
        return RemoteLM(source)
    candidates = settings.candidates
    if candidates is None:
        candidates = USUAL_CANDIDATES if api.token_scores else 0
    box = CompletedLM(source, small, top_k=top_k, candidates=candidates)
    progress.note(
        f"the API's answers hold the {top_k} most likely of {source.vocabulary.size} tokens; the others are filled in"
        " by the small base LM's shape, an approximation (docs/proxy.md)"
    )
    return box


def usage_document(endpoint: Endpoint | None, box: BlackBoxLM | None, source: TopSource | None) -> dict[str, Any]:
    """What a report says about the black box: where it is, how much of its answers is its own, what was sent there."""
    if endpoint is None:
        return {"api": "transformers", "leaves_this_machine": False}
    exact = box.capabilities.exact_tokens if box is not None else None
    return {
        "api": endpoint.api,
        "address": endpoint.url,
        "model": endpoint.model,
        "leaves_this_machine": not endpoint.on_this_machine,
        "exact_tokens": exact,
        "tail": "small base LM's shape (approximation)" if exact is not None else "exact",
        **(asdict(source.usage) if source is not None else {}),
    }


def _compare_templates(theirs: str, folder: Path | None, progress: Progress) -> None:
    """Say where the server's chat template leaves ours; texts go out as ids, so ours is the one in force."""
    ours = _published_template(folder) if folder is not None else None
    if ours is None or not theirs or ours.strip() == theirs.strip():
        return
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    progress.note(
        f"the server's chat template differs from the tokenizer's at character {place}"
        f" ({theirs[place : place + 30]!r} for {ours[place : place + 30]!r}); the tokenizer's is used"
    )


def _published_template(folder: Path) -> str | None:
    """The chat template beside a tokenizer, if there is one that can be read."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    try:
        template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return template if isinstance(template, str) else None
