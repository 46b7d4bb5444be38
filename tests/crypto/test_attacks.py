"""What a malicious server tries before it has a masked vector to work on, and one attack for every check of a client.

Each attack is made twice. With the check in place it must end at the client with the right error. With that one check
taken out it must succeed, which shows that the check is what stops it. `test_adversarial_server.py` has the attacks on
survivor lists and confirmations. The tables at the end say which test holds which check, and that none is left out.
"""

import ast
import inspect
import re
from pathlib import Path

import pytest

from fedpt_secure.attacks.protocol import EXPECTED, run_attack
from fedpt_secure.attacks.protocol.before_survivors import (
    another_graph,
    borrowed_identity,
    both_kinds_by_one_record,
    duplicate_keys,
    forged_client,
    invented_client,
    lonely_sharer,
    low_order_key,
    low_threshold,
    outsiders_among_sharers,
    own_keys_altered,
    own_keys_missing,
    replayed_round,
    round_begun_twice,
    shrunken_cohort,
    shrunken_directory,
    slow_attempt,
    sybil_roster,
)
from fedpt_secure.attacks.protocol.on_survivors import (
    both_shares_of_a_peer,
    called_lost,
    confirmations_from_far_away,
    different_survivor_lists,
    keys_swapped,
    more_dropouts_than_allowed,
    more_lost_holders_than_allowed,
    planted_weights,
    second_call,
    signatures_from_outside,
    survivors_that_never_shared,
    too_few_confirmations,
    unsigned_list,
)
from fedpt_secure.crypto import (
    ClientPolicy,
    MemoryRoundRegister,
    Roster,
    RoundContext,
    SecAggClient,
    SignatureInvalid,
    key_agreement,
)
from fedpt_secure.crypto import client as client_module
from fedpt_secure.crypto import directory as directory_module
from fedpt_secure.crypto import single_use as single_use_module


def _accept_any_member(remove, monkeypatch):
    """Signatures count if any member of the roster made them."""
    genuine = Roster.verify

    def verify(roster, client_id, message, signature):
        for name in roster:
            try:
                return genuine(roster, name, message, signature)
            except SignatureInvalid:
                continue
        raise SignatureInvalid("nobody signed")

    monkeypatch.setattr(Roster, "verify", verify)


def _trust_any_roster(remove, monkeypatch):
    remove(RoundContext, "check_roster", "roster.digest != self.roster_digest")
    monkeypatch.setattr(Roster, "verify", lambda *_: None)


def _multiply_low_order_points(remove, monkeypatch):
    """X25519 as RFC 7748 has it before the optional check for zero."""
    genuine = key_agreement.crypto_scalarmult

    def scalarmult(private, public):
        return bytes(32) if int.from_bytes(public, "little") < 2 else genuine(private, public)

    for module in (directory_module, key_agreement):
        monkeypatch.setattr(module, "check_public_key", lambda public: None)
    monkeypatch.setattr(key_agreement, "crypto_scalarmult", scalarmult)


def _seal_without_context(remove, monkeypatch):
    """One key for all pairs and no associated data: nothing says who sealed what for whom."""
    monkeypatch.setattr(client_module, "seal_key", lambda *_, **__: b"k" * 32)
    monkeypatch.setattr(client_module, "associated_data", lambda **_: b"")


def _check(name, condition, owner=SecAggClient):
    return lambda remove, monkeypatch: remove(owner, name, condition)


def _forget(method):
    return lambda remove, monkeypatch: monkeypatch.setattr(MemoryRoundRegister, method, lambda *_: None)


def _forget_releases(remove, monkeypatch):
    remove(MemoryRoundRegister, "_check_not_released", "(context.run_id, context.round_index) in self._released")


def _no_policy(remove, monkeypatch):
    monkeypatch.setattr(ClientPolicy, "check", lambda *_: None)


def _open_after_all(remove, monkeypatch):
    monkeypatch.setattr(SecAggClient, "_erase_held_shares", lambda *_: None)
    remove(SecAggClient, "_require_state", "self._state is not expected")


def _signatures_unread(remove, monkeypatch):
    monkeypatch.setattr(Roster, "verify", lambda *_: None)


OWN_ENTRY = "own is None or messages.directory_entry(own) != self._own_entry"


def _confirmations_unread(remove, monkeypatch):
    monkeypatch.setattr(SecAggClient, "_check_confirmations", lambda *_: None)


ATTACKS = {
    sybil_roster: _trust_any_roster,
    invented_client: _check("check_roster", "strangers", RoundContext),
    shrunken_cohort: _no_policy,
    low_threshold: _no_policy,
    replayed_round: _forget_releases,
    round_begun_twice: _check("begin", "session in self._begun", MemoryRoundRegister),
    slow_attempt: _forget("release"),
    borrowed_identity: _check("__init__", "roster[client_id] != identity.verify_key_bytes"),
    forged_client: _accept_any_member,
    duplicate_keys: _check("check_advertisement", "len(keys) != _KEYS_A_MEMBER or keys & known_keys", directory_module),
    low_order_key: _multiply_low_order_points,
    own_keys_missing: None,
    own_keys_altered: _check("share_keys", OWN_ENTRY),
    shrunken_directory: _check("_require_enough", "len(present) < minimum"),
    lonely_sharer: _check("_require_enough", "holders < threshold"),
    both_kinds_by_one_record: _seal_without_context,
    another_graph: _seal_without_context,
    outsiders_among_sharers: _check(
        "_open_inbox", "self._index not in sharers or not set(sharers) <= set(directory.members)"
    ),
    called_lost: _check("confirm", "self._index not in survivors"),
    survivors_that_never_shared: _check("confirm", "not set(survivors) <= set(self._sharers)"),
    more_dropouts_than_allowed: _check("_require_enough", "len(present) < minimum"),
    more_lost_holders_than_allowed: _check("_require_enough", "holders < threshold"),
    unsigned_list: _signatures_unread,
    signatures_from_outside: _check("_check_confirmations", "not set(confirmed) <= set(self._survivors)"),
    too_few_confirmations: _check("_check_confirmations", "len(confirmed) < quorum"),
    confirmations_from_far_away: _check("_check_confirmations", "holders < threshold"),
    second_call: _open_after_all,
    different_survivor_lists: _confirmations_unread,
    both_shares_of_a_peer: _open_after_all,
    keys_swapped: _signatures_unread,
    planted_weights: None,
}
"""What takes out the one check that stops an attack; None where the attack gains nothing without it either, or where
`test_adversarial_server.py` takes more than one check out."""


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_an_attack_ends_at_the_client_with_its_error(make_cohort, attack):
    error = EXPECTED[attack]
    with pytest.raises(error) as caught:
        attack(make_cohort)
    assert type(caught.value) is error
    assert any(entry.path.name == "client.py" for entry in caught.traceback)


@pytest.mark.parametrize(
    "attack",
    [attack for attack, take_out in ATTACKS.items() if take_out],
    ids=lambda attack: attack.__name__,
)
def test_the_attack_succeeds_once_the_check_is_taken_out(make_cohort, monkeypatch, without_check, attack):
    ATTACKS[attack](without_check, monkeypatch)
    assert attack(make_cohort)
    assert run_attack(attack, make_cohort)["outcome"] == "succeeded"


def test_the_audit_makes_every_attack_of_these_tests():
    assert set(EXPECTED) == set(ATTACKS)


NAMED_IN_THE_ISSUE = {
    "two survivor lists": "test_different_survivor_lists_do_not_open_a_sum_below_the_minimum",
    "asking both shares": "test_a_client_asked_twice_does_not_give_both_shares_of_a_peer",
    "swapped keys": "test_keys_swapped_by_the_server_are_refused",
    "Sybil roster": sybil_roster,
    "shrunken cohort": shrunken_cohort,
    "replayed round": replayed_round,
    "altered weights for one client": "test_masks_of_clients_with_different_weights_do_not_cancel",
    "reordered shares": both_kinds_by_one_record,
    "forged client": forged_client,
    "threshold below the floor": low_threshold,
    "another neighbour set": another_graph,
    "a round seen before": round_begun_twice,
    "duplicate keys": duplicate_keys,
    "low-order points": low_order_key,
    "own advertisement missing": own_keys_missing,
    "own advertisement altered": own_keys_altered,
    "more dropouts than allowed": more_dropouts_than_allowed,
}

CHECKS_OF_THE_CLIENT = {
    "client_id not in context.cohort": "test_client_identity_roster_and_context_must_belong_together",
    "self._directory is None": "test_no_later_phase_runs_without_a_directory",
    "self._discarded": "test_a_call_that_was_discarded_from_within_gives_nothing_out",
    "self._opened is not None": "test_an_inbox_is_opened_once_and_in_its_turn",
    "opened[0] != hashlib.sha256(inbox).digest()": "test_the_vector_goes_with_the_inbox_that_was_opened",
    "not self._turn.acquire(blocking=False)": "test_a_second_thread_is_turned_away_while_a_call_runs",
}
"""Checks in `client.py` and `single_use.py` that no attack of a server is about, and the test that holds them."""


def _tests():
    """Every test function beside this file: its name, and whether it also runs with its check taken out."""
    found = {}
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                marks = " ".join(ast.unparse(mark) for mark in node.decorator_list)
                found[node.name] = "[True, False]" in marks
    return found


def test_every_attack_that_must_be_tried_is_tried_with_and_without_its_check():
    tests = _tests()
    for attack in NAMED_IN_THE_ISSUE.values():
        assert tests[attack] if isinstance(attack, str) else attack in ATTACKS


def test_every_check_of_the_client_has_an_attack_or_a_test():
    """A new `if ...: raise` in either fails here until something holds it."""
    checks = {
        ast.unparse(node.test)
        for module in (client_module, single_use_module)
        for node in ast.walk(ast.parse(Path(inspect.getsourcefile(module)).read_text()))
        if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise)
    }
    attacked = set(re.findall(r'_check\(\s*"\w+", "([^"]+)"', Path(__file__).read_text())) | {OWN_ENTRY}
    attacked.add("self._state is not expected")
    assert checks - attacked == set(CHECKS_OF_THE_CLIENT)
    assert set(CHECKS_OF_THE_CLIENT.values()) <= set(_tests())


def test_every_error_that_the_documentation_promises_at_the_client_is_met():
    page = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    table = page.split("## What each check defeats")[1].split("At the server")[0]
    promised = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[-2] for row in table.splitlines() if "|" in row)))
    assert promised <= {error.__name__ for error in EXPECTED.values()}
