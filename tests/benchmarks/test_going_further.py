"""The page on going further holds what its script computes from the measured costs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from fedpt_secure.crypto import client_bytes, secure_aggregation_parameters

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "going_further.md"


@pytest.fixture(scope="module")
def going_further():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("going_further")
    for name in ("going_further", "going_further_costs"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def costs(going_further):
    return going_further.Costs.load()


@pytest.fixture(scope="module")
def tables(going_further, costs):
    return {name: going_further.render(table(costs)) for name, table in going_further.TABLES.items()}


def test_the_committed_tables_are_what_the_script_computes(going_further, tables):
    page = PAGE.read_text(encoding="utf-8")
    assert going_further.filled(page, tables) == page


def test_a_figure_changed_by_hand_is_found(going_further, tables):
    page = PAGE.read_text(encoding="utf-8")
    changed = page.replace("83.5 kB", "38.5 kB", 1)
    assert changed != page
    assert going_further.filled(changed, tables) == page


@pytest.mark.parametrize(
    "change",
    [
        lambda page: page.replace("<!-- table: modes -->", ""),
        lambda page: page + "\n<!-- table: wishes -->\n<!-- end -->\n",
        lambda page: page.replace("<!-- end -->", ""),
    ],
)
def test_a_page_whose_markers_do_not_fit_is_refused(going_further, tables, change):
    with pytest.raises(ValueError, match=r"marker|end"):
        going_further.filled(change(PAGE.read_text(encoding="utf-8")), tables)


def test_the_fit_goes_through_what_was_measured(costs):
    for n, entry in costs.rounds.items():
        fit = costs.fit
        assert fit.client_seconds(n, entry["degree"]) == pytest.approx(entry["client_seconds"], rel=0.02)
        assert fit.server_peak_mb(n, entry["degree"]) == pytest.approx(entry["server_peak_mb"], rel=0.02)
        if entry["degree"] < n - 1:
            assert fit.server_seconds(n, entry["degree"]) == pytest.approx(entry["server_seconds"], rel=0.02)
    assert min(*costs.fit.client, *costs.fit.server, *costs.fit.memory) >= 0


def test_computed_bytes_are_those_of_the_measured_rounds(going_further, costs):
    for n, entry in costs.rounds.items():
        parameters = secure_aggregation_parameters(n, going_further.CORRUPT, going_further.DROPOUT)
        computed = client_bytes(parameters, elements=costs.elements).total_up
        assert (
            0 <= computed - entry["client_bytes"] <= 10
        )  # the computed ones are the last client's, whose index is longest


def test_measured_rounds_are_marked_so_and_others_projected(costs):
    assert {n: costs.round(n).mark for n in (64, 256, 1_000, 4_000)} == {64: "m", 256: "m", 1_000: "m", 4_000: "p"}
    assert costs.round(1_000, complete=True).mark == "p"


def test_opened_partial_sums_carry_the_noise_of_their_own_group(going_further, costs):
    """Calibrated by group, ten groups' mean has sqrt(10) times a flat round's noise; in mode local it is the same."""
    for mode, factor in (("local", 1.0), ("distributed", 10**0.5), ("client", 10**0.5)):
        _, _, group = going_further.shares(mode, 500_000, costs.elements, cohort=1_000, asked=10_000)
        _, _, flat = going_further.shares(mode, 500_000, costs.elements, cohort=10_000, asked=10_000)
        assert group / 10**0.5 / flat == pytest.approx(factor, rel=0.01)


def test_delta_is_below_one_over_everything_that_could_be_published(going_further):
    assert going_further.DELTA * max(going_further.DEVICES) * sys.modules["going_further_costs"].RECORDS < 1


def test_no_device_is_asked_more_often_than_the_noise_covers(going_further):
    """The bound is `federation.schedule`'s own, tried on a population small enough to deal."""
    from fedpt_secure.federation.schedule import cohort_schedule, participations

    clients, cohort, rounds = [f"{number}" for number in range(400)], 100, 30
    asked = participations(cohort_schedule(clients, rounds=rounds, cohort=cohort, seed=3))
    scaled = replace_scenario(going_further, rounds=rounds, cohort=cohort, devices=len(clients))
    assert max(asked.values()) <= scaled


def replace_scenario(going_further, *, rounds, cohort, devices):
    """`most_participations` for other numbers of rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(going_further, "ROUNDS_A_DAY", rounds)
        patch.setattr(going_further, "DAYS", 1)
        return going_further.most_participations(devices, cohort)


def test_costs_of_another_adapter_are_refused(going_further):
    import json

    from fedpt_secure.report.device_plan import DeviceCosts

    measured = json.loads(sys.modules["going_further_costs"].COSTS.read_text())
    with pytest.raises(ValueError, match="different adapters"):
        going_further.Costs(measured | {"elements": 1}, DeviceCosts.load())
    with pytest.raises(ValueError, match="schema"):
        going_further.Costs(measured | {"schema": "x"}, DeviceCosts.load())
