"""The server has no path on which one client's vector exists in the clear.

Shown on its types and on the bytes it receives.
"""

import inspect

import numpy as np
import pytest

from fedpt_secure.crypto import BelowThreshold, RoundContext, SecAggServer
from fedpt_secure.crypto import messages as m
from fedpt_secure.crypto.packing import unpack


def _arrays(value, seen=None):
    """Every array and every long byte string reachable from an object's attributes."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, np.ndarray | memoryview | bytearray) or (isinstance(value, bytes) and len(value) > 200):
        yield value
    elif isinstance(value, dict):
        for item in [*value.keys(), *value.values()]:
            yield from _arrays(item, seen)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _arrays(item, seen)
    elif hasattr(value, "__dict__"):
        yield from _arrays(vars(value), seen)


def test_only_aggregate_returns_a_vector():
    """By type: of all public methods and properties one returns an array, and it takes no client's name."""
    returning = {}
    for name, member in inspect.getmembers(SecAggServer):
        if name.startswith("_"):
            continue
        function = member.fget if isinstance(member, property) else member
        returning[name] = (inspect.signature(function).return_annotation, inspect.signature(function).parameters)
    vectors = [name for name, (annotation, _) in returning.items() if "RingVector" in str(annotation)]
    assert vectors == ["aggregate"]
    assert list(returning["aggregate"][1]) == ["self"]
    allowed = {"None", "bytes", "dict[str, bytes]", "RingVector", "ServerState", "tuple[str, ...]"}
    assert {str(annotation) for annotation, _ in returning.values()} <= allowed


def test_after_every_masked_vector_the_server_holds_one_running_sum_and_no_vector(make_cohort):
    """By bytes.

    Nothing reachable from the server equals, or holds, any client's plain or masked vector, from the second
    one on; before that the sum is the first masked vector, which is uniform.
    """
    cohort = make_cohort(5)
    a_round = cohort.round(cohort.context(vector_length=400)).advertise().share()
    server, masked = a_round.server, {}
    for count, name in enumerate(cohort.ids, start=1):
        sent = a_round.clients[name].mask(a_round.inboxes[name], a_round.vectors[name])
        body = m.decode(sent, m.MaskedVector, a_round.context, body_bytes=2000).vector
        masked[name] = unpack(bytes(body), 400, 32)
        server.receive_masked(name, sent)
        held = list(_arrays(server))
        arrays = [value for value in held if isinstance(value, np.ndarray)]
        assert len(arrays) == 1
        for other, vector in a_round.vectors.items():
            secret = vector.tobytes()
            assert not any(secret in bytes(value) for value in held)
            if count > 1 and other in masked:
                assert not any(masked[other].tobytes() in bytes(value) for value in held)
    a_round.survivor_list = server.publish_survivors()
    total = a_round.confirm().unmask().server.aggregate()
    assert (total == a_round.plain_sum(cohort.ids)).all()
    assert not list(_arrays(server))


def test_no_message_to_the_server_holds_a_plain_vector(make_cohort):
    cohort = make_cohort(4)
    a_round = cohort.round(cohort.context(vector_length=100)).advertise().share().mask().confirm().unmask()
    received = b"".join(message for phase in a_round.sent.values() for message in phase.values())
    for vector in a_round.vectors.values():
        for start in range(0, 100, 4):
            assert vector[start : start + 4].tobytes() not in received


def test_no_round_can_be_set_up_to_end_with_one_client(make_cohort):
    """A sum of one would be a vector: the context's floors are two, for the threshold and for the survivors."""
    cohort = make_cohort(3)
    context = cohort.context(threshold=2, minimum_survivors=2)
    assert isinstance(context, RoundContext)
    a_round = cohort.round(context).advertise().share()
    name = cohort.ids[0]
    a_round.server.receive_masked(name, a_round.clients[name].mask(a_round.inboxes[name], a_round.vectors[name]))
    with pytest.raises(BelowThreshold):
        a_round.server.publish_survivors()
    assert not list(_arrays(a_round.server))
