"""Continue a prompt with a finished run's models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedpt_secure.config import Shares
from fedpt_secure.data import Cache
from fedpt_secure.data.examples import PairTemplate
from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.errors import ConfigError, RunDirectoryError
from fedpt_secure.federation.run_directory import RunDirectory
from fedpt_secure.federation.setup import load_models
from fedpt_secure.federation.state import released_adapter
from fedpt_secure.progress import Progress
from fedpt_secure.proxy import (
    BlackBoxLM,
    DecodingEngine,
    DecodingSettings,
    Request,
    SmallPair,
    Speculation,
    SteeringRule,
    generate_biased,
)


def continuations(
    directory: RunDirectory,
    prompt: str,
    *,
    chat: bool,
    alpha: float | None,
    shares: Shares | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    cache: Cache,
    progress: Progress,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    speculate: bool = False,
) -> dict[str, str]:
    """The black box's own continuation (`base`) and the proxy-tuned one (`proxy_tuned`).

    Args:
        chat: wrap the prompt in the model's chat format.
        alpha: weight of the shift, which takes the run's shares with it in proportion; None for the run's, 0 for the
            large model alone.
        shares: the tuned small LM's own share by place, as it is; None for the run's.
        seed: of the sampling, where the temperature is not 0; the choice of a token is no secret.
        top_k, repetition_penalty, stop: as in `DecodingSettings`.
        speculate: guess several tokens per call of the large model.

    Raises:
        RunDirectoryError: the run has no checkpoint yet.
        ConfigError: an empty prompt, a decoding setting out of its range, or one that an API without
            log-probabilities cannot follow.
        BlackBoxError: speculation, and the black box cannot score several tokens in one call.
    """
    if not prompt.strip():
        raise ConfigError("the prompt is empty", hint='fedpt-secure generate --run RUN "hey, how was"')
    config = directory.config()
    checkpoint = directory.load_checkpoint()
    if checkpoint is None:
        raise RunDirectoryError(f"{directory.path} has no checkpoint yet", hint="let it finish a round first")
    models = load_models(config, cache=cache, progress=progress)
    models.small.load_adapter_vector(released_adapter(checkpoint, config))
    tokenizer = models.tokenizer
    ids = [tokenizer.separator_id, *tokenizer.ids(prompt)]
    first_place = len(ids) - 1
    if chat:
        template = PairTemplate.of(tokenizer)
        ids = [tokenizer.separator_id, *template.opening, *tokenizer.ids(prompt), *template.turn]
        first_place = 0
    of_run = SteeringRule.of(config.proxy, responses=chat)
    rule = of_run if alpha is None else of_run.at_strength(alpha)
    if shares is not None:
        rule = SteeringRule(alpha=rule.alpha, shares=shares)
    if rule.blends and not models.shows_logprobs:
        progress.note("the API shows no log-probabilities: steering by alpha alone, without the small LM's own share")
        rule = SteeringRule(alpha=rule.alpha)
    texts = {}
    for name, steering in (("base", SteeringRule(alpha=0.0)), ("proxy_tuned", rule)):
        settings = DecodingSettings(
            rule=steering,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            stop=tuple(stop),
            seed=seed,
        )
        request = Request(prompt=tuple(ids), settings=settings, first_place=first_place)
        with progress.task(f"decoding ({name})", max_new_tokens, unit="tokens") as task:
            if models.source is not None and not models.shows_logprobs:
                _require_what_a_bias_can_do(settings, speculate=speculate)
                tokens = []
                for token in generate_biased(models.source, models.pair, ids, settings):
                    tokens.append(token)
                    task.advance()
                texts[name] = tokenizer.text(tokens)
                continue
            texts[name] = ""
            for piece in _pieces(models.black_box(progress), models.pair, request, tokenizer, speculate=speculate):
                texts[name] += piece
                task.advance()
    if models.source is not None:
        usage = models.source.usage
        progress.note(
            f"sent to {models.weights.source}: {usage.requests:,} requests, {usage.prompt_tokens:,} prompt tokens,"
            f" {usage.bytes_sent:,} bytes"
        )
    return texts


def _pieces(
    black_box: BlackBoxLM, pair: SmallPair, request: Request, tokenizer: TextTokenizer, *, speculate: bool
) -> Iterator[str]:
    """The text that became certain with each token."""
    speculation = Speculation() if speculate else None
    engine = DecodingEngine(black_box, pair, decode=tokenizer.text, speculation=speculation, largest_batch=1)
    try:
        yield from (event.text for event in engine.run([request]))
    finally:
        engine.close()


def _require_what_a_bias_can_do(settings: DecodingSettings, *, speculate: bool) -> None:
    if settings.top_k or settings.repetition_penalty != 1 or settings.stop or speculate:
        raise ConfigError(
            "this API shows no log-probabilities and samples by itself: top_k, repetition_penalty, stop and speculation"
            " cannot be had there",
            hint="leave them out, or use an API with log-probabilities",
        )
