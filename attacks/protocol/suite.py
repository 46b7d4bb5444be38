"""The attacks, the error that ends each at the client, and the audit's part `protocol`: all of them, on this build."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fedpt_secure.attacks.findings import Check, Finding
from fedpt_secure.attacks.protocol import before_survivors as before
from fedpt_secure.attacks.protocol import on_survivors as later
from fedpt_secure.attacks.protocol.cohort import Cohorts, cohorts
from fedpt_secure.crypto import (
    BelowThreshold,
    CryptoError,
    DuplicateKey,
    OwnKeysMissing,
    ParameterError,
    PolicyViolation,
    ProtocolStateError,
    RoundReplayed,
    ShareRejected,
    SignatureInvalid,
    SurvivorsRejected,
    TranscriptMismatch,
    UnsafePublicKey,
    WrongSession,
)
from fedpt_secure.progress import Progress

Attack = Callable[[Cohorts], object]

EXPECTED: Mapping[Attack, type[CryptoError]] = {
    before.sybil_roster: ParameterError,
    before.invented_client: ParameterError,
    before.shrunken_cohort: PolicyViolation,
    before.low_threshold: PolicyViolation,
    before.replayed_round: RoundReplayed,
    before.round_begun_twice: RoundReplayed,
    before.slow_attempt: RoundReplayed,
    before.borrowed_identity: ParameterError,
    before.forged_client: SignatureInvalid,
    before.duplicate_keys: DuplicateKey,
    before.low_order_key: UnsafePublicKey,
    before.own_keys_missing: OwnKeysMissing,
    before.own_keys_altered: OwnKeysMissing,
    before.shrunken_directory: BelowThreshold,
    before.lonely_sharer: BelowThreshold,
    before.both_kinds_by_one_record: ShareRejected,
    before.another_graph: ShareRejected,
    before.outsiders_among_sharers: TranscriptMismatch,
    later.called_lost: SurvivorsRejected,
    later.survivors_that_never_shared: SurvivorsRejected,
    later.more_dropouts_than_allowed: BelowThreshold,
    later.more_lost_holders_than_allowed: BelowThreshold,
    later.unsigned_list: TranscriptMismatch,
    later.signatures_from_outside: TranscriptMismatch,
    later.too_few_confirmations: BelowThreshold,
    later.confirmations_from_far_away: BelowThreshold,
    later.second_call: ProtocolStateError,
    later.different_survivor_lists: TranscriptMismatch,
    later.both_shares_of_a_peer: ProtocolStateError,
    later.keys_swapped: SignatureInvalid,
    later.planted_weights: WrongSession,
}
"""What a correct client says to each attack."""


def run_attack(attack: Attack, make_cohort: Cohorts) -> dict[str, Any]:
    """Make one attack; `aborted` only where the client ended it with the error that the attack calls for."""
    expected = EXPECTED[attack]
    found: dict[str, Any] = {
        "name": attack.__name__,
        "description": " ".join(inspect.cleandoc(attack.__doc__ or "").split("\n\n")[0].split()),
        "expected": expected.__name__,
        "error": None,
        "message": None,
    }
    try:
        succeeded = bool(attack(make_cohort))
    except CryptoError as error:
        outcome = "aborted" if type(error) is expected else "other error"
        return found | {"outcome": outcome, "error": type(error).__name__, "message": str(error)}
    except Exception as error:  # whatever a broken build does instead is what is reported
        return found | {"outcome": "other error", "error": type(error).__name__, "message": str(error)}
    return found | {"outcome": "succeeded" if succeeded else "not refused"}


def audit_protocol(progress: Progress) -> Finding:
    """All attacks on the installed build, and a round without an attack, which must give the exact sum."""
    make_cohort = cohorts()
    attacks = []
    with progress.task("protocol attacks", len(EXPECTED), unit="attacks") as task:
        for attack in EXPECTED:
            task.describe(attack.__name__)
            attacks.append(run_attack(attack, make_cohort))
            task.advance()
    honest = _honest_round(make_cohort)
    stopped = sum(attack["outcome"] == "aborted" for attack in attacks)
    failed = [attack["name"] for attack in attacks if attack["outcome"] != "aborted"]
    sentence = f"{stopped} of {len(attacks)} attacks of a malicious server ended at the client with the right error"
    if failed:
        sentence += f"; not so: {', '.join(failed)}"
    if not honest:
        sentence += "; a round without an attack does not give the exact sum"
    check = Check("protocol", bool(failed) or not honest, True, 0.0, sentence)
    return Finding({"attacks": attacks, "honest_round": honest}, (check,))


def _honest_round(make_cohort: Cohorts) -> bool:
    cohort = make_cohort(5)
    a_round = cohort.round()
    try:
        total = a_round.advertise().share().mask(cohort.ids[1:]).confirm(cohort.ids[1:]).unmask(cohort.ids[1:])
        return bool((total.server.aggregate() == a_round.plain_sum(cohort.ids[1:])).all())
    except CryptoError:
        return False
