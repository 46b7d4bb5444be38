"""Masks and CKKS are one seam: the same ring vectors in, the same sum out, and each says whom it trusts."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from fedpt_secure.config import RunConfig, build, require_compatible
from fedpt_secure.crypto import ClientPolicy, FixedPointEncoding, Identity, MemoryRoundRegister, Roster, RoundContext
from fedpt_secure.errors import ConfigError, FedptError, PrivacyError
from fedpt_secure.federation import aggregation_of

pytest.importorskip("tenseal")

IDS = tuple(f"client {index}" for index in range(5))
LENGTH = 300


def config(aggregator, **groups):
    return build(RunConfig, {"federation": {"aggregator": aggregator, "cohort": 5}, **groups})


def summed(aggregator, vectors, ring_bits=32):
    aggregation = aggregation_of(config(aggregator))
    identities = {name: Identity.generate() for name in IDS}
    roster = Roster({name: identity.verify_key_bytes for name, identity in identities.items()})
    context = RoundContext(
        run_id=bytes(16),
        round_index=0,
        cohort=IDS,
        roster_digest=roster.digest,
        model_digest=bytes(32),
        vector_length=LENGTH,
        ring_bits=ring_bits,
        threshold=4,
        minimum_survivors=4,
    )
    clients = {
        name: aggregation.client(
            context=context,
            identity=identities[name],
            client_id=name,
            roster=roster,
            policy=ClientPolicy(),
            register=MemoryRoundRegister(),
        )
        for name in IDS
    }
    server = aggregation.server(context=context, roster=roster)
    for name, client in clients.items():
        server.receive_advertisement(name, client.advertise())
    said = server.publish_keys()
    for name, client in clients.items():
        server.receive_shares(name, client.share_keys(said))
    for name, inbox in server.route_shares().items():
        server.receive_masked(name, clients[name].mask(inbox, vectors[name]))
    said = server.publish_survivors()
    for name, client in clients.items():
        server.receive_confirmation(name, client.confirm(said))
    said = server.publish_confirmations()
    for name, client in clients.items():
        server.receive_unmasking(name, client.unmask(said))
    return server.aggregate(), server.survivors


@pytest.mark.parametrize("ring_bits", [16, 20, 32])
@pytest.mark.parametrize("edge", [False, True])
def test_both_give_the_same_sum_up_to_the_flooding_noise(ring_bits, edge):
    generator = np.random.default_rng(2)  # test data, nothing secret
    encoding = FixedPointEncoding(ring_bits=ring_bits, bound=1.0, cohort=5)
    values = {name: generator.uniform(-1, 1, LENGTH) for name in IDS}
    if edge:
        values = dict.fromkeys(IDS, np.repeat([-1.0, 1.0], LENGTH // 2))
    vectors = {name: encoding.encode(value) for name, value in values.items()}
    exact, survivors = summed("masks", vectors, ring_bits)
    near, same = summed("ckks", vectors, ring_bits)
    assert survivors == same == IDS
    assert near.dtype == exact.dtype
    difference = np.abs(encoding.decode_sum(near, survivors=5) - encoding.decode_sum(exact, survivors=5)).max()
    assert difference <= 1e-3 + 1 / encoding.scale
    assert difference > 0


@pytest.mark.parametrize("mode", ["local", "distributed", "client"])
@pytest.mark.parametrize("aggregator", ["masks", "ckks"])
def test_only_mode_local_may_go_with_ckks(aggregator, mode):
    if aggregator == "masks" or mode == "local":
        require_compatible(aggregator, mode)
        assert build(RunConfig, {"federation": {"aggregator": aggregator}, "privacy": {"mode": mode}})
        return
    for refuse in (
        lambda: require_compatible(aggregator, mode),
        lambda: build(RunConfig, {"federation": {"aggregator": aggregator}, "privacy": {"mode": mode}}),
    ):
        with pytest.raises(PrivacyError, match=mode) as caught:
            refuse()
        assert "--aggregator masks" in caught.value.hint


def test_a_mode_that_is_not_known_is_refused_with_ckks():
    """A mode of tomorrow has no proof today."""
    with pytest.raises(PrivacyError):
        require_compatible("ckks", "shuffled")


def test_an_aggregator_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="aggregator"):
        config("plain")


def test_without_tenseal_ckks_is_one_line_with_a_hint_and_masks_still_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "tenseal", None)
    assert aggregation_of(config("masks")).name == "masks"
    with pytest.raises(FedptError) as caught:
        aggregation_of(config("ckks"))
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message
    assert caught.value.hint == 'pip install "fedpt-secure[ckks]"'


def test_each_names_its_trust_assumption():
    assert "fewer than a third" in aggregation_of(config("masks")).trust
    ckks = aggregation_of(config("ckks")).trust
    assert "honest but curious" in ckks
    assert "one colluding client breaks the privacy of all" in ckks
    json.dumps(ckks)
