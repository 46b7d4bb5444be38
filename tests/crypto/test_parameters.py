from fractions import Fraction
from math import floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedpt_secure.crypto import ClientPolicy, ParameterError, secure_aggregation_parameters
from fedpt_secure.crypto.parameters import _lower_tail, _smallest_with_upper_tail_below, _upper_tail

PUBLISHED = [
    (64, 0.1, 0.1, 20, 14),
    (256, 0.1, 0.1, 62, 43),
    (1000, 0.1, 0.1, 96, 67),
    (64, 0.2, 0.2, 38, 26),
    (1000, 0.2, 0.2, 302, 206),
    (1000, 0.33, 0.05, 132, 109),
    (1000, 0.05, 0.33, 398, 223),
    (100, 0.33, 0.05, 42, 37),
    (100, 0.3, 0.3, 92, 62),
]


def _published_rule(cohort, corrupt_fraction, dropout_fraction):
    """Bell et al. 2020 for a semi-malicious server, as google/federated-compute has it, on this module's tails.

    It differs from ours in three ways, each in the server's favour: dropouts are random, the neighbours of an honest
    client are drawn from everybody, and the client's own share is not counted.
    """
    corrupt, dropouts = (floor((rate + 1e-14) * cohort) for rate in (corrupt_fraction, dropout_fraction))
    for degree in range(2, cohort - 1, 2):
        pairs = Fraction(cohort * (cohort - degree - 1), 2)
        if pairs * _upper_tail(cohort, corrupt + dropouts, degree, degree) >= Fraction(1, 2**41):
            continue
        bad = _smallest_with_upper_tail_below(Fraction(1, cohort * 2**41), cohort, corrupt, degree)
        threshold = (degree + bad) // 2 + 1
        lost = _lower_tail(cohort, cohort - dropouts, degree, threshold)
        if threshold <= degree and lost < Fraction(1, cohort * 2**20):
            return degree, threshold
    raise AssertionError("no degree")


@pytest.mark.parametrize("row", PUBLISHED, ids=str)
def test_the_exact_tails_reproduce_the_published_table(row):
    *arguments, degree, threshold = row
    assert _published_rule(*arguments) == (degree, threshold)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_tails_are_those_of_scipy(data):
    population = data.draw(st.integers(2, 300))
    marked, drawn = data.draw(st.integers(0, population)), data.draw(st.integers(1, population))
    cut = data.draw(st.integers(0, drawn))
    reference = stats.hypergeom(population, marked, drawn)
    assert float(_upper_tail(population, marked, drawn, cut)) == pytest.approx(
        reference.sf(cut - 1), rel=1e-9, abs=1e-300
    )
    assert float(_lower_tail(population, marked, drawn, cut)) == pytest.approx(
        reference.cdf(cut - 1), rel=1e-9, abs=1e-300
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_quantile_is_the_smallest_that_is_rare_enough(data):
    population = data.draw(st.integers(2, 200))
    marked, drawn = data.draw(st.integers(0, population)), data.draw(st.integers(1, population))
    limit = Fraction(1, 2 ** data.draw(st.integers(0, 60)))
    least = _smallest_with_upper_tail_below(limit, population, marked, drawn)
    assert _upper_tail(population, marked, drawn, least + 1) < limit or limit == 1
    assert least == 0 or _upper_tail(population, marked, drawn, least) >= limit


@pytest.mark.parametrize("cohort", [100, 256, 1000])
@pytest.mark.parametrize("rates", [(0.05, 0.05), (0.1, 0.1), (0.33, 0.05), (0.05, 0.3)])
def test_a_threshold_beats_two_lists_and_leaves_room_for_the_dropouts(cohort, rates):
    found = secure_aggregation_parameters(cohort, *rates)
    holders = cohort if found.degree is None else found.degree + 1
    assert 2 * found.threshold > holders + found.tolerated_corruptions
    assert found.tolerated_corruptions >= floor(rates[0] * (holders - 1))
    assert found.threshold <= (1 - rates[1]) * holders
    assert found.minimum_survivors == cohort - floor(rates[1] * cohort + 1e-9)


def test_ours_is_never_sparser_than_the_published_rule():
    for cohort, corrupt, dropout, degree, _ in PUBLISHED:
        found = secure_aggregation_parameters(cohort, corrupt, dropout, grinding_bits=0)
        assert found.degree is None or found.degree >= degree


def test_sixteen_times_the_clients_need_less_than_twice_the_neighbours():
    degrees = [secure_aggregation_parameters(cohort, 0.05, 0.05).degree for cohort in (500, 1000, 2000, 4000, 8000)]
    assert degrees == sorted(degrees)
    assert degrees[-1] < 2 * degrees[0]


def test_more_bits_need_more_neighbours():
    by_bits = [
        secure_aggregation_parameters(1000, 0.1, 0.1, security_bits=bits, grinding_bits=0).degree
        for bits in (20, 40, 80)
    ]
    assert by_bits == sorted(by_bits)
    assert by_bits[0] < by_bits[-1]


def test_searching_for_a_graph_costs_as_much_as_so_many_more_bits():
    searched = secure_aggregation_parameters(1000, 0.1, 0.1, security_bits=40, grinding_bits=40)
    asked = secure_aggregation_parameters(1000, 0.1, 0.1, security_bits=80, grinding_bits=0)
    assert (searched.degree, searched.threshold) == (asked.degree, asked.threshold)


@pytest.mark.parametrize("cohort", [2, 3, 10, 99])
def test_small_cohorts_get_the_complete_graph(cohort):
    found = secure_aggregation_parameters(cohort, 0.1, 0.1)
    assert found.degree is None
    assert 2 * found.threshold > cohort + floor(0.1 * cohort)
    assert found.threshold <= cohort


def test_the_parameters_fit_context_and_policy(make_cohort):
    found = secure_aggregation_parameters(120, 0.05, 0.05)
    cohort = make_cohort(120)
    context = cohort.context(degree=found.degree, threshold=found.threshold, minimum_survivors=found.minimum_survivors)
    ClientPolicy(
        minimum_cohort=100,
        tolerated_corruptions=found.tolerated_corruptions,
        tolerated_corrupt_clients=found.tolerated_corrupt_clients,
    ).check(context)
    assert "actively malicious" in found.adversary


@pytest.mark.parametrize(
    "arguments",
    [
        (10, 0.5, 0.3),
        (1000, 0.4, 0.4),
        (1, 0.1, 0.1),
        (100_000, 0.1, 0.1),
        (100, -0.1, 0.1),
        (100, 0.1, 1.0),
        (100, float("nan"), 0.1),
    ],
    ids=str,
)
def test_what_no_graph_withstands_is_refused(arguments):
    with pytest.raises(ParameterError):
        secure_aggregation_parameters(*arguments)


def test_negative_bits_are_refused():
    with pytest.raises(ParameterError):
        secure_aggregation_parameters(100, 0.1, 0.1, security_bits=-1)


@pytest.mark.parametrize(
    ("grinding_bits", "expected"),
    [
        (64, {100: (32, 22), 256: (66, 47), 1000: (146, 109), 4000: (186, 139)}),
        (0, {100: (32, 22), 256: (64, 45), 1000: (112, 80), 4000: (134, 96)}),
    ],
)
def test_the_documented_table_is_what_comes_out(grinding_bits, expected):
    """The table in `docs/protocol.md`; degrees here are protocol parameters, so a change of one is worth a look."""
    for cohort, (degree, threshold) in expected.items():
        found = secure_aggregation_parameters(cohort, 0.1, 0.1, grinding_bits=grinding_bits)
        assert (found.degree, found.threshold) == (degree, threshold)
