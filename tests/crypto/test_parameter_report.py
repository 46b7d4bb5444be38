"""The reported probabilities are those of the promise, and the reported bytes are those of a round."""

from __future__ import annotations

from dataclasses import replace
from math import log, log2

import pytest
from scipy.stats import hypergeom

from fedpt_secure.crypto import (
    ParameterError,
    client_bytes,
    failure_probabilities,
    secure_aggregation_parameters,
)


@pytest.mark.parametrize("cohort", [256, 1000])
@pytest.mark.parametrize(("security", "correctness", "grinding"), [(40, 20, 64), (40, 20, 0), (30, 15, 32)])
def test_what_is_reached_is_what_was_asked_for(cohort, security, correctness, grinding):
    asked = {"security_bits": security, "correctness_bits": correctness, "grinding_bits": grinding}
    chosen = secure_aggregation_parameters(cohort, 0.1, 0.1, **asked)
    reached = failure_probabilities(chosen, dropouts=cohort // 10, grinding_bits=grinding)
    assert reached.split_log2 is None or reached.split_log2 < -security - 1
    assert reached.neighbourhood_log2 is None or reached.neighbourhood_log2 < -security - 1
    assert reached.lost_round_log2 is not None
    assert reached.lost_round_log2 < -correctness


def test_tails_agree_with_scipy():
    chosen = secure_aggregation_parameters(1000, 0.1, 0.1)
    reached = failure_probabilities(chosen, dropouts=100)
    bad = hypergeom(899, 100, chosen.degree).logsf(chosen.tolerated_corruptions) / log(2) + log2(1000) + 64
    lost = hypergeom(999, 899, chosen.degree).logcdf(chosen.threshold - 1) / log(2) + log2(1000)
    assert reached.neighbourhood_log2 == pytest.approx(bad, abs=1e-6)
    assert reached.lost_round_log2 == pytest.approx(lost, abs=1e-6)


def test_one_neighbour_fewer_would_break_the_promise():
    """The report sees a graph that is too sparse: it does not repeat what was asked for."""
    chosen = secure_aggregation_parameters(1000, 0.1, 0.1)
    sparser = replace(chosen, degree=chosen.degree - 10, threshold=chosen.threshold - 10)
    reached = failure_probabilities(sparser, dropouts=100)
    assert max(reached.split_log2, reached.lost_round_log2 + 20, reached.neighbourhood_log2 + 41) > -41


def test_in_the_complete_graph_nothing_is_left_to_chance():
    reached = failure_probabilities(secure_aggregation_parameters(30, 0.1, 0.1), dropouts=3)
    assert (reached.split_log2, reached.neighbourhood_log2, reached.lost_round_log2) == (None, None, None)


@pytest.mark.parametrize(("size", "elements", "ring_bits"), [(5, 3, 32), (9, 1000, 20), (12, 40_000, 17)])
def test_bytes_are_those_of_a_real_round(size, elements, ring_bits, make_cohort):
    chosen = secure_aggregation_parameters(size, 0.0, 0.2)
    cohort = make_cohort(size)
    context = cohort.context(
        vector_length=elements,
        ring_bits=ring_bits,
        threshold=chosen.threshold,
        minimum_survivors=chosen.minimum_survivors,
    )
    run = cohort.round(context).advertise().share().mask().confirm().unmask()
    last = context.cohort[-1]
    counted = client_bytes(chosen, elements=elements, ring_bits=ring_bits)
    assert counted.up == {phase: len(sent[last]) for phase, sent in run.sent.items()}
    assert counted.down == {
        phase: len(run.server_message(phase, last)) for phase in ("share", "mask", "confirm", "unmask")
    }
    assert counted.total_up == sum(counted.up.values())


@pytest.mark.parametrize(("elements", "ring_bits"), [(0, 32), (10, 15), (10, 65)])
def test_a_vector_that_cannot_be_is_refused(elements, ring_bits):
    chosen = secure_aggregation_parameters(5, 0.0, 0.2)
    with pytest.raises(ParameterError):
        client_bytes(chosen, elements=elements, ring_bits=ring_bits)
