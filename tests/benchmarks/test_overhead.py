"""The overhead benchmark: projections count what the counter counts, bytes are those of a real round."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ["overhead", *(path.stem for path in BENCHMARKS.glob("overhead_*.py"))]


@pytest.fixture(scope="module")
def benchmark():
    """Its modules by name, imported as its script does, and forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def shape(benchmark):
    """A small shape whose products are large beside what the formulas leave out."""
    return benchmark["overhead_projections"].Shape("tiny", 64, 160, 3, 4, 2, 512)


def llama(shape):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=shape.tied,
    )
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def counted(model, tokens, *, backward):
    ids = torch.arange(tokens)[None]
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum()
        if backward:
            loss.backward()
    return counter.get_total_flops()


def test_a_shape_has_as_many_parameters_as_its_model(shape):
    assert shape.parameters == sum(p.numel() for p in llama(shape).parameters())


@pytest.mark.parametrize("tokens", [16, 64])
def test_projected_operations_are_those_that_are_counted(tokens, shape):
    model = llama(shape)
    assert shape.forward(tokens) == pytest.approx(counted(model, tokens, backward=False), rel=0.02)
    assert shape.full(tokens) == pytest.approx(counted(model, tokens, backward=True), rel=0.02)
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    assert shape.lora(tokens, 8) == pytest.approx(counted(tuned, tokens, backward=True), rel=0.05)
    assert shape.lora_parameters(8) == sum(p.numel() for p in tuned.parameters() if p.requires_grad)


def test_published_shapes_have_their_published_sizes(benchmark):
    """Parameters as the publications round them."""
    module = benchmark["overhead_projections"]
    found = {shape.name: shape.parameters / 1e9 for shape in (module.LLAMA2_7B, module.LLAMA2_13B, module.LLAMA2_70B)}
    assert found["Llama-2-7B"] == pytest.approx(6.74, abs=0.01)
    assert found["Llama-2-13B"] == pytest.approx(13.02, abs=0.01)
    assert found["Llama-2-70B"] == pytest.approx(68.98, abs=0.01)


def test_every_projection_says_that_it_is_one(benchmark):
    rows = benchmark["overhead_projections"].projections(tokens=128, records=32)
    assert len(rows) == 9
    assert all(row["projection"] is True for row in rows)
    by_way = {row["way"]: row for row in rows if row["pair"] == "Llama-2-7B / Llama-2-70B"}
    assert by_way["FedPT"]["flops"] < by_way["federated LoRA of the large"]["flops"] / 8


def test_payloads_are_within_a_per_cent_of_a_real_rounds(benchmark, tiny_models, chat_file, tmp_path):
    """Bytes that the transcript of a run counted, against the benchmark's computation for its cohort and adapter."""
    from fedpt_secure.config import RunConfig, build
    from fedpt_secure.data import Cache
    from fedpt_secure.federation import RunDirectory, run_training
    from fedpt_secure.progress import SILENT

    settings = {
        "data": {"source": str(chat_file), "client_column": "who", "text_column": "said"},
        "models": {"small": tiny_models["small"], "large": tiny_models["large"], "device": "cpu", "context_length": 12},
        "lora": {"rank": 256, "layers": 0},
        "federation": {"rounds": 1, "cohort": 5},
        "evaluation": {"records": 10, "bootstrap_samples": 200},
        "privacy": {"epsilon": float("inf")},
    }
    directory = RunDirectory.create(tmp_path / "run", build(RunConfig, settings))
    result = run_training(directory.config(), directory, cache=Cache(tmp_path / "cache"), progress=SILENT)
    computed = benchmark["overhead_arms"].payload(result.dimension, cohort=5)
    (line,) = directory.read_log("transcript")
    assert np.mean(list(line["bytes_up"].values())) == pytest.approx(computed["up"], rel=0.01)
    assert np.mean(list(line["bytes_down"].values())) == pytest.approx(computed["down"], rel=0.01)


def test_the_tables_and_the_figure_come_from_the_json_alone(benchmark, tmp_path, capsys):
    module, cost = (
        benchmark["overhead_report"],
        {"flops": 4e12, "seconds": 3.0, "bytes_up": 77_000, "bytes_down": 83_000},
    )
    arm = {
        "label": "an arm",
        "trained_parameters": 18_432,
        "client_round": cost | {"process_bytes": 6e8, "private_bytes": 4e8},
        "whole_run": cost | {"rounds": 8},
    }
    results = {"arms": [arm], "projections": benchmark["overhead_projections"].projections(tokens=128, records=32)}
    text = module.markdown(results)
    for part in ("an arm", "4 TFLOP", "77 kB", "400 MB", "PROJECTED"):
        assert part in text
    module.write_plot(results, tmp_path / "overhead.svg")
    assert (tmp_path / "overhead.svg").read_text().startswith("<?xml")
    module.print_tables(results)
    assert "PROJECTED" in capsys.readouterr().out


def test_the_committed_costs_were_made_by_the_committed_configurations(benchmark):
    path = Path(__file__).parents[2] / "fedpt_secure" / "report" / "device_costs.json"
    content = json.loads(path.read_text())
    arms = benchmark["overhead_arms"].CANDIDATES
    named = ("rank", "layers", "sampled_positions", "training_dtype")
    assert [tuple(c[name] for name in named) for c in content["configurations"]] == [
        (arm.lora["rank"], arm.lora["layers"], arm.positions, arm.dtype) for arm in arms
    ]
