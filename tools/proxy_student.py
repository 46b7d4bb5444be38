"""The student of `distil_proxy.py`: how it begins, what it reads, how it is trained until the time is up."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from plain_llama import MATRICES, Shape, Weights, block, hidden, layer_weights, load
from proxy_training import Batch, HeadKernels, Muon, head_loss
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INITIAL_NORM_SCALE = 0.1
STANDARD_DEVIATION = 0.02
"""Of a fresh layer's matrices."""
HEAD_CHUNK = {"cpu": 1024, "cuda": 32 * 255}
"""Positions whose logits exist at one time; on a GPU it divides the usual batches: compiled loops see one size."""
LOG_STEPS = 100

Say = Callable[[dict[str, object]], None]


def train_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--name", default="proxy")
    sub.add_argument(
        "--layers",
        default="fresh:6",
        help="teacher's layers to begin from; `fresh:6`: new ones; `A;B`: the better",
    )
    sub.add_argument("--trial-seconds", type=float, default=10, help="that each of several beginnings is tried")
    sub.add_argument("--intermediate", type=int, default=1152)
    sub.add_argument("--rows", type=int, default=256, help="in a batch")
    sub.add_argument("--lr", type=float, default=3e-3)
    sub.add_argument("--embedding-share", type=float, default=0.3, help="the embedding's part of the learning rate")
    sub.add_argument("--weight-decay", type=float, default=0.01)
    sub.add_argument("--warmup-steps", type=int, default=100)
    sub.add_argument("--decay-share", type=float, default=0.4)
    sub.add_argument("--distill-share", type=float, default=0.8)
    sub.add_argument("--seconds", type=float, default=300, help="the decay ends then")
    sub.add_argument("--compile", action="store_true")


def initial(teacher: Weights, mapping: np.ndarray, layers: str, intermediate: int, seed: int) -> dict[str, Tensor]:
    """The student before its first step, float32: the teacher's rows, and its layers or fresh ones (`fresh:N`).

    Of a teacher's layer the neurons with the largest product of weight norms stay. A short stack ends with far more
    confident logits than the teacher's, so the last norm begins small.
    """
    source = {name: tensor.float() for name, tensor in teacher.items()}
    embedding = source["model.embed_tokens.weight"]
    kept = torch.from_numpy(mapping[:-1]).to(embedding.device)
    left_out = torch.ones(len(embedding), dtype=torch.bool, device=embedding.device)
    left_out[kept] = False
    student = {
        "model.embed_tokens.weight": torch.cat([embedding[kept], embedding[left_out].mean(0, keepdim=True)]),
        "model.norm.weight": source["model.norm.weight"] * INITIAL_NORM_SCALE,
    }
    fresh = int(layers.removeprefix("fresh:")) if layers.startswith("fresh:") else 0
    generator = torch.Generator().manual_seed(seed)
    for target, index in enumerate(range(fresh) if fresh else map(int, layers.split(","))):
        state = dict(zip(parts(), layer_weights(source, 0 if fresh else index), strict=True))
        gate, up, down = (state[f"mlp.{name}_proj"] for name in ("gate", "up", "down"))
        strongest = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).topk(min(intermediate, len(gate))).indices
        strongest = strongest.sort().values
        state |= {"mlp.gate_proj": gate[strongest], "mlp.up_proj": up[strongest], "mlp.down_proj": down[:, strongest]}
        for name, value in state.items():
            if fresh and value.ndim == 1:
                new = torch.ones_like(value)
            elif fresh and name in ("self_attn.o_proj", "mlp.down_proj"):
                new = torch.zeros_like(value)
            elif fresh:
                new = torch.randn(value.shape, generator=generator).to(value) * STANDARD_DEVIATION
            else:
                new = value
            student[f"model.layers.{target}.{name}.weight"] = new
    return {name: tensor.clone().contiguous() for name, tensor in student.items()}


def parts() -> tuple[str, ...]:
    """Names inside a layer, in the order of `plain_llama.layer_weights`."""
    return ("input_layernorm", "post_attention_layernorm", *MATRICES)


class Rows:
    """Scored rows on the device.

    Attributes:
        rows: int16 `[rows, length]` of the small vocabulary; top_ids, top_shares: the teacher's answers.
        kinds: kind of text -> how many rows, in their order.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        with safe_open(path, "pt", device=str(device)) as handle:
            self.rows, self.top_ids, self.top_shares = map(handle.get_tensor, ("rows", "top_ids", "top_shares"))
            self.kinds: dict[str, int] = json.loads(handle.metadata()["kinds"])

    def batch(self, which: Tensor) -> Batch:
        """Those rows, as `proxy_training` takes them."""
        rows = self.rows[which].long()
        shares = self.top_shares[which].float()
        answered = torch.ones_like(rows[:, 1:], dtype=torch.bool)
        return Batch(rows[:, :-1], rows[:, 1:], self.top_ids[which].long(), shares, answered)


def train(options: argparse.Namespace) -> None:
    """Try the beginnings side by side, go on with the best until the time is up; write the weights and the log."""
    device = torch.device(options.device)
    mapping = np.asarray(json.loads((options.work / "small_to_large.json").read_text()), dtype=np.int64)
    teacher, shape = load(options.large, device, torch.float32), Shape.read(options.large)

    def say(row: dict[str, object]) -> None:
        with (options.work / f"{options.name}.log.jsonl").open("a") as log:
            print(json.dumps(row), file=log)
        print(json.dumps(row), flush=True)

    data = Rows(options.work / "scored-train.safetensors", device)
    checks = Rows(options.work / "scored-held-out.safetensors", device)
    say({"rows": data.kinds, "options": {key: str(value) for key, value in vars(options).items() if key != "run"}})
    beginnings = options.layers.split(";")
    best: Training | None = None
    began = time.time()
    for layers in beginnings:
        student = initial(teacher, mapping, layers, options.intermediate, options.seed)
        training = Training(student, shape, data, options)
        say({"begins": layers, "parameters": sum(tensor.numel() for tensor in student.values())})
        training.step(1.0)  # compiled by now: the clock starts here
        if layers == beginnings[0]:
            synchronise(device)
            began = time.time()
        if len(beginnings) > 1:
            training.run(lambda spent: 1.0, options.trial_seconds, say)
            training.found = training.evaluate(checks)
            say({"begins": layers, "tokens": training.tokens, "score": training.score()} | training.found)
        if best is None or training.score() < best.score():
            best = training
    if best is None:
        raise SystemExit("error: --layers names no beginning")
    del training, student, teacher
    left = options.seconds - (time.time() - began)
    best.run(lambda spent: min(1.0, (1 - spent) / options.decay_share), left, say, checks)
    say({"tokens": best.tokens, "final": True, "seconds": round(time.time() - began)} | best.evaluate(checks))
    save_file(
        {name: tensor.detach().to(torch.float16).cpu().contiguous() for name, tensor in best.student.items()},
        options.work / f"{options.name}.safetensors",
        metadata={
            "tokens": str(best.tokens),
            "intermediate": str(options.intermediate),
            "depth": str(best.shape.layers),
        },
    )


def synchronise(device: torch.device) -> None:
    """Wait for what is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Training:
    """A student, its optimisers and its way through the rows.

    Attributes:
        student: float32 weights.
        tokens: predicted so far.
        found: the last evaluation.
    """

    def __init__(self, student: dict[str, Tensor], teacher: Shape, data: Rows, options: argparse.Namespace) -> None:
        depth = sum(name.endswith("input_layernorm.weight") for name in student)
        self.shape = Shape(depth, teacher.heads, teacher.kv_heads, teacher.theta, teacher.epsilon)
        self.student, self._data, self._options = student, data, options
        self.tokens, self.found = 0, {}
        for tensor in student.values():
            tensor.requires_grad_()
        self._steppers = optimizers(student, options)
        self._layer = torch.compile(block) if options.compile else block
        self._kernels = HeadKernels(compiled=options.compile, chunk=HEAD_CHUNK[data.rows.device.type])
        self._generator = torch.Generator().manual_seed(options.seed)
        self._order = torch.empty(0, dtype=torch.int64)
        self._steps = 0

    def loss(self, batch: Batch, layer: Callable = block) -> tuple[Tensor, Tensor]:
        """Cross-entropy, whose `backward` is the mixed loss's, and the divergence."""
        states = hidden(self.student, batch.inputs, self.shape, torch.bfloat16, layer)
        embedding = self.student["model.embed_tokens.weight"]
        return head_loss(states, embedding, batch, self._options.distill_share, self._kernels)

    def step(self, rate: float) -> tuple[Tensor, Tensor]:
        """One step at this part of the learning rate (less in the warm-up)."""
        rows = self._options.rows
        if len(self._order) < rows:
            self._order = torch.randperm(len(self._data.rows), generator=self._generator)
        which, self._order = self._order[:rows], self._order[rows:]
        loss, divergence = self.loss(self._data.batch(which.to(self._data.rows.device)), self._layer)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.values(), 1.0)
        rate = min(rate, (self._steps + 1) / self._options.warmup_steps)
        for stepper in self._steppers:
            for group in stepper.param_groups:
                group["lr"] = self._options.lr * rate * group["share"]
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        self._steps += 1
        self.tokens += rows * (self._data.rows.shape[1] - 1)
        return loss.detach(), divergence.detach()

    def run(self, rate: Callable[[float], float], seconds: float, say: Say, checks: Rows | None = None) -> None:
        """Steps for so long; `rate` of the part of the time that is spent."""
        began = last = time.time()
        since, shown = self.tokens, 0
        while (spent := (time.time() - began) / seconds) < 1:
            loss, divergence = self.step(rate(spent))
            if self._steps % LOG_STEPS == 0:
                loss, now = float(loss), time.time()
                speed = round((self.tokens - since) / (now - last))
                found = {"train": round(loss, 4), "divergence": round(float(divergence), 4)}
                say({"tokens": self.tokens, **found, "rate": round(rate(spent), 4), "tokens_per_s": speed})
                if checks is not None and int(spent * 10) > shown:
                    shown = int(spent * 10)
                    say({"tokens": self.tokens} | self.evaluate(checks))
                last, since = time.time(), self.tokens

    def score(self) -> float:
        """Mean divergence from the teacher over the kinds of text; infinite before an evaluation."""
        values = [value for name, value in self.found.items() if name.startswith("divergence")]
        return float(np.mean(values)) if values else float("inf")

    @torch.no_grad()
    def evaluate(self, checks: Rows) -> dict[str, float]:
        """Cross-entropy in nats per small token, and divergence from the teacher, by kind of text."""
        found: dict[str, float] = {}
        bounds = np.cumsum([0, *checks.kinds.values()])
        for kind, (first, last) in zip(checks.kinds, pairwise(bounds.tolist()), strict=True):
            which = torch.arange(first, last, device=checks.rows.device)
            hard, soft = self.loss(checks.batch(which))
            found |= {f"held_out_{kind}": round(float(hard), 4), f"divergence_{kind}": round(float(soft), 4)}
        return found


def optimizers(student: dict[str, Tensor], options: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest.

    The embedding is the teacher's: it moves slower (`Training.step` scales each group's rate by its `share`).
    """
    embedding = student["model.embed_tokens.weight"]
    matrices = [tensor for name, tensor in student.items() if ".layers." in name and tensor.ndim == 2]
    norms = [tensor for tensor in student.values() if tensor.ndim == 1]
    return [
        Muon([{"params": matrices, "share": 1.0}], lr=options.lr, weight_decay=options.weight_decay),
        torch.optim.AdamW(
            [{"params": [embedding], "share": options.embedding_share}, {"params": norms, "share": 1.0}],
            lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True,
        ),
    ]  # fmt: skip
