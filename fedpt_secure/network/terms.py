"""Which runs a federation of machines can make."""

from __future__ import annotations

import hashlib

from fedpt_secure.config import RunConfig
from fedpt_secure.errors import ConfigError
from fedpt_secure.federation import ClientTerms
from fedpt_secure.federation.terms import require_meaningful_delta


def network_config(config: RunConfig, *, clients: int) -> RunConfig:
    """The configuration settled for the roster's clients, or a refusal of what only a simulation can do.

    Raises:
        ConfigError: a setting that simulates what happens by itself here, or that needs all text in one place.
    """
    for given, what in (
        (config.federation.dropout > 0, "federation.dropout simulates what real clients do by themselves"),
        (config.federation.ledgers is not None, "federation.ledgers: each client keeps its own"),
        (config.audit.plants, "audit: planting needs all clients' text in one place"),
        (config.audit.record_server_view, "audit.record_server_view: the journal is not kept"),
    ):
        if given:
            raise ConfigError(f"not in a federation of machines: {what}", hint="`fedpt-secure train` simulates it")
    return config.for_population(clients)


def network_digest(terms: ClientTerms, records_at_most: int) -> bytes:
    """What a server's hello and a client must agree on: the run's terms, and the public bound of all records."""
    return hashlib.sha256(
        b"fedpt-secure/network-terms/1" + terms.config_digest + records_at_most.to_bytes(8, "big")
    ).digest()


def require_meaningful(config: RunConfig, *, records_at_most: int, clients: int, own: int = 1) -> None:
    """Delta against what one party knows: a client's own records, and public bounds of everybody's.

    Raises:
        PrivacyError: delta is not below one over them.
    """
    records = {"local": {"own": own}, "distributed": {"all": records_at_most}}.get(
        config.privacy.mode, dict.fromkeys(map(str, range(clients)), 1)
    )
    require_meaningful_delta(config, records)
