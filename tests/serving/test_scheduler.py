"""Requests join, share steps, leave, and fail apart."""

from __future__ import annotations

import asyncio

import pytest

from fedpt_secure.errors import BlackBoxError, ConfigError
from fedpt_secure.proxy import DecodingSettings, Request, SteeringRule, TokenEvent
from fedpt_secure.serving.scheduler import EngineFailure, Scheduler, Stopped


def job(prompt=(1,), tokens=3) -> Request:
    settings = DecodingSettings(rule=SteeringRule(alpha=0.0), max_new_tokens=tokens)
    return Request(prompt=tuple(prompt), settings=settings, first_place=0)


class Counter:
    """Prompt `(p,)` says p * 100, p * 100 + 1, ...; 13 ends where `ends`; prompts with 66 are refused."""

    context_length = 1000

    def __init__(self, *, ends=True):
        self.rows, self.next, self.steps = {}, 0, []
        self.failure = None
        self.gate = None
        self.ends = ends
        self.closed = False

    def add(self, request):
        if 66 in request.prompt:
            raise ConfigError("66 is refused")
        self.next += 1
        self.rows[self.next] = [request, 0]
        return self.next

    def step(self):
        if self.gate is not None:
            self.gate.wait(10)
        if self.failure is not None:
            raise self.failure
        self.steps.append(len(self.rows))
        events = []
        for handle, row in list(self.rows.items()):
            token = row[0].prompt[0] * 100 + row[1]
            row[1] += 1
            ending = "length" if row[1] == row[0].settings.max_new_tokens else None
            if self.ends and token % 100 == 13:
                ending = "end"
            events.append(
                TokenEvent(handle=handle, token=token, text="", logprob=0.0, top=(), alone=None, ending=ending)
            )
            if ending:
                del self.rows[handle]
        return events

    def remove(self, handle):
        self.rows.pop(handle, None)

    def close(self):
        self.closed = True


def run(scenario, engine, *, batch_rows=4, **options):
    """A scenario on a loop, with a scheduler; afterwards no row is left in the engine."""
    scheduler = Scheduler(engine, batch_rows=batch_rows, **options)

    async def whole():
        scheduler.start()
        try:
            return await asyncio.wait_for(scenario(scheduler), 20)
        finally:
            await asyncio.to_thread(scheduler.stop)

    result = asyncio.run(whole())
    assert engine.rows == {}
    assert engine.closed
    return result


async def read(continuation):
    return [choice.token async for choice in continuation]


def test_each_gets_its_own_tokens_and_steps_are_shared():
    engine = Counter()

    async def scenario(scheduler):
        return await asyncio.gather(*(read(scheduler.submit(job((number,), 5))) for number in range(1, 11)))

    answers = run(scenario, engine)
    assert answers == [[number * 100 + place for place in range(5)] for number in range(1, 11)]
    assert max(engine.steps) == 4
    assert len(engine.steps) <= 5 * 3 + 4


def test_an_end_token_ends_a_row_early():
    engine = Counter()
    answers = run(lambda scheduler: read(scheduler.submit(job(tokens=50))), engine)
    assert answers == [100 + place for place in range(14)]


def test_the_refused_one_fails_alone():
    async def scenario(scheduler):
        asked = [scheduler.submit(job((number,))) for number in (1, 66, 2)]
        return await asyncio.gather(*map(read, asked), return_exceptions=True)

    first, refused, last = run(scenario, Counter())
    assert (first, last) == ([100, 101, 102], [200, 201, 202])
    assert isinstance(refused, ConfigError)


def test_a_failing_step_reaches_all_who_wait_and_the_server_goes_on():
    engine, seen = Counter(), []

    async def scenario(scheduler):
        engine.failure = BlackBoxError("down")
        failed = await asyncio.gather(*(read(scheduler.submit(job((n,)))) for n in (1, 2)), return_exceptions=True)
        engine.failure = ZeroDivisionError("prompt text")
        odd = await asyncio.gather(read(scheduler.submit(job())), return_exceptions=True)
        engine.failure = None
        return failed, odd, await read(scheduler.submit(job()))

    failed, odd, after = run(scenario, engine, on_failure=seen.append)
    assert all(isinstance(error, BlackBoxError) for error in failed)
    assert isinstance(odd[0], EngineFailure)
    assert "prompt text" not in str(odd[0])
    assert [type(error) for error in seen] == [BlackBoxError, ZeroDivisionError]
    assert after == [100, 101, 102]


def test_a_cancelled_one_leaves_the_batch_and_the_queue():
    import threading

    engine = Counter(ends=False)
    engine.gate = threading.Event()

    async def scenario(scheduler):
        running = [scheduler.submit(job((number,), 1000)) for number in range(4)]
        queued = scheduler.submit(job((9,), 1000))
        while scheduler.running < 4:
            await asyncio.sleep(0.001)
        assert scheduler.waiting == 1
        queued.cancel()
        assert scheduler.waiting == 0
        for continuation in running[1:]:
            continuation.cancel()
        engine.gate.set()
        while scheduler.running > 1:
            await asyncio.sleep(0.001)
        produced = [row[1] for row in engine.rows.values()]
        running[0].cancel()
        return produced

    assert len(run(scenario, engine)) == 1
    assert engine.steps[:2] == [4, 1]  # one more step at most


def test_whoever_waits_when_the_server_stops_is_told():
    engine = Counter(ends=False)

    async def scenario(scheduler):
        continuation = scheduler.submit(job(tokens=10**9))
        waiting = asyncio.create_task(read(continuation))
        while not engine.steps:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(scheduler.stop)
        with pytest.raises(Stopped):
            scheduler.submit(job())
        with pytest.raises(Stopped):
            await waiting

    run(scenario, engine)
