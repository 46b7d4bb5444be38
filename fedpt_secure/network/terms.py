"""Which runs a federation of machines can make."""

from __future__ import annotations

from fedpt_secure.config import RunConfig
from fedpt_secure.errors import ConfigError


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
