"""Choosing shares: a position's numbers are the product's, the chosen shares are the best, and nobody peeks."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.proxy.steering import SteeringRule, steered_token_logprobs

TOOLS = Path(__file__).parents[2] / "tools"
NAMES = ("steering_positions", "choose_shares")


@pytest.fixture(scope="module")
def tools():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


def rehearsed(tools, seed, records=20, length=30):
    """A domain whose large model is bad at the first places, as arrays a position."""
    rng = np.random.default_rng(seed)
    place = np.tile(np.arange(length), records)
    tuned = rng.normal(-4, 1, len(place))
    linear = rng.normal(-3, 1, len(place)) - 6 * (place == 0)
    arrays = {"record": np.repeat(np.arange(records), length), "place": place, "large": linear - 0.5, "tuned": tuned}
    arrays |= {f"linear-{alpha:g}": linear + 0.1 * alpha for alpha in tools["steering_positions"].ALPHAS}
    arrays |= {name: rng.normal(0, 1, len(place)) for name in tools["choose_shares"].FEATURES}
    return tools["choose_shares"].Domain(f"domain{seed}", 0.5, arrays)


def test_the_numbers_of_a_position_are_those_of_the_product(tools, monkeypatch):
    rng = np.random.default_rng(0)
    mapping = np.array([3, 17, 0, 21, -1])
    token_map = TokenMap(mapping, 40)
    monkeypatch.setattr(tools["steering_positions"], "TokenMap", lambda table, size: token_map)
    monkeypatch.setattr(tools["steering_positions"], "TOP", 3)
    large = torch.from_numpy(rng.normal(0, 2, (6, 40))).float().log_softmax(-1)
    base, tuned = torch.from_numpy(rng.normal(0, 2, (2, 6, 5))).float().log_softmax(-1)
    targets = torch.tensor([3, 9, 0, 21, 30, 17])
    own = token_map.tensors(torch.device("cpu")).small_of_large[targets]
    inside = torch.cat([large[:, mapping[:-1]], torch.full((6, 1), -torch.inf)], 1)
    outside = large[:, torch.from_numpy(token_map.outside.copy())].logsumexp(1)
    mask = torch.tensor([[False, True, True, True], [True, True, True, False]])
    target = large.gather(1, targets[:, None])[:, 0]
    found = tools["steering_positions"].positions(inside, outside, target, base, tuned, own, mask, mapping)
    assert found["record"].tolist() == [0, 0, 0, 1, 1, 1]
    assert found["place"].tolist() == [0, 1, 2, 0, 1, 2]
    rules = [SteeringRule(0.5), SteeringRule(0.0, ((0, 1.0),)), SteeringRule(0.75, ((0, 0.8), (1, 0.3)))]
    places = torch.from_numpy(found["place"].astype(np.int64))
    exact = steered_token_logprobs(large, base, tuned, targets, token_map, rules, places).numpy()
    assert found["linear-0.5"] == pytest.approx(exact[0], abs=1e-5)
    assert found["tuned"] == pytest.approx(exact[1], abs=1e-5)
    domain = tools["choose_shares"].Domain("x", 0.0, found)
    assert domain.blended(np.where(found["place"] == 0, 0.8, 0.3), 0.75) == pytest.approx(exact[2], abs=1e-5)


def test_the_chosen_shares_beat_every_other_of_the_grid(tools):
    choose = tools["choose_shares"]
    domains = [rehearsed(tools, seed) for seed in (1, 2)]

    def cells(domain):
        return domain.bucket

    rule = choose.choose(domains, cells)
    assert rule.shares[0] > 0.8
    assert rule.alpha == max(tools["steering_positions"].ALPHAS)
    mean = np.mean([choose.score(domain, cells, rule) for domain in domains])
    assert mean == pytest.approx(rule.loss)
    for bucket in range(5):
        for share in choose.SHARES:
            shares = rule.shares.copy()
            shares[bucket] = share
            other = choose.Rule(rule.alpha, shares, 0.0)
            assert np.mean([choose.score(domain, cells, other) for domain in domains]) >= mean - 1e-12


def test_domains_that_judge_have_no_say(tools):
    choose = tools["choose_shares"]
    choosing, judging = [rehearsed(tools, 1)], [rehearsed(tools, 2)]
    alone = choose.compare(choosing, [])
    both = choose.compare(choosing, judging)
    assert [line["constants"] for line in alone] == [line["constants"] for line in both]
    assert len(both[0]["losses"]) == 2


def test_a_posterior_reads_only_what_came_before(tools):
    """Changing a record's last token changes no earlier prediction; at forgetting 1 nothing is read at all."""
    choose = tools["choose_shares"]
    domain = rehearsed(tools, 3)
    rule = choose.choose([domain], lambda d: d.bucket)
    before = choose.posterior(domain, rule, 0.1)
    changed = {name: values.copy() for name, values in domain.arrays.items()}
    last = changed["place"] == 29
    changed["tuned"][last] -= 5
    after = choose.posterior(choose.Domain("x", 0.0, changed), rule, 0.1)
    assert (before[~last] == after[~last]).all()
    assert (before[last] != after[last]).all()
    reset = choose.posterior(domain, rule, 1.0)
    share = rule.shares[domain.bucket]
    first = np.log(
        0.1 * (1 - share) * np.exp(domain.arrays["linear-0"])
        + 0.8 * (1 - share) * np.exp(domain.arrays[f"linear-{rule.alpha:g}"])
        + 0.1 * (1 - share) * np.exp(domain.arrays["linear-1"])
        + share * np.exp(domain.arrays["tuned"])
    )
    assert reset == pytest.approx(first)
