"""The measurements: time, peak memory, operations, exactness, and what the shape of a pass does to a gradient."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dp_training_cases import NON_PRIVATE, Case, Variant, build, make_examples, passes, run, sum_with
from torch.utils.flop_counter import FlopCounterMode

from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy import SmallExample, example_losses

Seconds = dict[str, list[tuple[float, float]]]
"""Wall-clock and processor seconds of each repetition, by variant."""
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def conditions(device: str, threads: int) -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    on_gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "opacus", "peft", "transformers")},
    }


def times(
    small: SmallLM,
    examples: Sequence[SmallExample],
    variants: Sequence[Variant],
    repetitions: int,
    on_repetition: Callable[[], None],
) -> Seconds:
    """Time all variants in every repetition, each time in another order, after one that is not counted."""
    seconds: Seconds = {variant.name: [] for variant in variants}
    order = np.random.default_rng(2)
    for variant in variants:
        run(small, examples, variant)
    for _ in range(repetitions):
        for index in order.permutation(len(variants)):
            _wait(small)
            wall, processor = time.perf_counter(), time.process_time()
            run(small, examples, variants[index])
            _wait(small)
            elapsed = time.perf_counter() - wall, time.process_time() - processor
            seconds[variants[index].name].append(elapsed)
        on_repetition()
    return seconds


def norm_errors(
    small: SmallLM, examples: Sequence[SmallExample], variants: Sequence[Variant]
) -> dict[str, float | None]:
    """Largest relative error of a per-example norm against one backward pass an example; None if not private."""
    norms = []
    for example in examples:
        gradients = torch.autograd.grad(example_losses(small, [example])[0], small.trainable)
        norms.append(float(torch.linalg.vector_norm(torch.cat([part.flatten() for part in gradients]).double())))
    naive = np.array(norms)
    return {
        variant.name: None
        if variant.method == NON_PRIVATE
        else float(np.abs(sum_with(small, examples, variant).norms / naive - 1).max())
        for variant in variants
    }


def flops(small: SmallLM, examples: Sequence[SmallExample], variants: Sequence[Variant]) -> dict[str, int]:
    """Floating-point operations of matrix products and attention."""
    counts = {}
    for variant in variants:
        with FlopCounterMode(display=False) as counter:
            run(small, examples, variant)
        counts[variant.name] = counter.get_total_flops()
    return counts


def rounding(small: SmallLM, examples: Sequence[SmallExample], batch: int) -> dict[str, float]:
    """How far one example's gradient moves, relative to its norm, when others share its pass; largest over examples.

    Computed by plain autograd: the example's row of the pass alone is differentiated.
    """
    largest = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        moved = 0.0
        for shared in passes(examples[:24], batch):
            for index, example in enumerate(shared[:2]):
                alone, together = (
                    _gradient(small, rows, row, dtype) for rows, row in (([example], 0), (shared, index))
                )
                moved = max(moved, float((alone - together).norm() / alone.norm()))
        largest[name] = moved
    return largest


def _gradient(small: SmallLM, batch: list[SmallExample], row: int, dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast(small.device.type, dtype=dtype, enabled=dtype != torch.float32):
        loss = example_losses(small, batch)[row]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, small.trainable)]).double()


def memory_in_a_fresh_process(case: Case, variants: Sequence[Variant]) -> dict[str, dict[str, int]] | None:
    """`peak_memory` in a process of its own, where nothing else has been allocated yet."""
    argument = json.dumps([asdict(case), [asdict(variant) for variant in variants]])
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("dp_training.py")), "--memory-of", argument]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def peak_memory(case: Case, variants: Sequence[Variant]) -> dict[str, dict[str, int]] | None:
    """Bytes by variant: `model`, the loaded model, and `working`, what a step needs beyond it at its peak.

    On a GPU both are PyTorch's allocator's. On Linux they are resident memory: the kernel's high-water mark is reset
    before each variant, after freed memory has been handed back, so that a peak that lasts a microsecond is seen.
    Elsewhere None: no mark can be reset there.
    """
    on_gpu = case.device.startswith("cuda")
    if not on_gpu and not _CLEAR.exists():
        return None
    before = _resident(on_gpu)
    small = build(case)
    examples = make_examples(case, small)
    for variant in variants:  # thread pools, code and scratch space that stay are the model's, not one variant's
        run(small, examples[:1], variant)
    loaded = _resident(on_gpu)
    memory = {}
    for variant in variants:
        start = _resident(on_gpu)
        _reset_peak(on_gpu)
        run(small, examples, variant)
        memory[variant.name] = {"model": loaded - before, "working": max(0, _peak(on_gpu) - start)}
    return memory


def peak_of(run: Callable[[], object]) -> int | None:
    """Resident bytes that one call needs beyond what there was before it; None where the system keeps no mark."""
    if not _CLEAR.exists():
        return None
    before = _resident(on_gpu=False)
    _reset_peak(on_gpu=False)
    run()
    return max(0, _peak(on_gpu=False) - before)


def _resident(on_gpu: bool) -> int:
    gc.collect()
    if on_gpu:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    return _status("VmRSS")


def _reset_peak(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        _CLEAR.write_text("5")


def _peak(on_gpu: bool) -> int:
    return torch.cuda.max_memory_allocated() if on_gpu else _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def _wait(small: SmallLM) -> None:
    if small.device.type == "cuda":
        torch.cuda.synchronize()


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
