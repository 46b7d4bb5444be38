"""The routes."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from fedpt_secure import __version__
from fedpt_secure.errors import FedptError
from fedpt_secure.proxy import DecodingSettings, SteeringRule
from fedpt_secure.proxy import Request as EngineRequest
from fedpt_secure.serving.answers import Delta, interleaved
from fedpt_secure.serving.chat import Message
from fedpt_secure.serving.disconnect import EventStream, unless_disconnected
from fedpt_secure.serving.engine import Arm
from fedpt_secure.serving.errors import ApiError, told, unexpected
from fedpt_secure.serving.gate import Gate
from fedpt_secure.serving.keys import ApiKeys
from fedpt_secure.serving.limits import Admission
from fedpt_secure.serving.metrics import Metrics
from fedpt_secure.serving.responses import DONE, ChatShape, CompletionShape, Usage, compared, event
from fedpt_secure.serving.run import ARM_SUFFIXES, Prompt, ServedRun, arm_of
from fedpt_secure.serving.scheduler import Scheduler
from fedpt_secure.serving.settings import ServeSettings
from fedpt_secure.serving.wire import ChatRequest, CompareRequest, CompletionRequest

_COMPLETION_TOKENS = 16
"""Of `/v1/completions` where nothing is said; OpenAI's."""
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


def create_app(run: ServedRun, settings: ServeSettings, keys: ApiKeys) -> Gate:
    """The whole application.

    Args:
        run: what is served.
        settings: names and limits.
        keys: who may ask; nobody is asked for a key where there is none.
    """
    return _Application(run, settings, keys).gate


@dataclass(frozen=True, slots=True)
class _Work:
    """A request, ready for the engine."""

    jobs: list[EngineRequest]
    stops: list[str]
    usage: Usage
    arm: str


class _Application:
    def __init__(self, run: ServedRun, settings: ServeSettings, keys: ApiKeys) -> None:
        self._run = run
        self._settings = settings
        self._admission = Admission(settings.concurrent_requests)
        self._scheduler = Scheduler(
            run.engine,
            batch_rows=settings.batch_rows,
            on_step=lambda rows: self._metrics.step_rows.observe(rows),
            on_failure=lambda error: self.gate.note_failure(error),
        )
        self._metrics = Metrics(running=lambda: self._scheduler.running, waiting=lambda: self._scheduler.waiting)
        self._pages = {
            path: (resources.files("fedpt_secure.serving").joinpath("page", name).read_bytes(), media)
            for path, (name, media) in _PAGE.items()
        }
        app = FastAPI(title="fedpt-secure", version=__version__, docs_url=None, redoc_url=None, lifespan=self._lifespan)
        app.add_exception_handler(ApiError, _api_error)
        app.add_exception_handler(FedptError, _fedpt_error)
        app.add_exception_handler(Exception, _unexpected)
        app.add_exception_handler(RequestValidationError, _invalid)
        app.add_exception_handler(HTTPException, _no_route)
        for path in _PAGE:
            app.add_api_route(path, self.page, methods=["GET"], include_in_schema=False)
        app.add_api_route("/healthz", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{model}", self.model, methods=["GET"])
        app.add_api_route("/v1/privacy", self.privacy, methods=["GET"])
        app.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        app.add_api_route("/v1/compare", self.compare, methods=["POST"], response_model=None)
        self.gate = Gate(app, settings=settings, keys=keys, metrics=self._metrics)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self._scheduler.start()
        try:
            yield
        finally:
            await run_in_threadpool(self._scheduler.stop)

    async def page(self, request: Request) -> Response:
        content, media = self._pages[request.url.path]
        return Response(content, media_type=media, headers=_PAGE_HEADERS)

    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def metrics(self) -> Response:
        return Response(self._metrics.exposition(), media_type="text/plain; version=0.0.4")

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._described(suffix) for suffix in ARM_SUFFIXES]}

    async def model(self, model: str) -> dict[str, Any]:
        arm = arm_of(model, self._settings.name)
        return self._described(next(suffix for suffix, other in ARM_SUFFIXES.items() if other == arm))

    def _described(self, suffix: str) -> dict[str, Any]:
        return {
            "id": self._settings.name + suffix,
            "object": "model",
            "created": self._run.created,
            "owned_by": "fedpt-secure",
            "arm": ARM_SUFFIXES[suffix],
            "alpha": self._run.rule.alpha if ARM_SUFFIXES[suffix] == "proxied" else None,
            "shares": self._run.rule.shares if ARM_SUFFIXES[suffix] == "proxied" else None,
            "context_length": self._run.engine.context_length,
            "chat": self._run.chat is not None,
            "max_logprobs": self._settings.max_logprobs,
            "large_model_at": self._run.large_model_at,
        }

    async def privacy(self) -> dict[str, Any]:
        if self._run.privacy is None:
            raise ApiError(404, "this run has no privacy statement: it was not finished", code="no_statement")
        return self._run.privacy

    async def completions(self, request: Request, wanted: CompletionRequest) -> Response:
        arm = arm_of(wanted.model, self._settings.name)
        logprobs = self._logprobs(wanted.logprobs, "logprobs")
        run = self._run
        prompts = await run_in_threadpool(
            lambda: [
                run.text_prompt(prompt) if isinstance(prompt, str) else run.id_prompt(prompt)
                for prompt in wanted.prompts
            ]
        )
        if not prompts:
            raise ApiError(400, "there is no prompt", param="prompt")
        work = self._work(prompts, arm, wanted, wanted.max_tokens or _COMPLETION_TOKENS, logprobs or 0)
        return await self._respond(
            request, work, CompletionShape(wanted.model, run.token_text, logprobs=logprobs), wanted
        )

    async def chat(self, request: Request, wanted: ChatRequest) -> Response:
        arm = arm_of(wanted.model, self._settings.name)
        if wanted.logprobs and self._settings.max_logprobs == 0:
            self._logprobs(1, "logprobs")
        top = self._logprobs(wanted.top_logprobs, "top_logprobs") or 0
        messages = [
            Message("system" if message.role == "developer" else message.role, message.text)
            for message in wanted.messages
        ]
        prompt = await run_in_threadpool(self._run.chat_prompt, messages)
        most = wanted.max_completion_tokens or wanted.max_tokens
        room = self._run.engine.context_length - len(prompt.ids)
        work = self._work([prompt], arm, wanted, most or max(1, min(room, self._settings.new_tokens)), top)
        shape = ChatShape(wanted.model, self._run.token_text, logprobs=bool(wanted.logprobs))
        return await self._respond(request, work, shape, wanted)

    async def compare(self, request: Request, wanted: CompareRequest) -> Response:
        run = self._run
        if wanted.chat:
            prompt = await run_in_threadpool(run.chat_prompt, [Message("user", wanted.prompt)])
        else:
            prompt = await run_in_threadpool(run.text_prompt, wanted.prompt)
        self._check_length(prompt, wanted.max_tokens, "max_tokens")
        jobs = [
            self._job(
                prompt,
                arm,
                told_apart=arm == "proxied",
                rule=run.rule_at(wanted.alpha, prompt),
                max_new_tokens=wanted.max_tokens,
                temperature=wanted.temperature,
                top_p=wanted.top_p,
                seed=wanted.seed,
            )
            for arm in wanted.arms
        ]
        work = _Work(jobs, [], Usage(len(prompt.ids) * len(jobs)), "compare")
        logprobs = self._settings.max_logprobs > 0

        def shown(delta: Delta) -> dict[str, Any]:
            return compared(delta, wanted.arms[delta.index], run.token_text, logprobs=logprobs)

        async def events(deltas: AsyncIterator[Delta]) -> AsyncGenerator[bytes, None]:
            async for delta in deltas:
                yield event(shown(delta))

        return await self._stream(request, work, events)

    def _logprobs(self, asked: int | None, param: str) -> int | None:
        most = self._settings.max_logprobs
        if asked is not None and (asked > most or most == 0):
            raise ApiError(
                400,
                f"this server tells the log-probabilities of at most {most} tokens per place; all of them together "
                "would reveal the tuned small model",
                param=param,
                code="logprobs_capped",
            )
        return asked

    def _check_length(self, prompt: Prompt, new_tokens: int, param: str) -> None:
        settings, context = self._settings, self._run.engine.context_length
        if new_tokens > settings.new_tokens:
            raise ApiError(400, f"this server writes at most {settings.new_tokens} tokens per answer", param=param)
        length = len(prompt.ids)
        if length > settings.prompt_tokens or length + new_tokens > context:
            raise ApiError(
                400,
                f"the prompt has {length} tokens and {new_tokens} are asked for; prompts may have at most "
                f"{settings.prompt_tokens}, and both together at most {context}",
                param=param,
                code="context_length_exceeded",
            )

    def _work(
        self,
        prompts: Sequence[Prompt],
        arm: Arm,
        wanted: CompletionRequest | ChatRequest,
        new_tokens: int,
        top_logprobs: int,
    ) -> _Work:
        if wanted.alpha is not None and arm != "proxied":
            raise ApiError(400, "alpha steers the proxy-tuned model only", param="alpha")
        each = wanted.n or 1
        if each * len(prompts) > self._settings.choices:
            raise ApiError(
                400,
                f"this server gives at most {self._settings.choices} answers per request (prompts times n)",
                param="n",
            )
        for prompt in prompts:
            self._check_length(prompt, new_tokens, "max_tokens")
        seed = secrets.randbits(63) if wanted.seed is None else wanted.seed
        jobs = [
            self._job(
                prompt,
                arm,
                top_logprobs=top_logprobs,
                rule=self._run.rule_at(wanted.alpha, prompt),
                max_new_tokens=new_tokens,
                temperature=1.0 if wanted.temperature is None else wanted.temperature,
                top_p=1.0 if wanted.top_p is None else wanted.top_p,
                top_k=wanted.top_k or 0,
                repetition_penalty=1.0 if wanted.repetition_penalty is None else wanted.repetition_penalty,
                seed=_seed_of(seed, place * each + number),
            )
            for place, prompt in enumerate(prompts)
            for number in range(each)
        ]
        return _Work(jobs, wanted.stops, Usage(sum(len(prompt.ids) for prompt in prompts)), arm)

    @staticmethod
    def _job(
        prompt: Prompt,
        arm: Arm,
        *,
        rule: SteeringRule,
        top_logprobs: int = 0,
        told_apart: bool = False,
        **settings: Any,
    ) -> EngineRequest:
        return EngineRequest(
            prompt=prompt.ids,
            settings=DecodingSettings(rule=SteeringRule(alpha=0.0) if arm == "large" else rule, **settings),
            first_place=prompt.first_place,
            voice="small" if arm == "small" else "steered",
            top_logprobs=top_logprobs,
            told_apart=told_apart,
        )

    async def _respond(
        self,
        request: Request,
        work: _Work,
        shape: CompletionShape | ChatShape,
        wanted: CompletionRequest | ChatRequest,
    ) -> Response:
        if wanted.stream:
            options = wanted.stream_options
            with_usage = options is not None and options.include_usage

            async def events(deltas: AsyncIterator[Delta]) -> AsyncGenerator[bytes, None]:
                def chunk(choices: list[Any], **more: Any) -> bytes:
                    usage: dict[str, Any] = {"usage": None} if with_usage else {}
                    return event(shape.head | {"object": shape.kind, "choices": choices} | usage | more)

                for index in range(len(work.jobs)):
                    if (opening := shape.opening(index)) is not None:
                        yield chunk([opening])
                async for delta in deltas:
                    yield chunk([shape.chunk(delta)])
                if with_usage:
                    yield chunk([], usage=work.usage.to_json())
                yield DONE

            return await self._stream(request, work, events)
        answers: list[list[Delta]] = [[] for _ in work.jobs]

        async def collect() -> None:
            async with aclosing(self._deltas(work)) as deltas:
                async for delta in deltas:
                    answers[delta.index].append(delta)

        await unless_disconnected(collect(), request.receive)
        content = shape.head | {
            "object": shape.whole_kind,
            "choices": [shape.whole(deltas) for deltas in answers],
            "usage": work.usage.to_json(),
        }
        return JSONResponse(content)

    async def _stream(self, request: Request, work: _Work, events: Any) -> EventStream:
        """Events, begun once there is a first text, so that an error before it has its own status."""
        deltas = self._deltas(work)
        first = await unless_disconnected(anext(deltas), request.receive)

        async def again() -> AsyncGenerator[Delta, None]:
            async with aclosing(deltas):
                yield first
                async for delta in deltas:
                    yield delta

        async def guarded() -> AsyncGenerator[bytes, None]:
            async with aclosing(again()) as source, aclosing(events(source)) as contents:
                try:
                    async for content in contents:
                        yield content
                except FedptError as error:
                    yield event(told(error).body)

        return EventStream(guarded())

    async def _deltas(self, work: _Work) -> AsyncGenerator[Delta, None]:
        """All answers of a request as they grow, within the limit of concurrent answers."""
        started = time.monotonic()
        with self._admission.of(len(work.jobs)):
            self._metrics.tokens.labels("prompt", work.arm).inc(work.usage.prompt_tokens)
            continuations = []
            try:
                continuations += [self._scheduler.submit(job) for job in work.jobs]
                deltas = interleaved(
                    continuations,
                    self._run.token_text,
                    work.stops,
                    on_first=lambda: self._metrics.first_token_seconds.observe(time.monotonic() - started),
                )
                async with aclosing(deltas):
                    async for delta in deltas:
                        work.usage.count(delta)
                        yield delta
            finally:
                for continuation in continuations:
                    continuation.cancel()
                self._metrics.tokens.labels("completion", work.arm).inc(work.usage.completion_tokens)


def _seed_of(seed: int, index: int) -> int:
    """The seed of one answer of a request; the first one's is the request's own."""
    if index == 0:
        return seed % 2**64
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest())


async def _api_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return error.response()


async def _fedpt_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, FedptError):
        raise error
    return told(error).response()


async def _unexpected(request: Request, error: Exception) -> Response:
    """Starlette raises the error again after this answer, for the gate to log."""
    return unexpected().response()


async def _invalid(request: Request, error: Exception) -> Response:
    """A request body that is not what the route takes: the first thing that is wrong, by name."""
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(where) or None
    if first["type"] == "extra_forbidden":
        message, code = f"unknown parameter {param!r}; it would be ignored, so it is refused", "unknown_parameter"
    elif first["type"] == "json_invalid":
        message, param, code = "the request body is not JSON", None, "invalid_json"
    elif first["type"] == "missing":
        message, code = f"the parameter {param!r} is missing", "missing_parameter"
    else:
        reason = str(first["msg"]).removeprefix("Value error, ")
        message, code = f"{param}: {reason}" if param else reason, "invalid_value"
    return ApiError(400, message, param=param, code=code).response()


async def _no_route(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    reasons: dict[int, tuple[str, Literal["not_found", "method_not_allowed", "invalid_request"]]] = {
        404: ("no such path", "not_found"),
        405: ("this path does not take this method", "method_not_allowed"),
    }
    message, code = reasons.get(error.status_code, ("the request cannot be read", "invalid_request"))
    return ApiError(error.status_code, message, code=code).response()
