"""Asking the hub is quick, and tells an absent repository from an absent hub."""

from __future__ import annotations

import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError

from fedpt_secure.data import hub


@pytest.fixture
def answer(monkeypatch):
    """Let the hub's API behave as given."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def set_answer(behave):
        api = SimpleNamespace(model_info=behave, dataset_info=behave)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)

    return set_answer


def test_commit_of_the_repository_is_returned(answer):
    answer(lambda repository, **_: SimpleNamespace(sha=f"sha of {repository}"))
    assert hub.hub_commit("model", "a/b") == "sha of a/b"
    assert hub.hub_commit("dataset", "c/d") == "sha of c/d"


def test_hanging_look_up_costs_no_more_than_the_limit(answer, monkeypatch):
    monkeypatch.setattr(hub, "CONNECT_SECONDS", 0.2)
    answer(lambda *_, **__: time.sleep(5))
    started = time.monotonic()
    assert hub.hub_commit("model", "a/b") is None
    assert time.monotonic() - started < 2


def test_failing_connection_means_no_hub(answer):
    def fail(*_, **__):
        raise OSError("no route")

    answer(fail)
    assert hub.hub_commit("model", "a/b") is None


def test_absent_repository_is_an_error(answer):
    def absent(*_, **__):
        raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None, status_code=404))

    answer(absent)
    with pytest.raises(hub.RepositoryMissing, match="no model 'a/b'"):
        hub.hub_commit("model", "a/b")


def test_offline_environment_is_honoured(answer, monkeypatch):
    answer(lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.hub_commit("model", "a/b") is None


def test_libraries_keep_to_our_folder_inside_the_block_only(tmp_path):
    huggingface_hub.utils.enable_progress_bars()  # whatever an earlier test left behind
    before = (constants.HF_HUB_CACHE, constants.HF_HUB_DISABLE_TELEMETRY)
    with hub.contained(tmp_path):
        assert str(tmp_path / "hub") == constants.HF_HUB_CACHE
        assert constants.HF_HUB_DISABLE_TELEMETRY
        assert huggingface_hub.utils.are_progress_bars_disabled()
    assert before == (constants.HF_HUB_CACHE, constants.HF_HUB_DISABLE_TELEMETRY)
    assert not huggingface_hub.utils.are_progress_bars_disabled()
