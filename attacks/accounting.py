"""What the clients' ledgers counted, against the claim: does the noise that was recorded prove it?"""

from __future__ import annotations

import math
from typing import Any

from fedpt_secure.attacks.findings import Check, Finding
from fedpt_secure.attacks.subject import Claim, Subject
from fedpt_secure.errors import LedgerError
from fedpt_secure.federation.ledgers import ledger_directories
from fedpt_secure.privacy import ACCOUNTANT, Ledger, epsilon_spent, merge, round_up

_ROUNDING = 2e-3
"""Epsilons are printed to thousandths, rounded up: a claim that copies one may lie below the bound by so much."""


def audit_accounting(subject: Subject, claim: Claim) -> Finding:
    """Add up again what every client's ledger says was released in this run.

    Raises:
        LedgerError: a ledger is missing or damaged; then nothing can be said.
    """
    places = ledger_directories(subject.config, subject.text, subject.directory, new=False)
    asked = set().union(*subject.schedule)
    histories, private, releases = set(), True, 0
    used = {client: rounds for client, rounds in _rounds_used(subject).items() if rounds}
    for client_id in sorted(asked):
        rows = Ledger(places[client_id]).releases(subject.run_id.hex())
        missing = used.get(client_id, set()) - {row.round_index for row in rows}
        if missing:
            raise LedgerError(f"the ledger of client {client_id} does not know its update in round {min(missing)}")
        releases += len(rows)
        private = private and all(row.noise_is_private for row in rows)
        histories.add(merge(tuple(row.spent for row in rows)))
    spent = max((epsilon_spent(history, delta=claim.delta) for history in histories if history), default=0.0)
    epsilon = round_up(spent) if private and math.isfinite(spent) else None
    stated = subject.statement.get("epsilon")
    violation = claim.epsilon is not None and (epsilon is None or epsilon > claim.epsilon + _ROUNDING)
    shown = "nothing: there is no noise, or it comes from a seed" if epsilon is None else f"epsilon <= {epsilon:g}"
    claimed = "nothing is claimed" if claim.epsilon is None else f"claimed is {claim.epsilon:g}"
    result: dict[str, Any] = {
        "epsilon": epsilon,
        "stated_epsilon": stated,
        "delta": claim.delta,
        "clients": len(asked),
        "releases": releases,
        "accountant": ACCOUNTANT,
    }
    sentence = f"the noise that the ledgers count proves {shown}; {claimed}"
    return Finding(result, (Check("accounting", violation, True, 0.0, sentence),))


def _rounds_used(subject: Subject) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for index, survivors in enumerate(subject.survivors):
        for client_id in survivors:
            found.setdefault(client_id, set()).add(index)
    return found
