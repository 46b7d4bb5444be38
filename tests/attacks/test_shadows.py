"""Shadow models: RMIA's formula, that it finds what shadows can find, and that shadows are kept."""

from __future__ import annotations

import numpy as np
import pytest

from fedpt_secure.attacks.operating_points import auc
from fedpt_secure.attacks.shadows import rmia_scores


def test_the_score_is_the_share_of_records_whose_ratio_is_passed():
    audited = np.log(np.array([0.5, 0.2, 0.1]))
    shadows = np.log(np.array([[0.1, 0.1, 0.1], [0.3, 0.1, 0.3]]))
    # Ratios: 0.5/0.2 = 2.5, 0.2/0.1 = 2, 0.1/0.2 = 0.5.
    assert rmia_scores(audited, shadows) == pytest.approx([2 / 3, 1 / 3, 0.0], abs=1e-6)


def test_what_makes_a_record_easy_is_taken_out_by_the_shadows():
    rng = np.random.default_rng(0)
    easy = rng.normal(0, 3, 400)
    member = np.arange(400) < 200
    audited = easy + 0.5 * member + rng.normal(0, 0.2, 400)
    shadows = easy + 0.5 * (rng.random((8, 400)) < 0.5) + rng.normal(0, 0.2, (8, 400))
    plain = auc(audited[member], audited[~member])["value"]
    scores = rmia_scores(audited, shadows)
    assert auc(scores[member], scores[~member])["value"] > 0.8 > 0.65 > plain


@pytest.mark.slow
def test_shadows_are_trained_once_and_only_those_that_are_missing(finished, audit, monkeypatch):
    from fedpt_secure.attacks import shadows_part

    trained = []
    genuine = shadows_part.train_shadow
    monkeypatch.setattr(shadows_part, "train_shadow", lambda *args, **more: trained.append(1) or genuine(*args, **more))
    directory = finished()
    first = audit(directory, parts=("shadows",), shadows=2)
    assert first["parts"]["shadows"]["shadows"] == 2
    assert len(trained) == 2
    more = audit(directory, parts=("shadows",), shadows=3)
    assert more["parts"]["shadows"]["shadows"] == 3
    assert len(trained) == 3
    assert more["parts"]["shadows"]["views"][0]["headline"] == "rmia"


@pytest.mark.slow
def test_without_shadows_the_part_says_how_to_have_them(finished, audit):
    assert "--shadows" in audit(finished(), parts=("shadows",))["parts"]["shadows"]["skipped"]
