"""The canary audit of whole runs: what it reads, that it is strong, and that it is silent where it should be."""

from __future__ import annotations

import numpy as np
import pytest

from fedpt_secure.attacks.canary_scores import least_squares
from fedpt_secure.config import RunConfig, build, overlay
from fedpt_secure.errors import ConfigError
from fedpt_secure.federation import load_planted, load_releases

CANARIES = ("canaries",)


def views_of(result):
    return {view["view"]: view for view in result["parts"]["canaries"]["views"]}


def test_least_squares_tells_apart_what_overlaps():
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(6, 50)) + rng.normal(size=50)  # a common part
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    coins = np.array([1, 0, 1, 1, 0, 0.0])
    estimate, variance = least_squares(directions, coins @ directions)
    assert estimate == pytest.approx(coins, abs=1e-3)
    assert (variance >= 1 - 1e-5).all()  # never below what a direction alone would have


@pytest.mark.slow
def test_a_private_run_is_not_contradicted_and_says_what_could_have_been(finished, audit):
    result = audit(finished(), parts=CANARIES)
    view = views_of(result)["releases"]
    assert view["decisive"]
    assert view["canaries"] == 120
    assert view["epsilon_lower_bound"] < 4
    assert "could have detected eps >" in result["verdict"]["sentence"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_without_noise_the_coins_are_read_from_the_releases(finished, audit, mode):
    privacy = {"epsilon": float("inf"), "mode": mode}
    result = audit(finished(privacy=privacy), parts=CANARIES, claimed_epsilon=2.0)
    view = views_of(result)["releases"]
    # Not all: in a model this small some canaries' gradients nearly depend on others', and those coins stay unsure.
    assert view["auc"]["value"] > 0.97
    assert result["verdict"]["violations"] == ["canaries"]


@pytest.mark.slow
def test_a_run_without_canaries_keeps_no_releases_and_says_that_nothing_was_planted(finished, audit):
    directory = finished(audit={"canaries": 0})
    assert load_releases(directory, 0) == {}
    result = audit(directory, parts=CANARIES)
    assert "train --canaries" in result["parts"]["canaries"]["skipped"]
    assert result["checks"] == []


@pytest.mark.slow
def test_the_coins_lie_where_only_the_owner_reads_and_nowhere_else(finished):
    directory = finished()
    path = directory.path / "audit" / "planted.json"
    assert path.stat().st_mode & 0o077 == 0
    texts = [canary.text.encode() for canary in load_planted(directory).canaries]
    for other in directory.path.rglob("*"):
        if other.is_file() and other != path:
            content = other.read_bytes()
            assert not any(text in content for text in texts), other


def test_canaries_in_mode_client_are_refused(audited_settings):
    with pytest.raises(ConfigError, match="the unit is a client"):
        build(RunConfig, overlay(audited_settings, {"privacy": {"mode": "client"}}))


@pytest.mark.slow
def test_a_resumed_run_trains_on_the_canaries_it_began_with(finished, train_at, tmp_path, monkeypatch):
    from fedpt_secure.data import Cache
    from fedpt_secure.federation import run_training
    from fedpt_secure.progress import SILENT

    directory = finished()
    before = load_planted(directory)
    (directory.path / "privacy.json").unlink()
    run_training(directory.config(), directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    assert load_planted(directory) == before
