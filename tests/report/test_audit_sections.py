"""What an audit found reaches the report: its verdict first, every part as data, nothing when a field is missing."""

from __future__ import annotations

import json
import shutil

import pytest

from fedpt_secure.errors import RunDirectoryError
from fedpt_secure.report import compose_report, render_html, render_markdown

INTERVAL = {"value": 0.51, "low": 0.45, "high": 0.57}
HISTOGRAM = {"edges": [0.0, 1.0, 2.0], "members": [3, 4], "non_members": [5, 2]}
ATTACK = {
    "score": "ratio",
    "auc": INTERVAL,
    "balanced_accuracy": INTERVAL,
    "at_fpr": [
        {
            "level": level,
            "resolvable": level > 0.005,
            "tpr": INTERVAL,
            "fpr": INTERVAL,
            "ceiling": 0.6,
            "above_ceiling": False,
        }
        for level in (0.01, 0.001)
    ],
    "roc": {"fpr": [0.0, 0.0, 0.5, 1.0], "tpr": [0.0, 0.1, 0.6, 1.0]},
    "histogram": HISTOGRAM,
}


def view(name, answers):
    return {
        "view": name,
        "answers": answers,
        "headline": "ratio",
        "members": 7,
        "non_members": 7,
        "attacks": [ATTACK],
        "ceiling": {"fpr": [1e-4, 0.01, 1.0], "tpr": [0.005, 0.5, 1.0]},
    }


@pytest.fixture
def audit():
    """A result with every part, as docs/audits.md describes it."""
    check = {
        "name": "canaries",
        "violation": False,
        "decisive": True,
        "alpha": 0.05,
        "sentence": "epsilon is at least 1.25",
        "epsilon_lower_bound": 1.25,
        "detectable_epsilon": 3.5,
    }
    return {
        "schema": "fedpt-secure/audit/1",
        "verdict": {
            "violation": False,
            "violations": [],
            "sentence": "no violation detected; could have detected eps > 3.50",
            "epsilon_lower_bound": 1.25,
            "detectable_epsilon": 3.5,
            "false_alarm_bound": 0.05,
        },
        "claim": {
            "epsilon": 4.0,
            "delta": 1e-5,
            "unit": "single record of a client",
            "neighbouring": "add or remove one record",
            "source": "privacy.json",
        },
        "checks": [
            check,
            {**check, "name": "protocol", "alpha": 0.0, "epsilon_lower_bound": None, "detectable_epsilon": None},
        ],
        "budget": {"cost_in_power": ["membership records: 7 of 2000"]},
        "parts": {
            "membership": {
                "members_in_run": 7,
                "held_out_in_run": 7,
                "gate": {"auc": INTERVAL, "passed": True, "sentence": "words alone do not tell them apart"},
                "views": [view("released_adapter", None), view("endpoint", "top_k")],
            },
            "canaries": {
                "planted": 1000,
                "used": 900,
                "included": 444,
                "adjacency": "one record added or removed",
                "delta": 1e-5,
                "alpha": 0.05,
                "correction": 5,
                "claimed_epsilon": 4.0,
                "views": [
                    {
                        "view": "releases",
                        "decisive": True,
                        "epsilon_lower_bound": 1.25,
                        "detectable_epsilon": 3.5,
                        "guesses": [{"guesses": 90, "correct": 80, "epsilon_lower_bound": 1.25, "p_at_claim": 0.7}],
                        "histogram": HISTOGRAM,
                    }
                ],
            },
            "mechanism": {
                "noise_scale": {
                    "claimed_deviation": 0.1,
                    "measured_deviation": 0.1002,
                    "interval": [0.09, 0.11],
                    "values": 9,
                },
                "two_worlds": {"mu_claimed": 0.9, "mu_lower_bound": 0.8, "trials": 100, "histogram": HISTOGRAM},
                "public_constants": {"compared": ["alpha"], "differences": []},
            },
            "protocol": {
                "honest_round": True,
                "attacks": [
                    {
                        "name": "split view",
                        "description": "two survivor lists",
                        "expected": "X",
                        "outcome": "aborted",
                        "error": "X",
                        "message": "lists differ",
                    }
                ],
            },
            "server_view": {
                "matching": [
                    {"what": what, "clients": n, "sigma": sigma, "bits": INTERVAL, "most_bits": 9.97, "trials": 5}
                    for what, n, sigma in (
                        ("bare", 1, 0),
                        ("sum", 1, 0),
                        ("sum", 8, 0),
                        ("noised_sum", 8, 1.0),
                        ("noised_sum", 8, 2.0),
                    )
                ],
                "span": [{"unique_tokens": 5, "rank": 8, "found": 5, "false": 0}],
                "transcript": {
                    "recorded": True,
                    "vectors": 10,
                    "elements": 100,
                    "tests": [{"sample": "masked", "name": "chi-square", "p": 0.4}],
                    "alarms": [],
                },
            },
            "exposure": {
                "most_bits": 9.97,
                "chance_bits": 1.44,
                "runs": [
                    {
                        "run": name,
                        "epsilon": epsilon,
                        "by_repetition": [
                            {"copies": copies, "secrets": 2, "exposure": [1.0, 2.0], "mean": 1.5, "extracted": 0}
                            for copies in (1, 4, 16)
                        ],
                    }
                    for name, epsilon in (("audited", 4.0), ("without_dp", None))
                ],
            },
            "shadows": {"shadows": 4, "records": 7, "views": [view("released_adapter", None)]},
        },
    }


@pytest.fixture
def audited(runs, audit):
    def write(content=audit):
        (runs["private"] / "audit").mkdir(exist_ok=True)
        (runs["private"] / "audit" / "audit.json").write_text(json.dumps(content))
        return runs["private"]

    return write


def test_every_part_has_its_section_and_every_figure_its_data(audited):
    report = compose_report([audited()])
    assert {section.key for section in report.sections} >= {
        *(
            "audit",
            "canaries",
            "membership-inference",
            "shadows",
            "exposure",
            "server-view",
            "mechanism-checks",
            "protocol",
        ),
    }
    keys = {figure.key for figure in report.figures}
    assert keys >= {
        "claimed-and-measured",
        "roc",
        "scores",
        "bits",
        "bits-by-noise",
        "exposure-by-repetition",
        "canary-scores-releases",
    }
    page = render_html(report)
    for expected in (
        "could have detected eps &gt; 3.50",
        "7 of 2000",
        "split view",
        "chi-square",
        "1.25",
        "too few records",
    ):
        assert expected in page
    assert "could have detected" in render_markdown(report)


def test_a_violation_is_the_first_thing_a_reader_sees(audited, audit):
    audit["verdict"] |= {"violation": True, "violations": ["canaries"], "sentence": "violation: epsilon is at least 5"}
    report = compose_report([audited(audit)])
    assert report.headline.verdict_kind == "violation"
    assert 'class="card bad"><strong>Audit: violation' in render_html(report)


def test_an_audited_run_is_the_subject_before_another_private_one(audited, runs):
    other = runs["bare"].parent / "other"
    shutil.copytree(runs["private"], other)
    audited()
    assert compose_report([other, runs["private"]]).subject == "private"


def test_a_log_log_figure_never_holds_a_zero(audited):
    figure = next(f for f in compose_report([audited()]).figures if f.key == "roc")
    assert all(value >= 1e-3 for series in figure.series for value in (*series.x, *series.y))


def test_skipped_parts_say_why(audited, audit):
    audit["parts"]["canaries"] = {"skipped": "no canaries were planted"}
    audit["parts"]["exposure"] = {"skipped": "no secrets were planted"}
    audit["parts"]["server_view"]["transcript"] = {"skipped": "the server's view was not recorded"}
    page = render_html(compose_report([audited(audit)]))
    for expected in ("no canaries were planted", "no secrets were planted", "view was not recorded"):
        assert expected in page


@pytest.mark.parametrize(
    "path",
    [("verdict",), ("checks",), ("parts", "membership", "gate"), ("parts", "server_view", "matching"), ("budget",)],
)
def test_a_result_that_lacks_a_field_is_refused_and_not_shown_in_part(audited, audit, path):
    inner = audit
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    with pytest.raises(RunDirectoryError, match=r"audit\.json"):
        compose_report([audited(audit)])


def test_an_audit_of_another_schema_is_refused(audited, audit):
    with pytest.raises(RunDirectoryError, match="schema"):
        compose_report([audited({**audit, "schema": "fedpt-secure/audit/2"})])
