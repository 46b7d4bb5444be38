"""The DP-SGD step does what its proof needs: bounded sensitivity, noise of the right size, nothing else moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.config import LoraSettings
from fedpt_secure.errors import PrivacyError
from fedpt_secure.lm.base import BaseLM
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.privacy import DpSgdSettings, SecureRandom, SmallExample, example_losses, train_locally

VOCABULARY = 64


def small_lm(seed: int = 0) -> SmallLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    base = BaseLM(LlamaForCausalLM(config), TokenMap.identity(VOCABULARY), "tiny")
    small = SmallLM(
        base,
        LoraSettings(rank=2, layers=0, modules=("q_proj", "v_proj", "o_proj", "down_proj")),
        seed=seed,
        device=torch.device("cpu"),
    )
    # A fresh B is zero; a trained one is not, and its gradients are what later rounds see.
    rng = np.random.default_rng(seed)
    small.load_adapter_vector(rng.normal(0, 0.1, small.dimension).astype(np.float32))
    return small


def examples(count: int, seed: int = 1) -> list[SmallExample]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 20, count)
    return [SmallExample(tuple(rng.integers(0, VOCABULARY, n).tolist()), int(rng.integers(1, n))) for n in lengths]


def settings(**changes) -> DpSgdSettings:
    values = {
        "steps": 1,
        "sampling_rate": 1.0,
        "clip_norm": 0.05,
        "noise_multiplier": 0.0,
        "normaliser": 4.0,
        "learning_rate": 2.0,
    }
    return DpSgdSettings(**{**values, **changes})


def naive_update(small: SmallLM, data: list[SmallExample], chosen: DpSgdSettings) -> np.ndarray:
    """One noiseless step by a loop over examples, without Opacus."""
    total = torch.zeros(small.dimension)
    for example in data:
        gradients = torch.autograd.grad(example_losses(small, [example])[0], small.trainable)
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        total += flat * min(1.0, chosen.clip_norm / float(flat.norm()))
    return (-chosen.learning_rate / chosen.normaliser * total).numpy()


@pytest.mark.parametrize("clip_norm", [0.01, 0.3, 100.0])
def test_a_noiseless_step_equals_a_loop_over_clipped_gradients(clip_norm):
    small, data, chosen = small_lm(), examples(40), settings(clip_norm=clip_norm)
    update = train_locally(small, data, chosen, noise=SecureRandom())
    assert np.allclose(update.vector, naive_update(small, data, chosen), rtol=1e-4, atol=1e-6)


def test_one_record_moves_the_sum_by_at_most_the_clip_norm():
    small, data, chosen = small_lm(), examples(12), settings(clip_norm=0.05)
    unit = chosen.learning_rate / chosen.normaliser
    whole = train_locally(small, data, chosen, noise=SecureRandom()).vector
    moved = [
        np.linalg.norm(train_locally(small, data[:i] + data[i + 1 :], chosen, noise=SecureRandom()).vector - whole)
        for i in range(len(data))
    ]
    assert max(moved) <= chosen.clip_norm * unit * (1 + 1e-4)
    # The bound is tight, or the test would also pass for a step that ignores its data.
    assert min(moved) >= chosen.clip_norm * unit * 0.99


def test_a_normaliser_taken_from_the_data_would_break_the_sensitivity():
    """The broken variant: divided by the number of records, one record moves the sum by more than the clip norm."""
    small, data = small_lm(), examples(3)
    unit = 2.0 / 3
    whole = train_locally(small, data, settings(normaliser=3.0), noise=SecureRandom()).vector
    less = train_locally(small, data[:-1], settings(normaliser=2.0), noise=SecureRandom()).vector
    assert np.linalg.norm(whole - less) > 0.05 * unit * 1.1


def test_without_clipping_one_record_would_move_more():
    small, data = small_lm(), examples(6)
    loose = settings(clip_norm=1e6)
    whole = train_locally(small, data, loose, noise=SecureRandom()).vector
    less = train_locally(small, data[:-1], loose, noise=SecureRandom()).vector
    assert np.linalg.norm(whole - less) > 0.05 * loose.learning_rate / loose.normaliser * 2


@pytest.mark.parametrize(("scale", "passes"), [(1.0, True), (0.25, False), (0.0, False)])
def test_noise_has_the_calibrated_scale_and_weaker_noise_is_noticed(scale, passes):
    """With no records the update is noise alone; false alarm 1e-6, power 1 at a quarter of the scale."""
    small, chosen = small_lm(), settings(noise_multiplier=1.5 * scale, steps=2)
    vector = train_locally(small, [], chosen, noise=SecureRandom()).vector.astype(np.float64)
    unit = chosen.learning_rate / chosen.normaliser * chosen.clip_norm * 1.5
    statistic = (vector**2).sum() / (2 * unit**2)
    low, high = chi2.ppf([5e-7, 1 - 5e-7], small.dimension)
    assert bool(low < statistic < high) is passes


def test_a_step_that_samples_nobody_is_still_a_step():
    """Otherwise a missing step would tell that the sample was empty."""
    small = small_lm()
    update = train_locally(
        small, examples(2), settings(sampling_rate=1e-12, noise_multiplier=1.0), noise=SecureRandom()
    )
    assert update.steps == 1
    assert (update.vector != 0).all()


def test_records_are_sampled_at_the_public_rate():
    """A source that counts its coins; 5 standard deviations, false alarm 6e-7."""

    class Counting(SecureRandom):
        heads = 0

        def bernoulli(self, count, *, probability):
            coins = super().bernoulli(count, probability=probability)
            self.heads += int(coins.sum())
            return coins

    source = Counting()
    train_locally(small_lm(), examples(20), settings(sampling_rate=0.3, steps=20), noise=source)
    mean, deviation = 0.3 * 20 * 20, (0.21 * 20 * 20) ** 0.5
    assert abs(source.heads - mean) < 5 * deviation


def test_a_records_loss_does_not_depend_on_its_batch():
    small, data = small_lm(), examples(9)
    together = example_losses(small, data)
    alone = torch.cat([example_losses(small, [example]) for example in data])
    assert torch.allclose(together, alone, atol=1e-5)


def test_only_loss_positions_count():
    small = small_lm()
    ids = (0, 5, 6, 7, 8)
    whole, tail = example_losses(small, [SmallExample(ids, 1), SmallExample(ids, 4)])
    logits = small.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    steps = -logits[torch.arange(4), torch.tensor(ids[1:])]
    assert torch.allclose(whole, steps.mean(), atol=1e-5)
    assert torch.allclose(tail, steps[3], atol=1e-5)


def test_training_leaves_the_model_as_it_was():
    small, data = small_lm(), examples(8)
    before = {name: value.clone() for name, value in small.model.state_dict().items()}
    update = train_locally(small, data, settings(steps=3, noise_multiplier=1.0), noise=SecureRandom())
    assert np.abs(update.vector).sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in small.model.state_dict().items())
    assert not small.model.training
    # Opacus's hooks are gone: the same model can be trained and evaluated again.
    train_locally(small, data, settings(), noise=SecureRandom())
    assert not any(module._backward_hooks or module._forward_hooks for module in small.model.modules())


def test_the_same_data_gives_fresh_noise_every_time():
    small, data, noisy = small_lm(), examples(5), settings(noise_multiplier=1.0)
    first = train_locally(small, data, noisy, noise=SecureRandom()).vector
    assert (first != train_locally(small, data, noisy, noise=SecureRandom()).vector).any()


@pytest.mark.parametrize("size", [1e10, 1e20, 1e37])
def test_weights_that_overflow_on_a_record_reveal_nothing_about_it(size):
    """An adversary's adapter may make gradients infinite or NaN; they count as zero and the sum stays bounded."""
    small, data, chosen = small_lm(), examples(6), settings()
    small.load_adapter_vector(np.where(np.arange(small.dimension) % 2, size, -size).astype(np.float32))
    unit = chosen.learning_rate / chosen.normaliser
    whole = train_locally(small, data, chosen, noise=SecureRandom()).vector
    assert np.isfinite(whole).all()
    for index in range(len(data)):
        less = train_locally(small, data[:index] + data[index + 1 :], chosen, noise=SecureRandom()).vector
        assert np.linalg.norm(whole - less) <= chosen.clip_norm * unit * (1 + 1e-4)


def test_the_update_keeps_the_noise_in_double_precision():
    """The broken variant would leave every entry on the grid of single precision, which tells data sets apart."""
    small = small_lm()
    vector = train_locally(small, examples(3), settings(noise_multiplier=1.0), noise=SecureRandom()).vector
    assert vector.dtype == np.float64
    assert (vector.astype(np.float32) != vector).mean() > 0.99


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip_norm", 0.0),
        ("clip_norm", float("inf")),
        ("sampling_rate", 0.0),
        ("sampling_rate", 1.5),
        ("noise_multiplier", -1.0),
        ("noise_multiplier", float("nan")),
        ("normaliser", 0.0),
        ("learning_rate", float("nan")),
        ("steps", 0),
    ],
)
def test_settings_that_are_no_mechanism_are_refused(field, value):
    with pytest.raises(PrivacyError, match=str(field).replace("_", ".").split(".")[0]):
        train_locally(small_lm(), examples(2), settings(**{field: value}), noise=SecureRandom())


def test_two_neighbouring_data_sets_cannot_be_told_apart_better_than_promised():
    """Two worlds, one real step each, a fixed threshold: the measured mu stays below 1/sigma; sigma/4 is caught.

    The distinguisher knows everything but the noise and projects the release on the one record's clipped gradient.
    Each error rate is bounded by Clopper-Pearson at 1e-4, so the false alarm is at most 2e-4.
    """
    from scipy.stats import beta, norm

    small, data = small_lm(), examples(4)
    unit = settings().learning_rate / settings().normaliser
    direction = naive_update(small, data[-1:], settings())
    direction /= np.linalg.norm(direction)
    threshold = naive_update(small, data[:-1], settings()) @ direction + 0.05 * unit / 2
    trials = 120

    def measured_mu(noise_multiplier: float) -> float:
        noisy = settings(noise_multiplier=noise_multiplier)
        absent, present = (
            np.array(
                [train_locally(small, world, noisy, noise=SecureRandom()).vector @ direction for _ in range(trials)]
            )
            for world in (data[:-1], data)
        )
        errors = int((absent > threshold).sum()), int((present <= threshold).sum())
        bounds = [beta.ppf(1 - 1e-4, count + 1, trials - count) for count in errors]
        return float(norm.ppf(1 - bounds[0]) - norm.ppf(bounds[1]))

    assert measured_mu(1.0) <= 1.0
    assert measured_mu(0.25) > 1.0
