"""The classes of a sampled softmax: a public choice, and an estimate of the whole head's denominator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedpt_secure.lm.head_loss import SampledHead, head_loss
from fedpt_secure.lm.output_classes import (
    OutputClasses,
    count_classes,
    draw_classes,
    draw_rest,
    likely_classes,
    rank_classes,
)

WIDTH, VOCABULARY = 12, 60
RANKING = np.random.default_rng(3).permutation(VOCABULARY).astype(np.int64)


def head(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    return hidden, weight, torch.randint(0, VOCABULARY, (rows,), generator=generator)


def keys(count: int) -> list[bytes]:
    return [index.to_bytes(16, "little") for index in range(count)]


def test_classes_are_ranked_by_their_number_in_public_text_and_then_by_id():
    counts = count_classes([[3, 3, 1], [5, 3], []], 7)
    assert counts.tolist() == [0, 1, 0, 3, 0, 1, 0]
    assert rank_classes(counts).tolist() == [3, 1, 5, 0, 2, 4, 6]


def test_half_are_the_most_frequent_and_half_a_sample_of_the_rest():
    for key in keys(20):
        classes = draw_classes(RANKING, 20, key=key)
        rows = classes.rows.tolist()
        assert rows[:10] == RANKING[:10].tolist()
        assert set(rows[10:]) <= set(RANKING[10:].tolist())
        assert len(set(rows)) == 20
        assert torch.allclose(classes.log_weights.exp(), torch.tensor([1.0] * 10 + [5.0] * 10))
        assert [int(classes.places[row]) for row in rows] == list(range(20))
        assert int((classes.places >= 0).sum()) == 20


def test_the_draw_follows_from_the_key_alone():
    first, again, other = (draw_classes(RANKING, 20, key=key) for key in (b"a" * 16, b"a" * 16, b"b" * 16))
    assert torch.equal(first.rows, again.rows)
    assert not torch.equal(first.rows, other.rows)


def test_every_class_of_the_rest_is_drawn_equally_often():
    """Chi-square by its normal approximation, 50 cells; false alarm below 1e-6. Draws without replacement vary less."""
    draws = 2000
    counts = np.zeros(VOCABULARY)
    for key in keys(draws):
        counts[draw_classes(RANKING, 20, key=key).rows[10:].numpy()] += 1
    cells = counts[RANKING[10:]]
    expected = draws * 10 / 50
    assert ((cells - expected) ** 2 / expected).sum() < 50 + 5 * np.sqrt(2 * 50)
    assert not counts[RANKING[:10]].any()


def test_the_estimate_of_the_denominator_is_unbiased():
    """Over 4,000 draws; a position's own class is left out of the sum on both sides. 5 standard errors: 6e-7."""
    hidden, weight, targets = head(1)
    logits = (hidden @ weight.T).detach()[0]
    others = logits.clone()
    others[targets[0]] = -torch.inf
    estimates = []
    for key in keys(4000):
        classes = draw_classes(RANKING, 20, key=key)
        estimates.append(float((others[classes.rows] + classes.log_weights).exp().sum()))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - float(others.exp().sum())) < 5 * error


@pytest.mark.parametrize("rows", [1, 7, 130])
def test_loss_and_gradient_are_those_of_cross_entropy_over_the_weighted_classes(rows):
    hidden, weight, targets = head(rows)
    classes = draw_classes(RANKING, 24, key=b"k" * 16)
    loss = head_loss(hidden, weight, targets, SampledHead.of(weight, classes))
    (gradient,) = torch.autograd.grad(3 * loss, hidden)
    logits = hidden @ weight[classes.rows].T + classes.log_weights
    own = (hidden * weight[targets]).sum(1, keepdim=True)
    repeated = classes.rows[None] == targets[:, None]
    expected = cross_entropy(
        torch.cat([own, logits.masked_fill(repeated, -torch.inf)], 1), torch.zeros(rows, dtype=torch.int64)
    )
    (wanted,) = torch.autograd.grad(3 * expected, hidden)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_over_all_classes_it_is_the_whole_head():
    hidden, weight, targets = head(9)
    everything = OutputClasses(
        torch.arange(VOCABULARY).flip(0), torch.zeros(VOCABULARY), torch.arange(VOCABULARY).flip(0)
    )
    sampled = head_loss(hidden, weight, targets, SampledHead.of(weight, everything))
    whole = head_loss(hidden, weight, targets)
    assert torch.allclose(sampled, whole, rtol=1e-5)
    gradients = [torch.autograd.grad(loss, hidden)[0] for loss in (sampled, whole)]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_an_own_class_that_counts_twice_would_be_noticed():
    """The broken variant, by hand: the drawn column of a position's own class left in the sum."""
    hidden, weight, _ = head(1)
    classes = draw_classes(RANKING, 24, key=b"k" * 16)
    target = classes.rows[:1]
    own = (hidden * weight[target]).sum(1, keepdim=True)
    twice = torch.cat([own, hidden @ weight[classes.rows].T + classes.log_weights], 1)
    broken = cross_entropy(twice, torch.zeros(1, dtype=torch.int64))
    assert not torch.allclose(head_loss(hidden, weight, target, SampledHead.of(weight, classes)), broken, rtol=1e-3)


def test_its_gradient_comes_near_the_whole_heads_as_classes_grow():
    hidden, weight, targets = head(40)
    (whole,) = torch.autograd.grad(head_loss(hidden, weight, targets), hidden)
    errors = []
    for count in (8, 24, 56):
        drawn = [SampledHead.of(weight, draw_classes(RANKING, count, key=key)) for key in keys(30)]
        gradients = [torch.autograd.grad(head_loss(hidden, weight, targets, sampled), hidden)[0] for sampled in drawn]
        errors.append(float(torch.stack([(g - whole).norm() / whole.norm() for g in gradients]).mean()))
    assert errors[0] > 1.2 * errors[1] > 1.2 * 2 * errors[2]


def own_classes(seed=0, count=20) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).permutation(VOCABULARY)[:count])


def test_two_thirds_are_the_examples_own_and_a_third_a_sample_of_its_rest():
    for index, key in enumerate(keys(20)):
        own = own_classes(index)
        classes = draw_rest(VOCABULARY, 30, key=key).with_own(own)
        rows = classes.rows.tolist()
        assert rows[:20] == own.tolist()
        assert len(set(rows)) == 30
        assert torch.allclose(classes.log_weights.exp(), torch.tensor([1.0] * 20 + [4.0] * 10))
        assert [int(classes.places[row]) for row in rows] == list(range(30))
        assert int((classes.places >= 0).sum()) == 30


@pytest.mark.parametrize("count", [3, 4, VOCABULARY - 1])
def test_the_fewest_and_the_most_classes_leave_a_sample_of_the_rest(count):
    draw = draw_rest(VOCABULARY, count, key=b"k" * 16)
    classes = draw.with_own(own_classes(count=draw.own))
    assert len(classes.rows) == count
    assert draw.own == count - count // 3
    weight = (VOCABULARY - draw.own) / (count // 3)
    assert torch.allclose(classes.log_weights[draw.own :].exp(), torch.tensor(weight))


def test_every_class_that_is_not_an_examples_own_is_drawn_equally_often():
    """As above: chi-square by its normal approximation, 40 cells, false alarm below 1e-6."""
    draws, own = 2000, own_classes()
    counts = np.zeros(VOCABULARY)
    for key in keys(draws):
        counts[draw_rest(VOCABULARY, 30, key=key).with_own(own).rows[20:].numpy()] += 1
    cells = np.delete(counts, own.numpy())
    expected = draws * 10 / 40
    assert ((cells - expected) ** 2 / expected).sum() < 40 + 5 * np.sqrt(2 * 40)
    assert not counts[own.numpy()].any()


def test_the_estimate_of_the_denominator_is_unbiased_with_own_classes_too():
    """5 standard errors: 6e-7. The broken variant, which weighs the rest as if own classes were drawn too, is seen."""
    hidden, weight, targets = head(1)
    others = (hidden @ weight.T).detach()[0]
    others[targets[0]] = -torch.inf
    own = likely_classes(hidden, weight, targets, 20)
    estimates, broken = [], []
    for key in keys(4000):
        classes = draw_rest(VOCABULARY, 30, key=key).with_own(own)
        estimates.append(float((others[classes.rows] + classes.log_weights).exp().sum()))
        weights = torch.where(classes.log_weights > 0, VOCABULARY / 10, 1.0)
        broken.append(float((others[classes.rows].exp() * weights).sum()))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - float(others.exp().sum())) < 5 * error
    assert abs(np.mean(broken) - float(others.exp().sum())) > 5 * error


@pytest.mark.parametrize("positions", [1, 8, 300])
def test_likely_classes_are_the_targets_and_those_of_most_probability_over_all_positions(positions):
    hidden, weight, targets = head(positions)
    targets = targets % 9  # at most nine different ones
    chosen = likely_classes(hidden.detach(), weight, targets, 20).tolist()
    wanted = torch.softmax(hidden.detach() @ weight.T, 1).sum(0)
    wanted[targets] = torch.inf
    assert len(set(chosen)) == 20
    assert set(targets.tolist()) <= set(chosen)
    assert set(chosen) == set(wanted.topk(20).indices.tolist())


def test_own_classes_come_nearer_to_the_whole_head_than_frequent_ones():
    """At equal numbers, where predictions are peaked and say little about frequency over all text; 60 keys."""
    hidden, weight, targets = head(6)
    weight = 2 * weight
    (whole,) = torch.autograd.grad(head_loss(hidden, weight, targets), hidden)
    own = likely_classes(hidden.detach(), weight, targets, 14)
    errors = {"own": [], "frequent": []}
    for key in keys(60):
        drawn = {
            "own": draw_rest(VOCABULARY, 21, key=key).with_own(own),
            "frequent": draw_classes(RANKING, 21, key=key),
        }
        for name, classes in drawn.items():
            loss = head_loss(hidden, weight, targets, SampledHead.of(weight, classes))
            errors[name].append(float((torch.autograd.grad(loss, hidden)[0] - whole).norm()))
    assert 2 * np.mean(errors["own"]) < np.mean(errors["frequent"])
