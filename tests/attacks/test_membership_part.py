"""What a membership attack may do with the records it asks about."""

from __future__ import annotations

import numpy as np
import pytest

from fedpt_secure.attacks.membership_part import NOT_SENT, audit_membership
from fedpt_secure.attacks.scores import RecordSignals
from fedpt_secure.attacks.settings import TimeBudget
from fedpt_secure.attacks.subject import Claim, Subject
from fedpt_secure.attacks.views import Candidate
from fedpt_secure.config import RunConfig, build
from fedpt_secure.data import Example, Record
from fedpt_secure.progress import SILENT

RECORDS = [Record(f"record number {number} about things") for number in range(40)]
CLAIM = Claim(4.0, 1e-5, "record", "add or remove one", 1.0, 1.0, 3, "privacy.json")


class Adapter:
    def signals(self, candidates):
        rng = np.random.default_rng(len(candidates))
        for item in candidates:
            yield RecordSignals(*rng.normal(-2, 1, (2, 5)), item.record.text, *rng.uniform(1, 2, (2, 5)))


class Audited:
    """A finished run whose black box must not be asked."""

    black_box_is_elsewhere = Subject.black_box_is_elsewhere

    def __init__(self, large):
        self.config = build(RunConfig, {"models": {"large": large}})

    def members(self):
        return RECORDS[:20]

    def non_members(self):
        return RECORDS[20:]

    def candidates(self, records):
        return [Candidate(record, Example((0, 1, 2, 3, 4, 5), 1)) for record in records]

    def adapter_view(self):
        return Adapter()

    def endpoint_view(self, progress):
        raise RuntimeError("a training record would be sent")


def attack(large):
    return audit_membership(Audited(large), CLAIM, TimeBudget(None), SILENT, np.random.default_rng(1))


def test_no_training_record_is_sent_to_a_black_box_on_another_machine():
    finding = attack("openai:https://api.example/v1#model")
    assert finding.result["endpoint_skipped"] == NOT_SENT
    assert [view["view"] for view in finding.result["views"]] == ["released_adapter"]


@pytest.mark.parametrize("large", [None, "llama.cpp:http://127.0.0.1:8080"])
def test_a_black_box_on_this_machine_is_asked(large):
    with pytest.raises(RuntimeError, match="would be sent"):
        attack(large)
