"""The adapters of remote APIs against a real server: right answers, and every fault an error."""

from __future__ import annotations

import datetime
import itertools
import logging
import math
import ssl
import time

import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fedpt_secure.endpoint import Endpoint
from fedpt_secure.errors import BlackBoxError, ConfigError, ModelError
from fedpt_secure.proxy.black_box import guard
from fedpt_secure.proxy.http_transport import HttpTransport, TransportSettings
from fedpt_secure.proxy.top_source import RemoteLM

DIALECTS = ["llama.cpp", "vllm", "llamacpp", "other"]
TEXT = [72, 105, 3, 260, 9]


def expected(server, texts):
    return torch.tensor(np.array([server.logprobs(text) for text in texts]), dtype=torch.float32)


@pytest.mark.parametrize("dialect", ["llama.cpp", "vllm", "llamacpp"])
def test_full_answers_over_http_are_the_models_own(api_server, connect, dialect):
    server = api_server(dialect)
    source = connect(server, **({} if dialect == "llama.cpp" else {"top_k": server.size}))
    box = guard(RemoteLM(source))
    assert box.capabilities.full_vocabulary
    (scored,) = box.score([TEXT])
    torch.testing.assert_close(scored, expected(server, [TEXT[:end] for end in range(1, 6)]))
    session = box.start([TEXT, [1, 2]])
    torch.testing.assert_close(session.logprobs(), expected(server, [TEXT, [1, 2]]))
    session.append([7, 8])
    torch.testing.assert_close(session.logprobs(), expected(server, [[*TEXT, 7], [1, 2, 8]]))
    if not box.capabilities.draft_scoring:
        with pytest.raises(BlackBoxError, match="several tokens"):
            session.score_draft([[3], [4]])
        return
    before = len(server.requests)
    drafts = session.score_draft([[3, 4], []])
    assert len(server.requests) - before == 2  # one call a row, whatever the draft's length
    torch.testing.assert_close(drafts[0], expected(server, [[*TEXT, 7], [*TEXT, 7, 3], [*TEXT, 7, 3, 4]]))
    torch.testing.assert_close(drafts[1], expected(server, [[1, 2, 8]]))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_truncated_answers_hold_the_most_likely_tokens(api_server, connect, dialect):
    server = api_server(dialect)
    source = connect(server) if dialect == "llama.cpp" else connect(server, top_k=5)
    for top, end in zip(source.last_positions(TEXT, 3, 4), (3, 4, 5), strict=True):
        values = server.logprobs(TEXT[:end])
        known = np.argsort(-values)[:4]
        if dialect == "other":  # names tokens by text: fragments of characters are nobody's
            known = [token for token in known if "\ufffd" not in server.text_of(token)]
        assert top.ids.tolist() == [int(token) for token in known][: len(top.ids)]
        assert len(top.ids) >= len(known) - (dialect == "other")
        np.testing.assert_allclose(top.logprobs, values[top.ids])


@pytest.mark.parametrize(("dialect", "calls"), [("vllm", 1), ("other", 1), ("llamacpp", 1), ("llama.cpp", 1)])
def test_a_text_and_a_batch_take_one_call(api_server, connect, dialect, calls):
    server = api_server(dialect)
    source = connect(server)
    before = len(server.requests)
    source.last_positions(TEXT, len(TEXT), 3)
    assert len(server.requests) - before == calls
    source.next_tokens([TEXT] * 3, 3)
    assert len(server.requests) - before == calls + 1
    assert source.capabilities.prompt_logprobs == (dialect in ("vllm", "other"))


@pytest.mark.parametrize("dialect", ["vllm", "other"])
def test_tokens_of_the_callers_choice_are_scored(api_server, connect, dialect):
    server = api_server(dialect)
    scores = connect(server).token_scores(TEXT, [100, 7])
    np.testing.assert_allclose(scores, server.logprobs(TEXT)[[100, 7]])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_logit_bias_moves_the_choice_and_is_clamped(api_server, connect, dialect):
    server = api_server(dialect)
    source = connect(server)
    token = source.biased_token(TEXT, {42: 500.0}, temperature=0.0, top_p=1.0)
    assert token == 42
    sent = server.requests[-1].body["logit_bias"]
    assert sent in ([[42, 100.0]], {"42": 100.0})
    if dialect == "llama.cpp":
        return
    with pytest.raises(BlackBoxError, match="takes 300"):
        source.biased_token(TEXT, dict.fromkeys(range(301), 1.0), temperature=0.0, top_p=1.0)


def test_asking_for_more_than_the_api_can_do_names_the_alternative(api_server, connect):
    source = connect(api_server("vllm"))
    assert source.capabilities.largest_top_k == 20
    with pytest.raises(BlackBoxError, match="20 most likely at most") as caught:
        guard(RemoteLM(source)).score([TEXT])
    assert "CompletedLM" in caught.value.hint
    with pytest.raises(BlackBoxError, match="gives 20"):
        source.next_tokens([TEXT], 21)
    server = api_server("vllm")
    server.largest_top_k = 10
    with pytest.raises(BlackBoxError, match="asked for 20 log-probabilities") as caught:
        connect(server)
    assert "api.top_k" in caught.value.hint
    with pytest.raises(BlackBoxError, match="scores no single tokens"):
        connect(api_server("llama.cpp")).token_scores(TEXT, [1])


def test_a_server_without_echo_is_asked_step_by_step(api_server, connect):
    server = api_server("other")
    server.echo = False
    source = connect(server)
    assert not source.capabilities.prompt_logprobs
    assert len(source.last_positions(TEXT, 5, 5)) == 5


def test_a_server_without_log_probabilities_keeps_its_logit_bias(api_server, connect):
    server = api_server("other")
    server.has_logprobs = False
    source = connect(server)
    assert source.capabilities.largest_top_k == 0
    with pytest.raises(BlackBoxError, match="returns none") as caught:
        guard(RemoteLM(source)).start([TEXT])
    assert "generate_biased" in caught.value.hint
    assert source.biased_token(TEXT, {42: 50.0}, temperature=0.0, top_p=1.0) == 42


def test_the_model_and_its_context_must_be_known(api_server, connect):
    server = api_server("other")
    with pytest.raises(ConfigError, match="context length"):
        connect(server, context_length=None)
    assert connect(api_server("vllm"), context_length=None).capabilities.context_length == 64
    server.describe = lambda path: {"data": [{"id": "a"}, {"id": "b"}]}
    with pytest.raises(ConfigError, match="2 models: 'a', 'b'"):
        connect(server)


# Faults. Each is injected into the first answer, and where it may pass the second attempt succeeds.


def status(code, **headers):
    return lambda handler: handler.answer({"error": "later"}, status=code, headers=headers.items()) or True


def hangs(handler):
    time.sleep(1.0)
    return True


def drips(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "20000")
    handler.end_headers()
    for _ in range(200):  # ten seconds, unless the client hangs up
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)
    return True


def drips_headers(handler):
    for _ in range(200):  # ten seconds, unless the client hangs up
        handler.wfile.write(b"H")
        handler.wfile.flush()
        time.sleep(0.05)
    return True


def hangs_up(handler):
    handler.close_connection = True
    handler.connection.close()
    return True


def cut_short(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"ind')
    handler.close_connection = True
    return True


def half_json(handler):
    return handler.answer(b'[{"index": 0, "tok' if handler.path == "/completion" else b'{"choices": [{"ind') or True


PASSING = {
    "429": status(429, **{"Retry-After": "0"}),
    "429-date": status(429, **{"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
    "500": status(500),
    "503": status(503),
    "timeout": hangs,
    "slow-drip": drips,
    "slow-headers": drips_headers,
    "hang-up": hangs_up,
    "cut-short": cut_short,
    "half-json": half_json,
}


SLOW = (hangs, drips, drips_headers)


@pytest.mark.parametrize(
    ("dialect", "fault"),
    [
        pytest.param(dialect, fault, id=f"{name}-{dialect}")
        for name, fault in PASSING.items()
        for dialect in (["vllm"] if fault in SLOW else ["llama.cpp", "vllm"])
    ],
)
def test_what_may_pass_is_tried_again_and_then_given_up(api_server, connect, dialect, fault):
    server = api_server(dialect)
    source = connect(server)
    before = source.usage.requests
    server.faults.append(fault)
    (top,) = source.next_tokens([TEXT], 3)
    assert top.ids[0] == server.logprobs(TEXT).argmax()
    assert source.usage.requests - before == 2
    server.faults.extend([fault, fault])
    began = time.monotonic()
    with pytest.raises(BlackBoxError, match="no usable answer in 2 attempts"):
        source.next_tokens([TEXT], 3)
    assert time.monotonic() - began < 8  # two attempts of 1 s at most, and what the machine is late


def test_retry_after_is_honoured_and_bounded(api_server, connect):
    server = api_server("vllm")
    source = connect(server)
    server.faults.append(status(429, **{"Retry-After": "1"}))
    began = time.monotonic()
    source.next_tokens([TEXT], 3)
    assert time.monotonic() - began >= 1.0
    server.faults.append(status(429, **{"Retry-After": "3600"}))
    with pytest.raises(BlackBoxError, match="left alone for 3600 s"):
        source.next_tokens([TEXT], 3)


def redirect(target):
    return lambda handler: handler.answer(b"", status=307, headers=[("Location", target)]) or True


def test_a_redirect_to_another_host_is_refused_and_nothing_is_sent_there(api_server, connect):
    server, other = api_server("vllm"), api_server("vllm")
    source = connect(server, key="sk-secret")
    server.faults.append(redirect(other.url + "/completions"))
    with pytest.raises(BlackBoxError, match="redirects to http://127"):
        source.next_tokens([TEXT], 3)
    assert other.requests == []


def endless(handler):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    piece = b" " * 65536
    try:
        for _ in range(160_000):  # 10 GB
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    except OSError:
        handler.hung_up_on = True
    return True


def announced_as_huge(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", str(10 << 30))
    handler.end_headers()
    return True


def compressed(handler):
    return handler.answer(b"\x1f\x8b", headers=[("Content-Encoding", "gzip")]) or True


@pytest.mark.parametrize("dialect", ["llama.cpp", "vllm"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [(endless, "more than"), (announced_as_huge, "10,737,418,240 bytes"), (compressed, "compressed")],
    ids=["chunked", "announced", "compressed"],
)
def test_a_huge_answer_is_given_up_where_it_stops_making_sense(api_server, connect, dialect, fault, message):
    server = api_server(dialect)
    source = connect(server)
    server.faults.append(fault)
    before = source.usage.bytes_received
    with pytest.raises(BlackBoxError, match=message):
        source.next_tokens([TEXT], 3)
    assert source.usage.bytes_received - before < 1 << 20


def replaced(index, token=None, value=None):
    def spoil(entries):
        old = entries[index]
        entries[index] = (old[0] if token is None else token, old[1] if value is None else value)
        return entries

    return spoil


SENSELESS = {
    "nan": (replaced(1, value=math.nan), "no usable answer"),
    "null": (replaced(1, value=math.nan), "no usable answer"),
    "above-0": (replaced(0, value=0.5), "not at most 0"),
    "too-much-mass": (lambda entries: [(token, -0.1) for token, _ in entries], "more than 1"),
    "missing": (lambda entries: entries[:-1], "2 tokens where 3 were asked"),
    "none": (lambda entries: [], "0 tokens where 3|none of the API"),
    "foreign-id": (replaced(2, token=5000), "token id 5000"),
}


@pytest.mark.parametrize("dialect", ["llama.cpp", "vllm", "llamacpp"])
@pytest.mark.parametrize(("spoil", "message"), SENSELESS.values(), ids=SENSELESS)
def test_a_senseless_answer_is_an_error(api_server, connect, dialect, spoil, message):
    server = api_server(dialect)
    source = connect(server)
    server.spoil = spoil
    with pytest.raises(BlackBoxError, match=message):
        source.next_tokens([TEXT], 3)


@pytest.mark.parametrize("dialect", ["llama.cpp", "llamacpp"])
def test_a_token_twice_is_an_error(api_server, connect, dialect):
    server = api_server(dialect)
    source = connect(server)
    server.spoil = lambda entries: [entries[0], entries[0], *entries[2:]]
    with pytest.raises(BlackBoxError, match="2 times"):
        source.next_tokens([TEXT], 3)


def test_answers_for_other_prompts_than_asked_are_errors(api_server, connect):
    server = api_server("llama.cpp")
    source = connect(server)
    plain = server.respond
    server.respond = lambda path, body: plain(path, body)[:-1]
    with pytest.raises(BlackBoxError, match="1 of 2 prompts"):
        source.next_tokens([TEXT, TEXT], 3)
    server.respond = lambda path, body: [{**answer, "index": 0} for answer in plain(path, body)]
    with pytest.raises(BlackBoxError, match="2 of 2 prompts"):
        source.next_tokens([TEXT, TEXT], 3)
    server.respond = lambda path, body: [{**answer, "tokens_evaluated": 3} for answer in plain(path, body)]
    with pytest.raises(BlackBoxError, match="read 3 of the 5 tokens"):
        source.next_tokens([TEXT], 3)


def test_json_of_another_form_is_not_tried_again(api_server, connect):
    server = api_server("vllm")
    source = connect(server)
    server.faults.append(lambda handler: handler.answer({"choices": "none"}) or True)
    before = source.usage.requests
    with pytest.raises(BlackBoxError, match="another form"):
        source.next_tokens([TEXT], 3)
    assert source.usage.requests - before == 1


@pytest.mark.parametrize("dialect", DIALECTS)
def test_another_vocabulary_is_refused_by_its_first_difference(api_server, connect, dialect, other_tokenizer):
    with pytest.raises(ModelError) as caught:
        connect(api_server(dialect, other_tokenizer))
    if dialect != "other":
        assert "token" in caught.value.message
        assert "for our tokenizer" in caught.value.message
    assert "--large-tokenizer" in caught.value.hint


def test_the_same_cut_with_other_strings_is_found_by_asking_for_every_token(api_server, connect):
    server = api_server("llama.cpp")
    plain = server.respond

    def respond(path, body):
        answer = plain(path, body)
        if path == "/detokenize" and 270 in body["tokens"]:
            answer["content"] = answer["content"].replace(server.text_of(270), "XY")
        return answer

    server.respond = respond
    with pytest.raises(ModelError, match=r"token 270 is .* and 'XY'"):
        connect(server)


def test_a_padded_output_layer_is_cut_and_normalised(api_server, connect):
    server = api_server("llama.cpp")
    server.size += 6  # columns that are no token
    source = connect(server)
    values = server.logprobs(TEXT)[: source.vocabulary.size]
    row = RemoteLM(source).start([TEXT]).logprobs()[0]
    torch.testing.assert_close(row, torch.tensor(values).log_softmax(-1).float())


def test_the_key_is_sent_and_never_shown(api_server, connect, caplog):
    key = "sk-very-secret-0123456789"
    server = api_server("vllm")
    with caplog.at_level(logging.DEBUG):
        source = connect(server, key=key)
        assert server.requests[-1].headers["Authorization"] == f"Bearer {key}"

        def quotes_the_key(handler):
            return handler.answer({"error": handler.headers["Authorization"]}, status=401) or True

        def quotes_it_and_fails(handler):
            return handler.answer({"error": handler.headers["Authorization"]}, status=503) or True

        shown = [repr(source._transport)]
        for faults in ([quotes_the_key], [quotes_it_and_fails] * 2, [redirect(f"http://other/{key}")]):
            server.faults.extend(faults)
            with pytest.raises(BlackBoxError) as caught:
                source.next_tokens([TEXT], 3)
            assert "[key]" in caught.value.message
            error = caught.value
            while error is not None:
                shown += [str(error), repr(error), getattr(error, "hint", "")]
                error = error.__cause__ or error.__context__
    assert not [text for text in [*shown, caplog.text] if key in text]
    with pytest.raises(ConfigError) as caught:
        connect(server, key="sk-with\nnewline")
    assert "sk-with" not in str(caught.value)


def test_connections_are_used_again_and_everything_sent_is_counted(api_server, connect):
    server = api_server("vllm")
    source = connect(server)
    before, sent = source.usage, len(server.requests)
    for _ in range(5):
        source.next_tokens([TEXT, [1]], 3)
    assert server.connections == 1
    assert source.usage.requests - before.requests == len(server.requests) - sent == 5
    assert source.usage.prompt_tokens - before.prompt_tokens == 5 * 6
    assert source.usage.bytes_sent > before.bytes_sent
    assert source.usage.bytes_received > before.bytes_received


def test_requests_keep_to_the_rate(api_server, connect):
    server = api_server("vllm")
    source = connect(server, settings=TransportSettings(requests_per_second=20))
    began = time.monotonic()
    for _ in range(5):
        source.next_tokens([TEXT], 3)
    assert time.monotonic() - began >= 4 / 20


def test_a_certificate_that_nobody_vouches_for_is_refused_at_once(api_server, impatient, tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    both = tmp_path / "server.pem"
    both.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(Encoding.PEM)
    )
    server = api_server("vllm")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
    endpoint = Endpoint.parse(f"openai:https://localhost:{server._server.server_address[1]}/v1")
    transport = HttpTransport(endpoint, impatient, key="sk-secret")
    with pytest.raises(BlackBoxError, match="certificate of localhost cannot be verified"):
        transport.get(f"{endpoint.url}/models", bytes, largest_answer_bytes=1000).result()
    transport.close()
    assert transport.usage.requests == 1
    assert server.requests == []


def test_a_transport_speaks_to_its_own_host_only(impatient):
    transport = HttpTransport(Endpoint.parse("openai:http://127.0.0.1:1/v1"), impatient)
    for url in ("http://127.0.0.1:11/v1", "http://127.0.0.1/v1", "https://127.0.0.1:1/v1", "http://127.0.0.1:1.evil/"):
        with pytest.raises(BlackBoxError, match="is not at"):
            transport.get(url, bytes, largest_answer_bytes=1)


def test_a_closed_adapter_says_so(api_server, connect):
    source = connect(api_server("vllm"))
    source.close()
    with pytest.raises(BlackBoxError, match="closed"):
        source.next_tokens([TEXT], 3)


def test_no_server_at_all_is_a_short_story(api_server, connect):
    server = api_server("vllm")
    source = connect(server)
    server.faults.append(hangs_up)  # else the connection of before would go on in its own thread
    server.close()
    with pytest.raises(BlackBoxError, match=r"2 attempts; the last: (connection failed|timeout)"):
        source.next_tokens([TEXT], 3)


def test_settings_out_of_range_are_refused():
    for name, value in itertools.product(("attempts", "total_timeout_s", "requests_per_second"), (0, -1, math.inf)):
        with pytest.raises(ConfigError, match=name):
            TransportSettings(**{name: value})
