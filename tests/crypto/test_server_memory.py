"""The server adds vectors as they arrive: its memory is one vector and a message, whatever the cohort."""

import tracemalloc

import pytest

from fedpt_secure.crypto import SecAggServer

ELEMENTS = 600_000
VECTOR_BYTES = 4 * ELEMENTS


class _Hoarder:
    """The broken variant: a server that keeps what it was sent until the end."""

    def __init__(self, server):
        self._server = server
        self._kept = []

    def receive_masked(self, name, message):
        self._kept.append(bytearray(message))
        self._server.receive_masked(name, message)

    def __getattr__(self, name):
        return getattr(self._server, name)


def _peaks(cohort, *, hoard=False):
    """Bytes that the server allocates at most while it takes all masked vectors, and while it unmasks."""
    context = cohort.context(vector_length=ELEMENTS)
    a_round = cohort.round(context)
    a_round.server = SecAggServer(context=context, roster=cohort.roster, workers=2)
    a_round.advertise().share()
    lost = context.cohort[1]
    survivors = [name for name in context.cohort if name != lost]
    # Clients' messages are made before anything is traced, and so are not counted.
    masked = {name: a_round.answer("mask", name, a_round.inboxes[name]) for name in survivors}
    server = _Hoarder(a_round.server) if hoard else a_round.server
    tracemalloc.start()
    try:
        for name in survivors:
            server.receive_masked(name, masked[name])
        collecting = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    a_round.close("mask")
    a_round.confirm(survivors).unmask(survivors)
    tracemalloc.start()
    try:
        total = a_round.server.aggregate()
        unmasking = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (total == a_round.plain_sum(survivors)).all()
    return collecting, unmasking


@pytest.fixture(scope="module")
def peaks(make_cohort):
    return {size: _peaks(make_cohort(size)) for size in (5, 20)}


def test_taking_masked_vectors_needs_memory_for_one_message_not_for_all(peaks):
    """The encoding that a message is compared with, and room to make it in; the sum itself is older than the trace."""
    for collecting, _ in peaks.values():
        assert collecting < 2 * VECTOR_BYTES
    assert peaks[20][0] < peaks[5][0] + 0.1 * VECTOR_BYTES


def test_unmasking_needs_chunks_not_vectors(peaks):
    """Two threads have two chunks of 256 KiB each; keys and cipher states of 20 clients are small beside that."""
    for _, unmasking in peaks.values():
        assert unmasking < 0.75 * VECTOR_BYTES


def test_a_server_that_keeps_vectors_is_noticed(make_cohort):
    collecting, _ = _peaks(make_cohort(5), hoard=True)
    assert collecting > 3.5 * VECTOR_BYTES
