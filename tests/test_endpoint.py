"""Addresses of black boxes: what is one, what it gives away, and where prompts may go."""

from __future__ import annotations

import pytest

from fedpt_secure.config import RunConfig, build
from fedpt_secure.endpoint import Endpoint
from fedpt_secure.errors import ConfigError


@pytest.mark.parametrize(
    ("spec", "api", "url", "model"),
    [
        ("llama.cpp:http://127.0.0.1:8080", "llama.cpp", "http://127.0.0.1:8080", None),
        ("llama.cpp:http://localhost:8080/base/", "llama.cpp", "http://localhost:8080/base", None),
        ("openai:https://host.example/v1#org/model-7b", "openai", "https://host.example/v1", "org/model-7b"),
        ("openai:http://[::1]:9/v1", "openai", "http://[::1]:9/v1", None),
    ],
)
def test_an_address_names_api_place_and_model(spec, api, url, model):
    endpoint = Endpoint.parse(spec)
    assert (endpoint.api, endpoint.url, endpoint.model) == (api, url, model)
    assert Endpoint.parse(str(endpoint)) == endpoint


@pytest.mark.parametrize("spec", ["", "smollm2", "/models/x", "org/model", "C:/models", "https://host/v1", "llama.cpp"])
def test_weights_are_no_address(spec):
    assert Endpoint.parse(spec) is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("openai:ftp://host/v1", "no http or https"),
        ("openai:host/v1", "no http or https"),
        ("llama.cpp:", "no http or https"),
        ("llama.cpp:http://host:99999", "no http or https"),
        ("llama.cpp:http://127.0.0.1#model", "names a model"),
        ("openai:https://host/v1#a b", "space or a control"),
        ("openai:https://host/v1#a\x1b[2J", "space or a control"),
        ("openai:https://me:sk-secret@host/v1", "carries a user"),
        ("openai:https://host/v1?key=sk-secret", "carries a user"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_without_its_secrets(spec, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Endpoint.parse(spec)
    assert "sk-secret" not in caught.value.message + caught.value.hint
    with pytest.raises(ConfigError, match=r"models\.large"):
        build(RunConfig, {"models": {"large": spec}})


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:1", True),
        ("http://127.9.9.9", True),
        ("http://localhost", True),
        ("http://[::1]:5", True),
        ("http://10.0.0.1", False),
        ("http://0.0.0.0", False),
        ("http://localhost.example", False),
        ("http://127.0.0.1.example", False),
        ("http://2130706433", False),
    ],
)
def test_plain_http_is_for_this_machine_unless_allowed(url, here):
    endpoint = Endpoint.parse(f"llama.cpp:{url}")
    assert endpoint.on_this_machine is here
    settings = {"models": {"large": f"llama.cpp:{url}"}}
    if here:
        endpoint.require_safe(plain_http=False)
        build(RunConfig, settings)
    else:
        with pytest.raises(ConfigError, match="plain http to another machine"):
            endpoint.require_safe(plain_http=False)
        with pytest.raises(ConfigError, match="plain http to another machine") as caught:
            build(RunConfig, settings)
        assert "api.plain_http" in caught.value.message
        build(RunConfig, settings | {"api": {"plain_http": True}})
    Endpoint.parse("openai:https://host/v1").require_safe(plain_http=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_k", -1), ("attempts", 0), ("total_timeout_s", 0.0), ("key_variable", "no such name"), ("candidates", 65)],
)
def test_settings_of_an_api_are_checked_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"api\.{name}"):
        build(RunConfig, {"api": {name: value}})
