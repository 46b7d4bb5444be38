"""Strangers reach nothing of the SuperLink but what is for SuperNodes, who sign."""

from __future__ import annotations

import asyncio

import pytest

from fedpt_secure.flower.superlink import LocalOnly

REMOTE = ("203.0.113.7", 4711)
LOCAL = ("127.0.0.1", 4711)


def ask(scope):
    """(whether the app was reached, the status that came back)"""
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append(scope["path"])

    async def send(message):
        sent.append(message)

    asyncio.run(LocalOnly(app)(scope, None, send))
    return bool(reached), sent[0].get("status") if sent else None


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet",
        "/v1/fleets/x",
        "//v1/fleet/x",
        "/docs",
        "/openapi.json",
        "/",
        "",
    ],
)
def test_a_stranger_is_turned_away(path):
    for client in (REMOTE, ("2001:db8::1", 1), None):
        assert ask({"type": "http", "path": path, "client": client}) == (False, 403)


def test_supernodes_come_through_from_anywhere():
    assert ask({"type": "http", "path": "/v1/fleet/pull-messages", "client": REMOTE}) == (True, None)


@pytest.mark.parametrize("client", [LOCAL, ("::1", 1)])
def test_this_machine_reaches_everything(client):
    assert ask({"type": "http", "path": "/v1/control/start-run", "client": client}) == (True, None)


def test_a_websocket_is_no_way_in():
    assert ask({"type": "websocket", "path": "/v1/control/x", "client": REMOTE})[0] is False


def test_the_servers_start_is_not_held_up():
    assert ask({"type": "lifespan", "path": ""})[0] is True
