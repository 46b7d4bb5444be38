"""JSON over HTTP to a machine that may be slow, rude or hostile: bounded in time, size and number of tries.

Guarantees, each a test against a server that breaks it (`tests/proxy/test_http_transport.py`):

- an attempt ends within `total_timeout_s`, however the server drips its bytes, headers included;
- an answer is read piece by piece and given up at the caller's limit; compressed answers are not accepted, so nothing
  can be larger than what was counted;
- no redirect is followed: prompts and keys go to the address that was given and nowhere else;
- certificates are verified; connections are kept and used again;
- what may pass is tried again (no connection, timeouts, 408, 429, 5xx, an answer cut short), after exponential back-off
  with jitter or the `Retry-After` that the server names, up to `longest_wait_s`; what will not pass is not;
- the key is in no log line, no error, no `repr`: error texts of the server, which may quote it, are cleaned of it.

Requests run on an event loop in a thread of their own, so several are under way at once and a caller can go on
computing while one is. The thread starts with the first request; a process that forks after that cannot use it.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import os
import random
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import httpx
import msgspec

from fedpt_secure.endpoint import Endpoint
from fedpt_secure.errors import BlackBoxError, ConfigError

_Answer = TypeVar("_Answer")

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
_EXCERPT_CHARACTERS = 200
_WIRE_LOGGERS = ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy")
_ERROR_BODY_BYTES = 16 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSettings:
    """How patient a transport is.

    Attributes:
        connect_timeout_s: until a connection stands.
        read_timeout_s: longest silence within an answer.
        total_timeout_s: of one attempt, from the first byte sent to the last one read.
        attempts: tries of one request, the first included.
        first_backoff_s: wait after the first failure; doubled after each further one, times a jitter of 0.5 to 1.
        longest_wait_s: bound of every wait. A server that asks for a longer one is not waited for.
        requests_per_second: pace of new attempts; None for no limit.
        concurrency: requests under way at once.

    Raises:
        ConfigError: a value is out of its range.
    """

    connect_timeout_s: float = 5.0
    read_timeout_s: float = 60.0
    total_timeout_s: float = 300.0
    attempts: int = 4
    first_backoff_s: float = 0.5
    longest_wait_s: float = 60.0
    requests_per_second: float | None = None
    concurrency: int = 4

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"api.{name} is {value}; it must be a finite number above 0")


@dataclass(frozen=True, slots=True)
class ApiUsage:
    """What was sent to an API so far, every attempt counted.

    Attributes:
        requests: HTTP requests, retries included.
        prompt_tokens: tokens of text in them.
        bytes_sent: of request bodies; `bytes_received`: of answers.
    """

    requests: int = 0
    prompt_tokens: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


class HttpTransport:
    """Requests to one endpoint.

    Args:
        endpoint: where to.
        settings: how patient.
        key: sent as a bearer token with every request; None for none.
        jitter_rng: spreads retries; no secret.

    Raises:
        ConfigError: the key holds what no header can carry.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        settings: TransportSettings,
        *,
        key: str | None = None,
        jitter_rng: random.Random | None = None,
    ) -> None:
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError("the API key is empty, or holds a space or a character that is not printable ASCII")
        self.endpoint = endpoint
        self._settings = settings
        self._key = key
        self._jitter_rng = jitter_rng or random.Random()  # noqa: S311 - spreads retries, protects nothing
        self._usage = ApiUsage()
        self._lock = threading.Lock()
        self._runner: _Runner | None = None
        self._closed = False
        if key is not None:
            # At level DEBUG these log what a server answers, which may quote the key.
            redaction = _Redaction(key)
            for logger in map(logging.getLogger, _WIRE_LOGGERS):
                logger.addFilter(redaction)

    def __repr__(self) -> str:
        return f"HttpTransport({str(self.endpoint)!r})"

    @property
    def concurrency(self) -> int:
        """Requests under way at once."""
        return self._settings.concurrency

    @property
    def usage(self) -> ApiUsage:
        """What was sent so far."""
        return self._usage

    def post(
        self,
        url: str,
        body: Mapping[str, Any],
        decode: Callable[[bytes], _Answer],
        *,
        largest_answer_bytes: int,
        prompt_tokens: int = 0,
    ) -> Future[_Answer]:
        """Begin a request; the future's `result()` waits for it.

        Args:
            url: whole address; at the endpoint's host.
            body: sent as JSON.
            decode: makes the answer of its bytes; raises `msgspec.DecodeError` where they are not JSON (tried again)
                and `msgspec.ValidationError` where they are JSON of another form (not tried again).
            largest_answer_bytes: a longer answer is an error.
            prompt_tokens: how many tokens of text the body holds, for the count.

        Raises (from `result()`):
            BlackBoxError: no answer, or none that can be used.
        """
        return self._begin("POST", url, msgspec.json.encode(body), decode, largest_answer_bytes, prompt_tokens)

    def get(self, url: str, decode: Callable[[bytes], _Answer], *, largest_answer_bytes: int) -> Future[_Answer]:
        """Begin a request without a body; as `post`."""
        return self._begin("GET", url, b"", decode, largest_answer_bytes, 0)

    def close(self) -> None:
        """Close connections and end the thread; requests under way are cancelled."""
        with self._lock:
            self._closed = True
            runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()

    def _begin(
        self,
        method: str,
        url: str,
        content: bytes,
        decode: Callable[[bytes], _Answer],
        limit: int,
        prompt_tokens: int,
    ) -> Future[_Answer]:
        if not url.startswith(self.endpoint.origin + "/"):
            raise BlackBoxError(f"{url} is not at {self.endpoint.origin}")
        with self._lock:
            if self._closed:
                raise BlackBoxError(f"the connection to {self.endpoint.host} is closed")
            if self._runner is None:
                self._runner = _Runner(self._settings, self._headers(), self.endpoint)
            runner = self._runner
        return runner.submit(self._send(runner, method, url, content, decode, limit, prompt_tokens))

    def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Content-Type": "application/json"}
        return headers | ({"Authorization": f"Bearer {self._key}"} if self._key else {})

    async def _send(
        self,
        runner: _Runner,
        method: str,
        url: str,
        content: bytes,
        decode: Callable[[bytes], _Answer],
        limit: int,
        prompt_tokens: int,
    ) -> _Answer:
        settings = self._settings
        async with runner.slots:
            for attempt in range(1, settings.attempts + 1):
                await runner.pace()
                self._count(requests=1, prompt_tokens=prompt_tokens, bytes_sent=len(content))
                try:
                    async with asyncio.timeout(settings.total_timeout_s):
                        return decode(await self._exchange(runner.client, method, url, content, limit))
                except TimeoutError:
                    problem, wait = f"no whole answer within {settings.total_timeout_s:g} s", None
                except _Passing as error:
                    problem, wait = error.problem, error.wait_s
                except msgspec.ValidationError as error:
                    raise BlackBoxError(
                        f"{self.endpoint.host} answered with JSON of another form: {self._clean(str(error))}",
                        hint="is the address that of the API named before it?",
                    ) from None
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    problem, wait = f"an answer that is not JSON ({self._clean(str(error))})", None
                except httpx.HTTPError as error:
                    problem, wait = self._transport_problem(error), None
                if attempt < settings.attempts:
                    await asyncio.sleep(self._backoff(attempt) if wait is None else wait)
        raise BlackBoxError(
            f"{self.endpoint.host} gave no usable answer in {settings.attempts} attempts; the last: {problem}",
            hint="is the server up, and is --large its address? api.attempts and api.total_timeout_s set the patience",
        )

    async def _exchange(self, client: httpx.AsyncClient, method: str, url: str, content: bytes, limit: int) -> bytes:
        """One attempt: the body of a 2xx answer."""
        async with client.stream(method, url, content=content) as response:
            if response.is_redirect or 300 <= response.status_code < 400:
                raise BlackBoxError(
                    f"{self.endpoint.host} redirects to {self._clean(response.headers.get('location', 'nowhere'))};"
                    " redirects are refused, nothing was sent there",
                    hint="give the final address if you trust it",
                )
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise BlackBoxError(
                    f"{self.endpoint.host} sent a compressed answer that was not asked for",
                    hint="an answer's size must be known while it is read; switch compression off in the server",
                )
            if not response.is_success:
                raise self._refusal(response, await self._excerpt(response))
            announced = response.headers.get("content-length", "0")
            if announced.isdecimal() and int(announced) > limit:
                raise self._too_large(f"{int(announced):,}", limit)
            pieces = bytearray()
            async for piece in response.aiter_raw():
                self._count(bytes_received=len(piece))
                pieces += piece
                if len(pieces) > limit:
                    raise self._too_large(f"more than {limit:,}", limit)
            return bytes(pieces)

    async def _excerpt(self, response: httpx.Response) -> str:
        pieces = bytearray()
        with suppress(httpx.HTTPError):  # the status has said it already
            async for piece in response.aiter_raw():
                self._count(bytes_received=len(piece))
                pieces += piece
                if len(pieces) > _ERROR_BODY_BYTES:
                    break
        return self._clean(pieces.decode("utf-8", errors="replace"))

    def _refusal(self, response: httpx.Response, excerpt: str) -> Exception:
        status = response.status_code
        problem = f"HTTP {status} ({excerpt})" if excerpt else f"HTTP {status}"
        if status not in _PASSING:
            hints = {401: "the key in the environment (api.key_variable) is missing or wrong", 403: "the key may not"}
            return ApiRefusal(
                f"{self.endpoint.host} refused the request: {problem}",
                status=status,
                hint=hints.get(status, "check --large, the model's name, and what the API supports"),
            )
        wait = _retry_after(response.headers.get("retry-after"))
        if wait is not None and wait > self._settings.longest_wait_s:
            return BlackBoxError(
                f"{self.endpoint.host} answered {problem} and asks to be left alone for {wait:.0f} s",
                hint=f"try again later, or set api.longest_wait_s above {wait:.0f}",
            )
        return _Passing(problem, wait)

    def _too_large(self, size: str, limit: int) -> BlackBoxError:
        return BlackBoxError(
            f"{self.endpoint.host} answered with {size} bytes where at most {limit:,} make sense; it was not read on",
            hint="is the address that of the API named before it?",
        )

    def _transport_problem(self, error: httpx.HTTPError) -> str:
        """What went wrong on the way; a broken certificate is an error at once."""
        what = self._clean(str(error)) or type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in what:
            raise BlackBoxError(
                f"the certificate of {self.endpoint.host} cannot be verified: {what}",
                hint="SSL_CERT_FILE names the certificates of a private authority",
            ) from None
        if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL | httpx.LocalProtocolError):
            raise BlackBoxError(f"no request can be made to {self.endpoint.url}: {what}") from None
        kind = "timeout" if isinstance(error, httpx.TimeoutException) else "connection failed"
        return f"{kind} ({what})"

    def _clean(self, text: str) -> str:
        """A server's text for people: no key, no control characters, not long."""
        if self._key:
            text = text.replace(self._key, "[key]")
        text = "".join(character if character.isprintable() else " " for character in text)
        text = " ".join(text.split())
        return text if len(text) <= _EXCERPT_CHARACTERS else text[:_EXCERPT_CHARACTERS] + "..."

    def _backoff(self, failures: int) -> float:
        wait: float = min(self._settings.longest_wait_s, self._settings.first_backoff_s * 2.0 ** (failures - 1))
        return wait * self._jitter_rng.uniform(0.5, 1.0)

    def _count(self, **amounts: int) -> None:
        with self._lock:
            self._usage = ApiUsage(
                **{name: value + amounts.get(name, 0) for name, value in asdict(self._usage).items()}
            )


class ApiRefusal(BlackBoxError):
    """A server answered that it will not do what was asked, and trying again would not help.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, message: str, *, status: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status


class _Passing(Exception):
    """A failure that may pass; `wait_s` is what the server asks for."""

    def __init__(self, problem: str, wait_s: float | None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.wait_s = wait_s


class _Redaction(logging.Filter):
    """Takes a key out of log records; stays as long as the process, because records may come late."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self._key = key

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if self._key in message:
            record.msg, record.args = message.replace(self._key, "[key]"), None
        return True


class _Runner:
    """An event loop in a daemon thread with one HTTP client; closed with the object or the process."""

    def __init__(self, settings: TransportSettings, headers: Mapping[str, str], endpoint: Endpoint) -> None:
        self._loop = asyncio.new_event_loop()
        self.slots = asyncio.Semaphore(settings.concurrency)
        self._interval = 0.0 if settings.requests_per_second is None else 1 / settings.requests_per_second
        self._next_start = 0.0
        # Proxies and certificate files of the environment are for other machines; a proxy could not reach this one.
        self.client = httpx.AsyncClient(
            headers=dict(headers),
            follow_redirects=False,
            trust_env=not endpoint.on_this_machine,
            # Reading the authorities takes a tenth of a second; without TLS none is trusted.
            verify=True if endpoint.url.startswith("https:") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            timeout=httpx.Timeout(
                settings.read_timeout_s, connect=settings.connect_timeout_s, pool=settings.total_timeout_s
            ),
            limits=httpx.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency),
        )
        self._thread = threading.Thread(target=_run, args=(self._loop,), daemon=True, name="black-box-http")
        self._thread.start()
        self.close = weakref.finalize(self, _stop, self._loop, self._thread, self.client, os.getpid())

    def submit(self, work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def pace(self) -> None:
        """Wait for this attempt's turn; turns are `1 / requests_per_second` apart."""
        now = time.monotonic()
        start = max(now, self._next_start)
        self._next_start = start + self._interval
        if start > now:
            await asyncio.sleep(start - now)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: httpx.AsyncClient, process: int) -> None:
    if os.getpid() != process:  # a fork: the thread is in the parent
        return

    async def wind_up() -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await client.aclose()
        loop.stop()

    asyncio.run_coroutine_threadsafe(wind_up(), loop)
    if threading.current_thread() is not thread:  # it is where the last request under way held the last reference
        thread.join(timeout=10)


def _retry_after(value: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for; None where it is absent or says nothing."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value.strip()[:12])
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, moment.timestamp() - time.time())
