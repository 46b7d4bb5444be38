"""Public directions pass more of a layer's input than random ones, and reach the adapter as stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.config import LoraSettings
from fedpt_secure.errors import ConfigError, ModelError
from fedpt_secure.lm.base import BaseLM
from fedpt_secure.lm.directions import Directions, principal_directions
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.lm.token_map import TokenMap

LAYER = "model.layers.1.mlp.down_proj"


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def sequences(seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 50, 20).tolist() for _ in range(30)]


@pytest.fixture(scope="module")
def directions():
    return principal_directions(model(), sequences(1), modules=("down_proj", "o_proj"), count=8)


def inputs(base, data):
    seen = []
    handle = base.get_submodule(LAYER).register_forward_pre_hook(lambda module, values: seen.append(values[0][0]))
    with torch.inference_mode():
        for sequence in data:
            base(input_ids=torch.tensor([sequence]))
    handle.remove()
    return torch.cat(seen)


def test_rows_are_orthonormal_and_ordered_by_energy(directions):
    rows, energies = directions.rows[LAYER], directions.energies[LAYER]
    assert torch.allclose(rows @ rows.T, torch.eye(8), atol=1e-5)
    assert (energies[:-1] >= energies[1:]).all()


def test_they_pass_more_of_other_text_than_random_directions_do(directions):
    seen = inputs(model(), sequences(2))
    total = (seen**2).sum()
    torch.manual_seed(3)
    random = torch.linalg.qr(torch.randn(32, 8)).Q.T
    kept, kept_at_random = (((seen @ rows.T) ** 2).sum() / total for rows in (directions.rows[LAYER], random))
    assert kept > 0.6
    assert kept_at_random < 0.4


def test_the_stored_energies_are_the_mean_squares(directions):
    seen = inputs(model(), sequences(1))
    measured = ((seen @ directions.rows[LAYER].T) ** 2).mean(0)
    assert torch.allclose(measured, directions.energies[LAYER], rtol=1e-3)


def test_a_has_the_energy_of_a_random_a(directions):
    seen = inputs(model(), sequences(1))
    energy = ((seen @ directions.lora_a(LAYER, 4).T) ** 2).mean()
    assert float(energy) == pytest.approx(1 / 3, rel=1e-3)


def test_a_wider_a_keeps_the_columns_of_a_narrower_one():
    wide = Directions({LAYER: torch.eye(64)}, {LAYER: torch.linspace(3, 0.1, 64)})
    assert torch.equal(wide.lora_a(LAYER, 64)[:32], wide.lora_a(LAYER, 32))
    assert torch.equal(wide.lora_a(LAYER, 33)[:32], wide.lora_a(LAYER, 32))
    assert not torch.equal(wide.lora_a(LAYER, 32)[:31], wide.lora_a(LAYER, 31))


def test_the_adapter_takes_them_and_freezes_them(directions):
    base = BaseLM(model(), TokenMap.identity(50), "tiny", directions)
    lora = LoraSettings(rank=4, layers=1, modules=("down_proj",))
    small = SmallLM(base, lora, seed=0, device=torch.device("cpu"))
    frozen = dict(small.model.named_parameters())
    (a,) = (value for name, value in frozen.items() if "lora_A" in name)
    assert torch.equal(a.detach(), directions.lora_a(LAYER, 4))
    assert not a.requires_grad
    assert small.directions == "public"


def test_without_shipped_directions_a_is_random_from_the_seed_and_public_is_refused():
    def attach(seed, choice="auto"):
        base = BaseLM(model(), TokenMap.identity(50), "tiny")
        return SmallLM(base, LoraSettings(rank=4, directions=choice), seed=seed, device=torch.device("cpu"))

    assert attach(1).directions == "random"
    assert attach(1).digest == attach(1).digest
    assert attach(1).digest != attach(2).digest
    with pytest.raises(ConfigError, match="no public directions"):
        attach(1, "public")


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_whitening_takes_the_difference_of_energies_out(directions, whitening):
    seen = inputs(model(), sequences(1))
    plain, white = (
        ((seen @ directions.lora_a(LAYER, 8, whitening=share).T) ** 2).mean(0) for share in (0.0, whitening)
    )
    strongest = plain.mean()  # of these 8
    assert torch.allclose(white, strongest * (plain / strongest) ** (1 - whitening), rtol=1e-2)


def test_whitening_of_random_directions_is_refused():
    base = BaseLM(model(), TokenMap.identity(50), "tiny")
    with pytest.raises(ConfigError, match="random directions"):
        SmallLM(base, LoraSettings(rank=4, whitening=0.5), seed=0, device=torch.device("cpu"))


def test_layers_that_read_the_same_input_share_what_is_stored(directions):
    modules = ("q_proj", "v_proj", "gate_proj", "up_proj")
    measured = principal_directions(model(), sequences(1), modules=modules, count=8)
    kept = {name: rows for name, rows in measured.rows.items() if name.endswith(("q_proj", "gate_proj"))}
    once = Directions(kept, {name: measured.energies[name] for name in kept})
    for reader in ("self_attn.v_proj", "mlp.up_proj"):
        layer = f"model.layers.1.{reader}"
        assert layer not in once.rows
        assert torch.equal(once.lora_a(layer, 4), measured.lora_a(layer, 4))


def test_a_layer_of_another_input_gets_nobody_elses(directions):
    with pytest.raises(ConfigError, match=r"directions for model\.layers\.0\.self_attn\.q_proj; the small LM ships 0"):
        directions.lora_a("model.layers.0.self_attn.q_proj", 1)


def test_more_than_are_stored_is_refused(directions):
    with pytest.raises(ConfigError, match="rank 9"):
        directions.lora_a(LAYER, 9)


def test_files_come_back_and_damaged_ones_are_refused(directions, tmp_path):
    path = tmp_path / "directions.safetensors"
    directions.save(path)
    loaded = Directions.load(path)
    assert torch.allclose(loaded.rows[LAYER].float(), directions.rows[LAYER], atol=1e-3)
    assert torch.equal(loaded.energies[LAYER], directions.energies[LAYER])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ModelError, match="cannot be read"):
        Directions.load(path)
