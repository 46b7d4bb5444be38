from itertools import pairwise

import pytest
from scipy import stats

from fedpt_secure.crypto.neighbours import NeighbourGraph, _permutation, mask_sign, share_point


@pytest.fixture(scope="module")
def context(make_cohort):
    return make_cohort(40).context(degree=8, threshold=6, minimum_survivors=30)


def _graph(context, members=range(40), digest=b"d" * 32):
    return NeighbourGraph(context, directory_digest=digest, members=tuple(members))


def test_the_complete_graph_is_the_default(make_cohort):
    context = make_cohort(5).context()
    graph = NeighbourGraph(context, directory_digest=bytes(32), members=(0, 2, 3))
    assert graph.holders(2) == (0, 2, 3)
    assert graph.neighbours(2) == (0, 3)


def test_every_member_has_the_stated_number_of_neighbours_and_neighbourhood_is_mutual(context):
    graph = _graph(context)
    for member in range(40):
        assert len(graph.neighbours(member)) == 8
        assert member not in graph.neighbours(member)
        assert graph.holders(member) == tuple(sorted((*graph.neighbours(member), member)))
        assert all(member in graph.neighbours(other) for other in graph.neighbours(member))


def test_it_is_a_harary_graph_on_a_ring(context):
    """Members that follow one another on the ring share all neighbours but those at the two ends."""
    graph = _graph(context)
    ring = graph._ring
    assert sorted(ring) == list(range(40))
    for one, other in pairwise([*ring, ring[0]]):
        common = set(graph.neighbours(one)) & set(graph.neighbours(other))
        assert len(common) == 8 - 2


def test_the_graph_depends_on_session_and_directory(context, make_cohort):
    base = _graph(context)
    other_directory = _graph(context, digest=b"e" * 32)
    other_round = _graph(make_cohort(40).context(degree=8, threshold=6, minimum_survivors=30, round_index=1))
    neighbourhoods = {graph.neighbours(0) for graph in (base, other_directory, other_round)}
    assert len(neighbourhoods) == 3
    assert _graph(context).neighbours(0) == base.neighbours(0)


def test_a_directory_no_larger_than_a_neighbourhood_is_complete(context):
    members = (1, 4, 6, 9, 11, 17, 20, 30, 39)
    graph = _graph(context, members)
    assert graph.holders(4) == members
    larger = _graph(context, (*members, 2))
    assert len(larger.holders(4)) == 9


def test_fewest_holders_counts_those_present(context, make_cohort):
    graph = _graph(context)
    assert graph.fewest_holders(range(40), range(40)) == 9
    gone = graph.neighbours(7)[:3]
    present = [member for member in range(40) if member not in gone]
    assert graph.fewest_holders([7], present) == 6
    complete = NeighbourGraph(make_cohort(5).context(), directory_digest=bytes(32), members=(0, 1, 2))
    assert complete.fewest_holders([0], (1, 2, 4)) == 2


def test_permutations_are_uniform():
    """Chi-square over the 24 orders of four members, 4,800 seeds; false alarm 1e-6 (seeds are fixed)."""
    counts = {}
    for number in range(4800):
        order = tuple(_permutation(range(4), number.to_bytes(32, "big")))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-6


def test_points_are_never_zero_and_signs_are_opposite():
    assert share_point(0) == 1
    assert mask_sign(1, 2) == -mask_sign(2, 1)
