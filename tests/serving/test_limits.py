"""Rates and room."""

from __future__ import annotations

import pytest

from fedpt_secure.serving import limits
from fedpt_secure.serving.errors import ApiError
from fedpt_secure.serving.limits import Admission, RateLimit


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def accepted(limit, client, tries):
    count = 0
    for _ in range(tries):
        try:
            limit.take(client)
            count += 1
        except ApiError:
            pass
    return count


def test_a_client_gets_its_rate_and_no_more_and_others_are_not_touched():
    clock = Clock()
    limit = RateLimit(60, clock)
    assert accepted(limit, b"a", 100) == 10
    assert accepted(limit, b"b", 100) == 10
    clock.now += 5
    assert accepted(limit, b"a", 100) == 5
    clock.now += 1e6
    assert accepted(limit, b"a", 100) == 10  # an idle hour is not saved up


def test_retry_after_is_when_it_works_again():
    clock = Clock()
    limit = RateLimit(2, clock)
    limit.take(b"a")
    with pytest.raises(ApiError) as caught:
        limit.take(b"a")
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "30")
    clock.now += 30
    limit.take(b"a")


def test_many_clients_take_bounded_memory(monkeypatch):
    monkeypatch.setattr(limits, "_BUCKETS_KEPT", 10)
    limit = RateLimit(60, Clock())
    for number in range(100):
        limit.take(str(number).encode())
    assert len(limit._buckets) == 10


def test_room_is_given_back_however_the_work_ends():
    room = Admission(3)
    with room.of(2):
        with pytest.raises(ApiError) as caught, room.of(2):
            pass
        assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "1")
        with room.of(1):
            assert room.active == 3
    with pytest.raises(ValueError, match="boom"), room.of(3):
        raise ValueError("boom")
    assert room.active == 0
    with pytest.raises(ApiError) as caught, room.of(4):
        pass
    assert caught.value.status == 400
