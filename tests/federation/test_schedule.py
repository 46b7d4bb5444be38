"""Cohorts are public, reproducible, distinct within a round, and even over the run."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fedpt_secure.federation.schedule import cohort_schedule, participations


@settings(deadline=None)
@given(clients=st.integers(3, 40), cohort=st.integers(3, 40), rounds=st.integers(1, 30), seed=st.integers(0, 99))
def test_cohorts_have_distinct_members_and_nobody_takes_part_much_more_often(clients, cohort, rounds, seed):
    ids = [f"c{index}" for index in range(clients)]
    cohort = min(cohort, clients)
    schedule = cohort_schedule(ids, rounds=rounds, cohort=cohort, seed=seed)
    assert len(schedule) == rounds
    assert all(len(set(members)) == cohort == len(members) for members in schedule)
    counts = participations(schedule)
    assert set(counts) <= set(ids)
    assert max(counts.values()) <= -(-rounds * cohort // clients) + 1


def test_the_seed_fixes_the_schedule_and_the_order_of_ids_does_not_matter():
    ids = [f"c{index}" for index in range(10)]
    one = cohort_schedule(ids, rounds=5, cohort=4, seed=1)
    assert one == cohort_schedule(ids[::-1], rounds=5, cohort=4, seed=1)
    assert one != cohort_schedule(ids, rounds=5, cohort=4, seed=2)


def test_everybody_is_in_a_round_once_before_anybody_is_in_twice():
    schedule = cohort_schedule([f"c{index}" for index in range(12)], rounds=3, cohort=4, seed=0)
    assert set(participations(schedule).values()) == {1}
