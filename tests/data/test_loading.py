"""Settings and rows that do not fit together are refused, also where `DataConfig` was built without validation."""

from __future__ import annotations

import pytest

from fedpt_secure.config import DataConfig
from fedpt_secure.data import Cache, Record, load_federated_text, loading
from fedpt_secure.data.raw import RawText, Row
from fedpt_secure.errors import ConfigError, DataError
from fedpt_secure.progress import SILENT


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Load a source `made` whose rows name an owner or not."""

    def call(*, owner, seed=0, **settings):
        rows = [Row(Record(f"text {index}"), owner and f"{owner}{index % 3}", "ab"[index % 2]) for index in range(30)]
        raw = RawText("made", "made up", rows, seen=len(rows))
        monkeypatch.setitem(loading.BUILTIN, "made", lambda cache, progress, maximum_records: raw)
        config = DataConfig.model_construct(**{"source": "made", **settings})
        return load_federated_text(config, seed=seed, cache=Cache(tmp_path), progress=SILENT)

    return call


def test_rows_go_to_their_owners(load):
    text = load(owner="u")
    assert text.client_ids == ("u0", "u1", "u2")
    assert text.description == "made up"


def test_partition_deals_owned_rows_too_where_asked_for(load):
    text = load(owner="u", clients=2, partition="equal")
    assert text.client_ids == ("client-0", "client-1")


def test_same_seed_gives_the_same_federation_and_another_seed_another(load):
    def digest(seed):
        return load(owner=None, seed=seed, clients=2, partition="equal").digest

    assert digest(1) == digest(1)
    assert digest(1) != digest(2)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, DataError, "does not say whose a record is"),
        ({"partition": "equal"}, ConfigError, "partition and clients go together"),
        ({"partition": "dirichlet", "clients": 2}, ConfigError, "needs dirichlet_alpha"),
        ({"partition": "equal", "clients": 31}, DataError, "cannot be dealt to 31 clients"),
    ],
)
def test_settings_that_do_not_fit_are_refused(load, settings, error, message):
    with pytest.raises(error, match=message):
        load(owner=None, **settings)


def test_clients_dealt_too_little_are_left_out_and_counted(load):
    text = load(owner=None, clients=10, partition="dirichlet", dirichlet_alpha=0.2, minimum_records=3)
    assert len(text.clients) + text.preparation.clients_below_minimum == 10
    assert text.preparation.clients_below_minimum > 0
