"""Attacks on secure aggregation by a malicious server, and what ends each of them."""

from fedpt_secure.attacks.protocol.suite import EXPECTED, audit_protocol, run_attack

__all__ = ["EXPECTED", "audit_protocol", "run_attack"]
