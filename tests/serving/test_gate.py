"""What comes in from the network: keys, hosts, sizes, rates, departures; and what is written down of it."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from http.client import HTTPConnection
from urllib.parse import urlsplit

import openai
import pytest

from fedpt_secure.proxy import TokenEvent
from fedpt_secure.serving import ApiKeys

KEY = "correct-horse-battery-staple"


class Endless:
    """An engine that says token 504 until the length is reached, at a pace, and notes what is asked of it."""

    context_length = 100_000

    def __init__(self, seconds: float = 0.005, failure: Exception | None = None):
        self.seconds, self.failure = seconds, failure
        self.rows, self.next = {}, 0

    def add(self, request):
        self.next += 1
        self.rows[self.next] = request.settings.max_new_tokens
        return self.next

    def step(self):
        time.sleep(self.seconds)
        if self.failure is not None:
            raise self.failure
        events = []
        for row in list(self.rows):
            self.rows[row] -= 1
            ending = None if self.rows[row] else "length"
            events.append(TokenEvent(handle=row, token=504, text="", logprob=-0.5, top=(), alone=None, ending=ending))
            if ending:
                del self.rows[row]
        return events

    def remove(self, row):
        self.rows.pop(row, None)

    def close(self):
        pass


def ask(url, method="POST", path="/v1/completions", body=None, headers=None, *, raw=None):
    """Status, headers and body of one plain HTTP request."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname, parts.port, timeout=30)
    try:
        content = raw if raw is not None else json.dumps(body).encode() if body is not None else None
        sent = {"Content-Type": "application/json"} | (headers or {})
        connection.request(method, path, content, {name: value for name, value in sent.items() if value is not None})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def endless():
    return Endless()


@pytest.fixture(scope="module")
def open_url(serving, make_run, endless):
    with serving(make_run(endless), new_tokens=50_000, body_bytes=4096, body_seconds=0.5) as url:
        yield url


WANTED = {"model": "tiny", "prompt": "hey", "max_tokens": 2}


def test_without_a_key_only_health_and_the_page_answer(serving, make_run, client_of):
    with serving(make_run(Endless()), keys=ApiKeys([KEY])) as url:
        for path in ("/healthz", "/", "/page.css", "/page.js"):
            assert ask(url, "GET", path)[0] == 200
        for method, path in (
            *(("GET", path) for path in ("/v1/models", "/v1/models/tiny", "/v1/privacy", "/metrics", "/openapi.json")),
            *(("POST", f"/v1/{path}") for path in ("completions", "chat/completions", "compare")),
            ("GET", "/no/such/path"),
        ):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
                status, answered, body = ask(url, method, path, WANTED, headers)
                assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
                assert answered["WWW-Authenticate"] == "Bearer"
        with client_of(url, KEY) as client:
            assert client.completions.create(**WANTED).choices[0].text
        with client_of(url, KEY + "x") as client, pytest.raises(openai.AuthenticationError):
            client.completions.create(**WANTED)


def test_a_key_has_its_own_rate_and_is_told_when_to_come_back(serving, make_run):
    other = "another-key-of-some-length"
    with serving(make_run(Endless()), keys=ApiKeys([KEY, other]), requests_per_minute=30.0) as url:

        def statuses(key):
            return [ask(url, body=WANTED, headers={"Authorization": f"Bearer {key}"})[0] for _ in range(7)]

        assert statuses(KEY) == [200] * 5 + [429] * 2
        status, headers, body = ask(url, body=WANTED, headers={"Authorization": f"Bearer {KEY}"})
        assert (status, json.loads(body)["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(headers["Retry-After"]) <= 2
        assert statuses(other)[:5] == [200] * 5


def test_more_answers_than_there_is_room_for_are_429_and_room_comes_back(serving, make_run, client_of):
    engine = Endless()
    with serving(make_run(engine), concurrent_requests=2, new_tokens=50_000) as url, client_of(url) as client:
        stream = client.completions.create(**WANTED | {"max_tokens": 50_000, "n": 2}, stream=True)
        next(iter(stream))
        status, headers, body = ask(url, body=WANTED)
        assert (status, json.loads(body)["error"]["code"], headers["Retry-After"]) == (429, "server_busy", "1")
        stream.close()
        until(lambda: not engine.rows)
        until(lambda: ask(url, body=WANTED)[0] == 200)
        assert ask(url, body=WANTED | {"n": 3})[0] == 400


def test_a_client_that_leaves_takes_its_work_along(serving, make_run, client_of):
    """Streaming or not; also while nothing is written, which is when the plain stream of the framework notices last."""
    engine = Endless()
    with serving(make_run(engine), new_tokens=50_000) as url, client_of(url) as client:
        stream = client.completions.create(**WANTED | {"max_tokens": 50_000}, stream=True)
        next(iter(stream))
        assert engine.rows
        stream.close()
        until(lambda: not engine.rows)
        impatient = client.with_options(timeout=0.3)
        with pytest.raises(openai.APITimeoutError):
            impatient.completions.create(**WANTED | {"max_tokens": 50_000})
        until(lambda: not engine.rows)
        engine.seconds = 1.0
        stops = {"max_tokens": 50_000, "stop": " and never anything else"}
        with pytest.raises(openai.APITimeoutError):
            impatient.completions.create(**WANTED | stops, stream=True)
        until(lambda: not engine.rows)
        assert b"fedpt_cancelled_total 3.0" in ask(url, "GET", "/metrics")[2]


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, b"x" * 5000, 413),
        ({"Content-Length": "1" + "0" * 30}, b"", 400),  # refused by the HTTP parser itself
        ({"Content-Length": "10000000000"}, b"", 413),
        ({"Content-Type": "text/plain"}, b"{}", 415),
        ({"Content-Type": None}, b"{}", 415),
        ({}, b"", 400),
        ({}, b"{", 400),
        ({}, b"[]", 400),
        ({}, b"null", 400),
        ({}, b"\xff\xfe", 400),
        ({}, b"[" * 4000, 400),
        ({}, b'{"model": "tiny", "prompt": "\\ud800"}', 400),
        ({}, b'{"model": "tiny", "prompt": "hey", "temperature": NaN}', 400),
        ({}, b'{"model": "tiny", "prompt": "hey", "alpha": Infinity}', 400),
        ({}, b'{"model": "tiny", "prompt": "hey", "seed": 1e400}', 400),
        ({}, b'{"model": "tiny"}', 400),
        ({}, b'{"model": ["tiny"], "prompt": "hey"}', 400),
    ],
    ids=str,
)
def test_a_body_that_cannot_be_used_is_a_4xx(open_url, headers, body, status):
    if "Content-Length" in headers:
        parts = urlsplit(open_url)
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as plain:
            head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            plain.sendall((head + f"Content-Length: {headers['Content-Length']}\r\n\r\n").encode())
            assert plain.recv(100).startswith(f"HTTP/1.1 {status}".encode())
        return
    found, answered, content = ask(open_url, headers=headers, raw=body)
    assert found == status
    assert json.loads(content)["error"]["type"] == "invalid_request_error"
    assert answered["X-Content-Type-Options"] == "nosniff"


def test_a_body_that_grows_past_its_limit_or_does_not_come_is_cut_off(open_url):
    parts = urlsplit(open_url)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    for rest, status in (
        (b"Transfer-Encoding: chunked\r\n\r\n1000\r\n" + b"x" * 4096 + b"\r\n10\r\n" + b"x" * 16, b"413"),
        (b"Content-Length: 100\r\n\r\nx", b"408"),
    ):
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as plain:
            plain.sendall(head + rest)
            assert plain.recv(100).startswith(b"HTTP/1.1 " + status)


def test_other_paths_and_methods_are_errors_in_the_same_shape(open_url):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("GET", "/docs", 404)):
        found, _, body = ask(open_url, method, path)
        assert found == status
        assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("[::1]:8000", 200),
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
    ],
)
def test_a_web_site_cannot_point_its_own_name_here(open_url, host, status):
    """DNS rebinding: without a key, the Host header is all that tells a foreign page's request apart."""
    assert ask(open_url, "GET", "/v1/models", headers={"Host": host})[0] == status


def test_a_web_site_cannot_make_a_browser_post_here(open_url):
    """What a page may send without asking first is no JSON, and asking first (CORS) is not answered."""
    for simple in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert ask(open_url, raw=json.dumps(WANTED).encode(), headers={"Content-Type": simple})[0] == 415
    status, headers, _ = ask(open_url, "OPTIONS", headers={"Origin": "https://evil.example"})
    assert status == 405
    assert "Access-Control-Allow-Origin" not in headers


def test_nothing_that_a_client_sends_is_written_down(serving, make_run, caplog, capfd):
    """Not the prompt, the answer, the key, the path or the query; not in an unexpected error either."""
    secret = "xyzzy-secret"  # noqa: S105
    engine = Endless()
    with serving(make_run(engine), keys=ApiKeys([KEY])) as url, caplog.at_level(logging.DEBUG):
        allowed = {"Authorization": f"Bearer {KEY}"}
        assert ask(url, body=WANTED | {"prompt": secret}, headers=allowed)[0] == 200
        assert ask(url, body=WANTED | {secret: 1}, headers=allowed)[0] == 400
        assert ask(url, "GET", f"/{secret}?{secret}={secret}", headers=allowed)[0] == 404
        assert ask(url, body=WANTED, headers={"Authorization": f"Bearer {secret}"})[0] == 401
        engine.failure = ValueError(secret)
        status, _, body = ask(url, body=WANTED | {"prompt": secret}, headers=allowed)
        assert (status, json.loads(body)["error"]["code"]) == (500, "internal_error")
        metrics = ask(url, "GET", "/metrics", headers=allowed)[2].decode()
    shown = capfd.readouterr()
    written = caplog.text + shown.out + shown.err + metrics
    assert "unexpected ValueError at" in caplog.text  # it was looked for in the right place
    assert "POST /v1/completions 200" in caplog.text
    for word in (secret, KEY, "battery"):
        assert word not in written


def test_an_error_of_the_black_box_is_a_502_before_the_first_token_and_an_event_after_it(serving, make_run, client_of):
    """And tells no client what the API said: one error ends everybody's answers, and may quote anybody's prompt."""
    from fedpt_secure.errors import BlackBoxError

    engine = Endless(failure=BlackBoxError("api.internal answered 'cannot read: my pin is 5512'", hint="see 10.0.0.7"))
    with serving(make_run(engine), new_tokens=50_000) as url, client_of(url) as client:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(**WANTED, stream=stream)
            assert caught.value.status_code == 502
            assert caught.value.body["message"] == "the large model's API failed"
        failure, engine.failure = engine.failure, None
        stream = iter(client.completions.create(**WANTED | {"max_tokens": 50_000}, stream=True))
        next(stream)
        engine.failure = failure
        with pytest.raises(openai.APIError, match=r"^the large model's API failed$"):
            list(stream)
        engine.failure = None
        assert client.completions.create(**WANTED).usage.completion_tokens == 2


def test_metrics_count_what_happened(serving, make_run):
    with serving(make_run(Endless())) as url:
        assert ask(url, body=WANTED)[0] == 200
        assert ask(url, body=WANTED | {"model": "nobody's"})[0] == 404
        figures = ask(url, "GET", "/metrics")[2].decode()
    for line in (
        'fedpt_requests_total{route="/v1/completions",status="200"} 1.0',
        'fedpt_requests_total{route="/v1/completions",status="404"} 1.0',
        'fedpt_tokens_total{arm="proxied",kind="prompt"} 2.0',
        'fedpt_tokens_total{arm="proxied",kind="completion"} 2.0',
        "fedpt_answers_running 0.0",
        "fedpt_first_token_seconds_count 1.0",
        "fedpt_step_rows_count 2.0",
    ):
        assert line in figures
    assert "nobody" not in figures


def test_the_privacy_statement_is_served_and_its_absence_said(serving, make_run, url):
    assert json.loads(ask(url, "GET", "/v1/privacy")[2])["epsilon"] == 4.0
    import dataclasses

    with serving(dataclasses.replace(make_run(Endless()), privacy=None)) as other:
        assert ask(other, "GET", "/v1/privacy")[0] == 404


def test_compare_streams_the_arms_and_what_tuning_changed(url):
    wanted = {"prompt": "hey, how was", "max_tokens": 6}
    status, headers, body = ask(url, path="/v1/compare", body=wanted)
    assert (status, headers["Content-Type"].split(";")[0]) == (200, "text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in body.decode().split("\n\n") if line]
    texts = {arm: "".join(e["text"] for e in events if e["arm"] == arm) for arm in ("large", "small", "proxied")}
    for arm, model in (("large", "tiny:large"), ("small", "tiny:small"), ("proxied", "tiny")):
        plain = ask(url, body=wanted | {"model": model, "temperature": 0})[2]
        assert json.loads(plain)["choices"][0]["text"] == texts[arm]
    steered = [token for event in events if event["arm"] == "proxied" for token in event["tokens"]]
    assert len(steered) == 6
    assert any(token["changed"] for token in steered)
    for token in steered:
        assert token["changed"] == (token["text"] != token["large_token"])
        assert token["shift"] == pytest.approx(token["logprob"] - token["large_logprob"])
    assert all("changed" not in token for e in events if e["arm"] != "proxied" for token in e["tokens"])
    alone = ask(url, path="/v1/compare", body=wanted | {"alpha": 0.0, "arms": ["proxied"]})[2].decode()
    assert '"changed": true' not in alone
    assert ask(url, path="/v1/compare", body=wanted | {"arms": ["small", "small"]})[0] == 400


def test_compare_tells_no_probability_where_none_may_be_told(serving, make_run):
    with serving(make_run(), max_logprobs=0) as url:
        body = ask(url, path="/v1/compare", body={"prompt": "hey", "max_tokens": 3})[2].decode()
    assert '"changed"' in body
    assert "logprob" not in body
    assert "shift" not in body


def test_stopping_lets_running_answers_end_and_refuses_new_ones(make_run, client_of):
    from fedpt_secure.serving import HttpServer, Listener, ServeSettings, create_app

    settings = ServeSettings(name="tiny", port=0, shutdown_seconds=20.0)
    listener, ready = Listener(settings), threading.Event()
    app = create_app(make_run(Endless(0.02)), settings, ApiKeys())
    server = HttpServer(app, listener, settings, on_ready=ready.set)
    thread = threading.Thread(target=server.run)
    thread.start()
    assert ready.wait(20)
    with client_of(listener.url) as client:
        stream = iter(client.completions.create(**WANTED | {"max_tokens": 60}, stream=True))
        next(stream)
        server.stop()
        chunks = list(stream)
    assert len(chunks) == 59
    assert chunks[-1].choices[0].finish_reason == "length"
    thread.join(20)
    assert not thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        ask(listener.url, "GET", "/healthz")


def test_an_answer_that_takes_too_long_does_not_hold_up_the_end(make_run, client_of):
    from fedpt_secure.serving import HttpServer, Listener, ServeSettings, create_app

    settings = ServeSettings(name="tiny", port=0, shutdown_seconds=1.0, new_tokens=50_000)
    listener, ready = Listener(settings), threading.Event()
    engine = Endless(0.02)
    server = HttpServer(create_app(make_run(engine), settings, ApiKeys()), listener, settings, on_ready=ready.set)
    thread = threading.Thread(target=server.run)
    thread.start()
    assert ready.wait(20)
    with client_of(listener.url) as client:
        stream = iter(client.completions.create(**WANTED | {"max_tokens": 50_000}, stream=True))
        next(stream)
        began = time.monotonic()
        server.stop()
        with pytest.raises(Exception, match=r"(?i)peer|closed|incomplete|connection"):
            list(stream)
    thread.join(20)
    assert not thread.is_alive()
    assert time.monotonic() - began < 10
    assert not engine.rows
