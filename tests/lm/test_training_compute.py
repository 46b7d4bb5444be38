"""The dtype that training multiplies in: what the processor has, unless it is said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fedpt_secure.errors import ConfigError
from fedpt_secure.lm import training_compute as module
from fedpt_secure.lm.training_compute import training_dtype


@pytest.mark.parametrize("supported", [True, False])
def test_auto_is_bfloat16_where_the_processor_has_it(supported, monkeypatch):
    monkeypatch.setattr(
        module,
        "torch",
        SimpleNamespace(
            cpu=SimpleNamespace(_is_avx512_bf16_supported=lambda: supported), bfloat16="bf16", float32="f32"
        ),
    )
    assert training_dtype("auto", torch.device("cpu")) == ("bf16" if supported else "f32")
    assert training_dtype("float32", torch.device("cpu")) == "f32"
    assert training_dtype("bfloat16", torch.device("cpu")) == "bf16"
    assert training_dtype("auto", torch.device("mps")) == "f32"


def test_another_type_is_refused():
    with pytest.raises(ConfigError, match="float16"):
        training_dtype("float16", torch.device("cpu"))
