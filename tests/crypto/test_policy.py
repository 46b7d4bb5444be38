import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from threading import Barrier

import pytest

from fedpt_secure.crypto import (
    ClientPolicy,
    ClientState,
    Identity,
    MemoryRoundRegister,
    ParameterError,
    PolicyViolation,
    Roster,
    RoundReplayed,
    secure_aggregation_parameters,
)


@pytest.mark.parametrize(
    "policy",
    [
        {"minimum_cohort": 8},
        {"minimum_survivors": 5},
        {"minimum_threshold": 6},
        {"tolerated_corruptions": 3},
    ],
    ids=lambda policy: next(iter(policy)),
)
def test_a_client_refuses_a_round_below_its_own_floors(make_cohort, policy):
    cohort = make_cohort(7)
    context = cohort.context(threshold=5, minimum_survivors=4)
    cohort.client(cohort.ids[0], context, policy=ClientPolicy())
    with pytest.raises(PolicyViolation):
        cohort.client(cohort.ids[0], context, policy=ClientPolicy(**policy))


def test_a_client_refuses_a_threshold_that_two_disjoint_groups_can_reach(make_cohort):
    cohort = make_cohort(6)
    with pytest.raises(PolicyViolation, match="two survivor lists"):
        cohort.client(cohort.ids[0], cohort.context(threshold=3))
    cohort.client(cohort.ids[0], cohort.context(threshold=4))


def test_a_client_refuses_too_sparse_a_graph(make_cohort):
    cohort = make_cohort(8)
    context = cohort.context(degree=4, threshold=4, minimum_survivors=6)
    cohort.client(cohort.ids[0], context, policy=ClientPolicy(minimum_degree=4))
    with pytest.raises(PolicyViolation, match="degree"):
        cohort.client(cohort.ids[0], context, policy=ClientPolicy(minimum_degree=6))


def test_a_client_refuses_a_quorum_that_two_lists_can_reach_with_the_help_of_accomplices(make_cohort):
    cohort = make_cohort(10)
    context = cohort.context(degree=8, threshold=8, minimum_survivors=7)
    cohort.client(cohort.ids[0], context, policy=ClientPolicy(tolerated_corrupt_clients=3))
    with pytest.raises(PolicyViolation, match="second list"):
        cohort.client(cohort.ids[0], context, policy=ClientPolicy(tolerated_corrupt_clients=4))


@pytest.mark.parametrize(
    ("size", "change", "corrupt"),
    [
        (10, {"degree": 2, "threshold": 2, "minimum_survivors": 7}, 0),
        (10, {"degree": 4, "threshold": 3, "minimum_survivors": 6}, 0),
        (10, {"degree": 8, "threshold": 6, "minimum_survivors": 7}, 3),
        (16, {"degree": 8, "threshold": 6, "minimum_survivors": 10}, 2),
    ],
    ids=["ring", "dropouts alone", "both kinds of shares", "accomplices and dropouts together"],
)
def test_a_client_refuses_a_sparse_graph_that_can_be_split(make_cohort, size, change, corrupt):
    """Two lost clients cut a ring in two, and each half would be summed by itself."""
    cohort = make_cohort(size)
    with pytest.raises(PolicyViolation, match="split the graph"):
        cohort.client(cohort.ids[0], cohort.context(**change), policy=ClientPolicy(tolerated_corrupt_clients=corrupt))


def test_a_client_works_out_for_itself_that_a_sparse_graph_is_dense_enough(make_cohort):
    cohort = make_cohort(1000)
    found = secure_aggregation_parameters(1000, 0.1, 0.1)
    good = {"degree": found.degree, "threshold": found.threshold, "minimum_survivors": found.minimum_survivors}
    corrupt = found.tolerated_corrupt_clients
    ClientPolicy(tolerated_corrupt_clients=corrupt).check(cohort.context(**good))
    for change in ({"degree": 100, "threshold": 75}, {"threshold": found.threshold - 4}):
        with pytest.raises(PolicyViolation, match="split the graph"):
            ClientPolicy(tolerated_corrupt_clients=corrupt).check(cohort.context(**good | change))
    for stricter in ({"tolerated_corrupt_clients": corrupt + 10}, {"graph_security_bits": 50}):
        with pytest.raises(PolicyViolation, match="split the graph"):
            ClientPolicy(**{"tolerated_corrupt_clients": corrupt} | stricter).check(cohort.context(**good))


@pytest.mark.parametrize("field", [field.name for field in fields(ClientPolicy)])
@pytest.mark.parametrize("value", [float("nan"), 2.5, "3", True, None, -1])
def test_a_floor_that_is_no_number_is_no_policy(field, value):
    """Comparisons with NaN are false, so that it would let every round pass."""
    with pytest.raises(ParameterError, match=field):
        ClientPolicy(**{field: value})


@pytest.mark.parametrize("field", ["minimum_cohort", "minimum_survivors", "minimum_threshold", "minimum_degree"])
def test_each_floor_may_be_two_and_no_less(field):
    assert getattr(ClientPolicy(**{field: 2}), field) == 2
    with pytest.raises(ParameterError, match=field):
        ClientPolicy(**{field: 1})


def test_graph_security_beyond_reason_is_a_slip():
    ClientPolicy(graph_security_bits=512)
    with pytest.raises(ParameterError, match="graph_security_bits"):
        ClientPolicy(graph_security_bits=513)


def test_all_violations_are_named_together(make_cohort):
    cohort = make_cohort(5)
    with pytest.raises(PolicyViolation) as caught:
        cohort.client(cohort.ids[0], cohort.context(), policy=ClientPolicy(minimum_cohort=10, minimum_survivors=9))
    assert "cohort" in caught.value.message
    assert "minimum_survivors" in caught.value.message


def test_floors_below_the_protocol_s_own_are_no_policy():
    with pytest.raises(ParameterError):
        ClientPolicy(minimum_survivors=1)


def test_client_identity_roster_and_context_must_belong_together(make_cohort):
    cohort = make_cohort(4)
    context = cohort.context()
    name = cohort.ids[0]
    stranger = Roster({"x": Identity.generate().verify_key_bytes})
    partial = Roster({name: cohort.roster[name]})
    from fedpt_secure.crypto import SecAggClient

    good = {
        "context": context,
        "identity": cohort.identities[name],
        "client_id": name,
        "roster": cohort.roster,
        "policy": ClientPolicy(),
    }
    SecAggClient(**good)
    for change in (
        {"identity": Identity.generate()},
        {"client_id": "nobody"},
        {"client_id": cohort.ids[1]},
        {"roster": stranger},
        {"context": cohort.context(roster_digest=partial.digest), "roster": partial},
    ):
        with pytest.raises(ParameterError):
            SecAggClient(**good | change)


def test_a_round_is_begun_once(make_cohort):
    cohort, register = make_cohort(4), MemoryRoundRegister()
    name = cohort.ids[0]
    cohort.client(name, cohort.context(), register=register)
    with pytest.raises(RoundReplayed):
        cohort.client(name, cohort.context(), register=register)
    with pytest.raises(RoundReplayed):
        cohort.client(name, cohort.context(model_digest=b"n" * 32), register=register)
    cohort.client(name, cohort.context(attempt=1), register=register)


def test_a_round_is_opened_in_one_attempt_only(make_cohort):
    """A second sum over the same updates, with one survivor less, would be that survivor's update in the clear."""
    cohort = make_cohort(4)
    registers = {name: MemoryRoundRegister() for name in cohort.ids}

    def begin(attempt):
        context = cohort.context(attempt=attempt)
        a_round = cohort.round(context)
        a_round.clients = {
            name: cohort.client(name, context, register=register) for name, register in registers.items()
        }
        return a_round

    slow = begin(attempt=0).advertise().share().mask().confirm()
    begin(attempt=1).advertise().share().mask().confirm().unmask()
    for name in cohort.ids:
        with pytest.raises(RoundReplayed):
            slow.clients[name].unmask(slow.confirmations)
        assert slow.clients[name].state is ClientState.ABORTED
    with pytest.raises(RoundReplayed):
        begin(attempt=2)


@pytest.mark.parametrize("sparse", [True, False])
def test_in_a_sparse_graph_a_round_is_confirmed_in_one_attempt_only(make_cohort, sparse):
    """Its holders differ from attempt to attempt, so that two could be opened by clients that each release once.

    In the complete graph they cannot, and an attempt that fails after the confirmations may be repeated.
    """
    cohort = make_cohort(8)
    graph = {"degree": 4, "threshold": 4, "minimum_survivors": 7} if sparse else {}
    registers = {name: MemoryRoundRegister() for name in cohort.ids}
    attempts = []
    for attempt in range(2):
        context = cohort.context(attempt=attempt, **graph)
        a_round = cohort.round(context)
        a_round.clients = {
            name: cohort.client(name, context, register=register) for name, register in registers.items()
        }
        attempts.append(a_round.advertise().share().mask())
    first, second = attempts
    first.confirm()
    if not sparse:
        second.confirm().unmask()
        return
    for name in cohort.ids:
        with pytest.raises(RoundReplayed):
            second.clients[name].confirm(second.survivor_list)
        assert second.clients[name].state is ClientState.ABORTED
    total = first.unmask().server.aggregate()
    assert (total == first.plain_sum(cohort.ids)).all()


@pytest.mark.parametrize("method", ["begin", "release"])
def test_of_threads_that_use_a_register_at_once_one_succeeds(make_cohort, method):
    """Looking and writing in one step: otherwise two sessions of one round could both be opened."""
    context, threads = make_cohort(4).context(), 8
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(50):
                register, together = MemoryRoundRegister(), Barrier(threads)

                def attempt(_, register=register, together=together):
                    together.wait()
                    try:
                        getattr(register, method)(context)
                    except RoundReplayed:
                        return False
                    return True

                assert sum(pool.map(attempt, range(threads))) == 1
    finally:
        sys.setswitchinterval(interval)
