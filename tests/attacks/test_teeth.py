"""Whole audits on broken builds: each is flagged. The mechanism's and the masks' checks work at alpha 1e-3 here."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedpt_secure.attacks import public_constants
from fedpt_secure.crypto import SecAggClient
from fedpt_secure.crypto import client as client_module
from fedpt_secure.crypto.prg import apply_masks
from fedpt_secure.privacy.noise import _KeystreamRandom

pytestmark = pytest.mark.slow  # whole runs, trained and audited; the default suite has each check by itself

ALPHA = 0.05  # of which the checks below take a fiftieth each


def violations(result):
    return set(result["verdict"]["violations"])


def test_a_correct_build_passes_every_part(finished, audit):
    result = audit(finished(), parts=("mechanism", "protocol", "server_view"), alpha=ALPHA)
    assert violations(result) == set()
    assert {check["name"]: check["alpha"] for check in result["checks"] if check["alpha"]} == {
        "noise scale": 1e-3,
        "two worlds": 1e-3,
        "masked vectors": 1e-3,
    }
    assert all(attack["outcome"] == "aborted" for attack in result["parts"]["protocol"]["attacks"])
    assert result["parts"]["protocol"]["honest_round"] is True


def test_noise_that_is_switched_off_is_flagged_by_the_mechanism_and_by_the_canaries(
    train_at, audit, tmp_path, monkeypatch
):
    """The whole build is broken: it trained the run, and it is what the audit finds installed."""
    monkeypatch.setattr(_KeystreamRandom, "gaussian", lambda self, count, *, standard_deviation: np.zeros(count))
    directory = train_at(tmp_path / "run", privacy={"epsilon": 1.0})
    result = audit(directory, parts=("accounting", "canaries", "mechanism"), alpha=ALPHA)
    assert {"canaries", "noise scale", "two worlds"} <= violations(result)
    assert "accounting" not in violations(result)  # the books are in order: that is why there are other checks


def test_masks_that_are_off_are_flagged(train_at, audit, tmp_path, monkeypatch):
    monkeypatch.setattr(client_module, "apply_masks", lambda *args, **kwargs: None)
    directory = train_at(tmp_path / "run")
    assert violations(audit(directory, parts=("server_view",), alpha=ALPHA)) == {"masked vectors"}


def test_masks_that_are_used_again_are_flagged(train_at, audit, tmp_path, monkeypatch):
    def repeated(vector, masks, *, workers):
        alike = [(sign, bytes([number]) * 32) for number, (sign, _) in enumerate(masks)]
        apply_masks(vector, alike, workers=workers)

    monkeypatch.setattr(client_module, "apply_masks", repeated)
    # Such masks do not cancel, so that the sum is nonsense: only the transcript is looked at.
    directory = train_at(tmp_path / "run", training={"server_learning_rate": 1e-6})
    found = audit(directory, parts=("server_view",), alpha=ALPHA)
    assert violations(found) == {"masked vectors"}
    assert any("between a client's rounds" in alarm for alarm in found["parts"]["server_view"]["transcript"]["alarms"])


def test_a_client_that_does_not_read_confirmations_is_flagged(finished, audit, monkeypatch):
    monkeypatch.setattr(SecAggClient, "_check_confirmations", lambda *_: None)
    result = audit(finished(), parts=("protocol",))
    assert violations(result) == {"protocol"}
    succeeded = {a["name"] for a in result["parts"]["protocol"]["attacks"] if a["outcome"] == "succeeded"}
    assert "different_survivor_lists" in succeeded


def test_an_alpha_that_is_chosen_by_private_text_is_flagged(finished, audit, monkeypatch):
    """A build that looks at the clients' records, canaries among them, and steers by what fits them best."""
    genuine = public_constants.run_training

    def leaking(config, directory, **more):
        result = genuine(config, directory, **more)
        fits = len(result.text.clients[0].train[0].text) % 7 / 10
        chosen = config.proxy.model_copy(update={"alpha": 0.1 + fits})
        leaked = result.config.model_copy(update={"proxy": chosen})
        directory.save_config(leaked)
        return dataclasses.replace(result, config=leaked)

    monkeypatch.setattr(public_constants, "run_training", leaking)
    result = audit(finished(), parts=("mechanism",), alpha=ALPHA)
    assert violations(result) == {"public constants"}
    assert any("proxy.alpha" in line for line in result["parts"]["mechanism"]["public_constants"]["differences"])


def test_a_run_whose_alpha_was_changed_after_the_clients_agreed_is_flagged(finished, audit):
    directory = finished()
    path = directory.path / "config.toml"
    lines = path.read_text().splitlines()
    start = lines.index("[proxy]")
    at = next(index for index in range(start, len(lines)) if lines[index].startswith("alpha"))
    lines[at] = "alpha = 0.123"
    path.write_text("\n".join(lines) + "\n")
    assert violations(audit(directory, parts=("mechanism",), alpha=ALPHA)) == {"public constants"}


def test_a_damaged_transcript_is_an_error_and_no_verdict(finished, audit):
    from fedpt_secure.errors import RunDirectoryError

    directory = finished()
    next((directory.path / "audit" / "server_view").rglob("*.mask")).write_bytes(b"garbage")
    with pytest.raises(RunDirectoryError, match="masked vector"):
        audit(directory, parts=("server_view",))
