"""Only devices that compute are taken."""

from __future__ import annotations

import pytest
import torch

from fedpt_secure.errors import ConfigError
from fedpt_secure.lm.devices import resolve_device


def test_auto_is_a_device_that_is_there():
    device = resolve_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "name",
    ["meta", "xla", "cpu:1", "cuda:", "cuda:-1", "cuda:1000", "cuda:\u0661", "CPU", " cpu", "cpu\n", "", "abacus"],
)
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError, match="not one of auto, cpu, cuda, cuda:N and mps"):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.device_count() > 99, reason="there is such a device")
def test_a_device_that_is_not_there_is_named_in_one_short_line():
    with pytest.raises(ConfigError, match="'cuda:99' is not available") as caught:
        resolve_device("cuda:99")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 200
