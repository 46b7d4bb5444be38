"""One call from a validated configuration to the prepared federation."""

from __future__ import annotations

from fedpt_secure.config import DataConfig
from fedpt_secure.data.builtin import read_chitchat, read_sotu
from fedpt_secure.data.fetch import Cache
from fedpt_secure.data.partition import client_names, partition_equal, partition_labels, partition_sizes
from fedpt_secure.data.raw import RawText
from fedpt_secure.data.records import FederatedText, Record
from fedpt_secure.data.split import prepare
from fedpt_secure.errors import ConfigError, DataError
from fedpt_secure.progress import Progress

BUILTIN = {"chitchat": read_chitchat, "sotu": read_sotu}
"""Sources that need no settings; any other source is a path or a Hugging Face id."""


def load_federated_text(config: DataConfig, *, seed: int, cache: Cache, progress: Progress) -> FederatedText:
    """Read the source, deal its records to clients where asked, remove duplicates, split.

    The seed fixes the partition and the held-out split, nothing secret. What is left out is counted in
    `FederatedText.preparation` and shown as a note.

    Raises:
        ConfigError: settings that do not fit the source.
        DataError: the source cannot be read, or too little is left of it.
        FetchError: a built-in source cannot be had.
    """
    raw = _read(config, cache, progress)
    if not raw.rows:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in raw.unusable.items())
        raise DataError(
            f"{raw.name} has no usable record among {raw.seen:,}: {reasons}", hint="is the text column the right one?"
        )
    text_by_client, arrangement = _by_client(raw, config, seed)
    clients, preparation = prepare(
        text_by_client,
        seed=seed,
        minimum_records=config.minimum_records,
        held_out_fraction=config.held_out_fraction,
        records_read=raw.seen,
        unusable=raw.unusable,
    )
    description = f"{raw.description}; {arrangement}" if arrangement else raw.description
    text = FederatedText.of(raw.name, description, clients, preparation=preparation)
    progress.note(f"{text.name}: {len(text.clients):,} clients; {preparation.sentence()}")
    return text


def _read(config: DataConfig, cache: Cache, progress: Progress) -> RawText:
    read = BUILTIN.get(config.source)
    if read is None:
        from fedpt_secure.data.sources import read_source

        return read_source(config, cache=cache, progress=progress)
    columns = ("client_column", "text_column", "prompt_column", "response_column", "label_column")
    given = [f"{name} {value!r}" for name in columns if (value := getattr(config, name)) is not None]
    if given:
        raise ConfigError(
            f"{config.source} is built in and has no columns to choose; {', '.join(given)} given",
            hint="columns are for --data PATH or a Hugging Face id",
        )
    return read(cache, progress, maximum_records=config.maximum_records)


def _by_client(raw: RawText, config: DataConfig, seed: int) -> tuple[dict[str, list[Record]], str]:
    """Records by client, and one clause that says how they were dealt (empty: by their owners)."""
    by_client: dict[str, list[Record]] = {}
    if config.partition is None:
        for row in raw.rows:
            if row.client_id is None:
                raise DataError(
                    f"{raw.name} does not say whose a record is",
                    hint="name the owner's column (--client-column), or deal the records: "
                    "--clients 10 --partition equal",
                )
            by_client.setdefault(row.client_id, []).append(row.record)
        return by_client, ""
    if config.clients is None:
        raise ConfigError("partition and clients go together", hint="--clients 10 --partition equal")
    count = len(raw.rows)
    if config.partition == "equal":
        owners = partition_equal(count, config.clients, seed=seed)
        arrangement = "dealt equally"
    elif config.dirichlet_alpha is None:
        raise ConfigError("partition dirichlet needs dirichlet_alpha", hint="--dirichlet-alpha 0.3")
    elif config.label_column is None:
        owners = partition_sizes(count, config.clients, alpha=config.dirichlet_alpha, seed=seed)
        arrangement = f"dealt in Dirichlet({config.dirichlet_alpha:g}) sizes"
    else:
        labels = [row.label or "" for row in raw.rows]
        owners = partition_labels(labels, config.clients, alpha=config.dirichlet_alpha, seed=seed)
        arrangement = f"dealt in Dirichlet({config.dirichlet_alpha:g}) mixtures of {config.label_column!r}"
    names = client_names(config.clients)
    for name in names:
        by_client[name] = []
    for row, owner in zip(raw.rows, owners, strict=True):
        by_client[names[owner]].append(row.record)
    return by_client, f"{arrangement} to {config.clients:,} simulated clients"
