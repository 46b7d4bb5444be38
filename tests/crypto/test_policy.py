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
    context = cohort.context(degree=4, threshold=4, minimum_survivors=7)
    cohort.client(cohort.ids[0], context, policy=ClientPolicy(tolerated_corrupt_clients=3))
    with pytest.raises(PolicyViolation, match="second list"):
        cohort.client(cohort.ids[0], context, policy=ClientPolicy(tolerated_corrupt_clients=4))


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
