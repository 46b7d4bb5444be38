"""The pretraining step of the proxy: batches, the fused head loss, the optimiser, the initial weights.

Device-agnostic; nothing here reads files or the clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from proxy_corpus import SEPARATOR_ID, Stream
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

HEAD_CHUNK = 1024  # positions whose logits exist at one time
MAX_TAIL_RATIO = 20.0
INITIAL_NORM_SCALE = 0.1


@dataclass
class Batch:
    """Token ids are the small vocabulary's.

    Attributes:
        inputs, targets: int64 `[rows, seq]`.
        top_ids, top_probabilities: `[rows, seq, k]`; the teacher's answer at each position; probability 0 marks an
            entry that is not used (no answer, or a token outside the small vocabulary).
        has_teacher: bool `[rows, seq]`.
    """

    inputs: Tensor
    targets: Tensor
    top_ids: Tensor
    top_probabilities: Tensor
    has_teacher: Tensor


class Sampler:
    """Draws windows from a stream; a pure function of (stream, seed, step)."""

    def __init__(self, stream: Stream, table: np.ndarray, separator: int, unknown: int) -> None:
        self.stream, self.table, self.separator, self.unknown = stream, table, separator, unknown

    def windows(self, rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
        """int64 `[rows, length]` of stream positions; half of the windows open at a unit's first token.

        The token before a window is replaced by the separator in `batch`, as every sequence in use opens with it.
        """
        stream = self.stream
        first = rng.integers(0, len(stream.ids) - length - 1, size=rows)
        unit = np.searchsorted(stream.starts, first, side="right") - 1
        snap = rng.random(rows) < 0.5
        first = np.where(snap, np.minimum(stream.starts[unit], len(stream.ids) - length - 1), first)
        # A generated sequence's own separator is the opening one: step over it.
        first = first + (stream.ids[first] == SEPARATOR_ID)
        return first[:, None] + np.arange(length)[None, :]

    def batch(self, rng: np.random.Generator, rows: int, length: int, top_k: int) -> Batch:
        """Draw `rows` windows of `length` predicted tokens."""
        where = self.windows(rng, rows, length)
        targets = self.table[self.stream.ids[where]]
        inputs = np.concatenate([np.full((rows, 1), self.separator), targets[:, :-1]], axis=1)
        top_ids = np.full((rows, length, top_k), self.unknown)
        probabilities = np.zeros((rows, length, top_k), dtype=np.float32)
        has_teacher = np.zeros((rows, length), dtype=bool)
        if self.stream.top_ids is not None and self.stream.top_logprobs is not None:
            # The answer about the token at p stands at p - 1.
            before = np.maximum(where - 1, 0)
            answers = self.stream.top_logprobs[before].astype(np.float32)
            has_teacher = (answers[..., 0] < 0) | (answers[..., -1] < 0)
            top_ids = self.table[self.stream.top_ids[before]]
            probabilities = np.exp(answers) * has_teacher[..., None] * (top_ids != self.unknown)
        return Batch(
            *(torch.from_numpy(np.ascontiguousarray(a)) for a in (inputs, targets, top_ids, probabilities, has_teacher))
        )


def join(batches: Sequence[Batch]) -> Batch:
    """Stack batches of equal sequence length."""
    return Batch(*(torch.cat([getattr(b, name) for b in batches]) for name in Batch.__dataclass_fields__))


def _log_normaliser(logits: Tensor) -> Tensor:
    """float32 `[n, 1]` of logits `[n, v]` in any dtype."""
    return logits.float().logsumexp(-1, keepdim=True)


def _scaled_probabilities(logits: Tensor, normaliser: Tensor, factor: Tensor) -> Tensor:
    """`factor * softmax(logits)`, in the dtype of the logits."""
    return ((logits.float() - normaliser).exp() * factor).to(logits.dtype)


class HeadKernels:
    """The two passes over the logits; `compiled` fuses each into one loop."""

    def __init__(self, *, compiled: bool) -> None:
        self.log_normaliser = torch.compile(_log_normaliser) if compiled else _log_normaliser
        self.scaled_probabilities = torch.compile(_scaled_probabilities) if compiled else _scaled_probabilities


class _HeadLoss(torch.autograd.Function):
    """Mean loss over positions; the gradient is formed with the logits, chunk by chunk, and never stored per token."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, top_ids, top_probabilities, mix, kernels):
        count = hidden.shape[0]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        compute = weight.to(hidden.dtype)
        hard, soft = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
        for begin in range(0, count, HEAD_CHUNK):
            part = slice(begin, begin + HEAD_CHUNK)
            h, y, share = hidden[part], targets[part, None], mix[part, None]
            ids, q = top_ids[part], top_probabilities[part]
            logits = h @ compute.T
            normaliser = kernels.log_normaliser(logits)
            hard += (normaliser - logits.gather(1, y).float()).sum()
            p = (logits.gather(1, ids).float() - normaliser).exp() * (q > 0)
            rest_p = (1 - p.sum(1, keepdim=True)).clamp(min=1e-4)
            rest_q = (1 - q.sum(1, keepdim=True)).clamp(min=0.0)
            ratio = (rest_q / rest_p).clamp(max=MAX_TAIL_RATIO)
            # KL over the classes {each known top token, everything else}: inside "everything else" the student
            # keeps its own proportions.
            kl = (q * (q.clamp(min=1e-9).log() - p.clamp(min=1e-9).log())).sum(1, keepdim=True)
            kl = kl + rest_q * (rest_q.clamp(min=1e-9).log() - rest_p.log())
            soft += (kl * (share > 0)).sum()
            gradient = kernels.scaled_probabilities(logits, normaliser, 1 - share * ratio)
            gradient.scatter_add_(1, ids, (share * (ratio * p - q)).to(gradient.dtype))
            gradient.scatter_add_(1, y, (share - 1).to(gradient.dtype))
            grad_hidden[part] = gradient @ compute
            grad_weight += (gradient.T @ h).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.count = count
        answered = (mix > 0).sum().clamp(min=1)
        return hard / count, soft / answered

    @staticmethod
    def backward(ctx, grad_hard, _grad_soft):
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_hard / ctx.count
        return grad_hidden * scale, grad_weight * scale, None, None, None, None, None


def head_loss(
    hidden: Tensor, weight: Tensor, batch: Batch, distill_share: float, kernels: HeadKernels
) -> tuple[Tensor, Tensor]:
    """Cross-entropy mixed with the teacher's divergence, through a tied head.

    Where the teacher answered, the loss is `(1 - distill_share) * CE + distill_share * KL`, elsewhere CE.

    Args:
        hidden: `[rows, seq, width]`, after the final norm, in the computing dtype.
        weight: `[vocab, width]`, the tied embedding.
        kernels: how the passes over the logits are run.

    Returns:
        The mean CE over all positions, and the mean KL over answered ones (for the log). Calling `backward` on the
        first applies the gradient of the *mixed* loss: the two share one pass over the logits.
    """
    flat = hidden.flatten(0, 1)
    mix = batch.has_teacher.flatten().float() * distill_share
    return _HeadLoss.apply(
        flat,
        weight,
        batch.targets.flatten(),
        batch.top_ids.flatten(0, 1),
        batch.top_probabilities.flatten(0, 1),
        mix,
        kernels,
    )


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024), for the matrices inside the layers.

    The update has spectral norm about 1, scaled by `0.2 * sqrt(max(rows, columns))` to match AdamW's update size
    (Liu et al. 2025, arXiv 2502.16982), so that one learning rate serves both.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                buffer = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
                update = _orthogonal(parameter.grad.add(buffer, alpha=group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Five steps of the quintic Newton-Schulz iteration towards the nearest semi-orthogonal matrix."""
    x = matrix.to(torch.bfloat16)
    transposed = x.shape[0] > x.shape[1]
    if transposed:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if transposed else x).to(matrix.dtype)


def optimizers(
    model: LlamaForCausalLM, lr: float, weight_decay: float, embedding_share: float
) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms.

    The embedding is the teacher's: it moves slower, at `embedding_share` of the learning rate (the callers scale
    each group's `lr` by its `share`).
    """
    embedding = model.model.embed_tokens.weight
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    return [
        Muon([{"params": matrices, "share": 1.0}], lr=lr, weight_decay=weight_decay),
        torch.optim.AdamW(
            [{"params": [embedding], "share": embedding_share}, {"params": norms, "share": 1.0}],
            lr=lr,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        ),
    ]


def schedule(tokens: int, *, warmup: int, total: int, decay_share: float) -> float:
    """Warmup, plateau, linear decay to zero over the last `decay_share` of `total` tokens (WSD)."""
    rising = min(1.0, (tokens + 1) / warmup)
    falling = (total - tokens) / max(1.0, decay_share * total)
    return max(0.0, min(rising, falling, 1.0))


def initial_model(
    teacher: LlamaForCausalLM, small_to_large: np.ndarray, *, layers: Sequence[int], hidden: int, depth: int,
    intermediate: int, seed: int, fused_attention: bool,
) -> LlamaForCausalLM:  # fmt: skip
    """Build the proxy.

    With `layers`, the named layers of the teacher are taken over at its own width. Without, `depth` fresh layers of
    width `hidden` stand on the teacher's embedding, projected on its principal directions. The embedding has the kept
    rows; the unknown token starts as the mean of the rows left out.
    """
    torch.manual_seed(seed)
    source = teacher.config
    embedding = teacher.model.embed_tokens.weight.detach().float()
    kept = torch.from_numpy(small_to_large[small_to_large >= 0])
    left_out = torch.ones(len(embedding), dtype=torch.bool)
    left_out[kept] = False
    rows = torch.cat([embedding[kept], embedding[left_out].mean(0, keepdim=True)])
    width = source.hidden_size if layers else hidden
    config = LlamaConfig(
        vocab_size=len(small_to_large),
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=len(layers) or depth,
        num_attention_heads=width // 64,
        num_key_value_heads=source.num_key_value_heads if layers else width // 64 // 3,
        max_position_embeddings=512,
        rms_norm_eps=source.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0 if layers else 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=SEPARATOR_ID,
        eos_token_id=SEPARATOR_ID,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).float()
    # At 128 positions plain attention, compiled, is faster on a CPU than the fused kernel.
    model.set_attn_implementation("sdpa" if fused_attention else "eager")
    with torch.no_grad():
        if layers:
            model.model.embed_tokens.weight.copy_(rows)
            model.model.norm.weight.copy_(teacher.model.norm.weight)
            for target, index in zip(model.model.layers, layers, strict=True):
                _take_over(target, teacher.model.layers[index])
        else:
            mean = rows.mean(0, keepdim=True)
            _, _, directions = torch.linalg.svd(rows - mean, full_matrices=False)
            model.model.embed_tokens.weight.copy_((rows - mean) @ directions[:width].T)
            for layer in model.model.layers:
                for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    nn.init.zeros_(module.weight)
        # A short stack ends with far more confident logits than the teacher's: start near uniform.
        model.model.norm.weight.mul_(INITIAL_NORM_SCALE)
    return model


def _take_over(target: nn.Module, source: nn.Module) -> None:
    """Copy a layer; a narrower MLP keeps the neurons with the largest product of weight norms."""
    weights = {name: value.detach().float() for name, value in source.named_parameters()}
    width = target.mlp.gate_proj.weight.shape[0]
    gate, up, down = (weights[f"mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
    if width < gate.shape[0]:
        keep = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).topk(width).indices.sort().values
        weights |= {
            "mlp.gate_proj.weight": gate[keep], "mlp.up_proj.weight": up[keep], "mlp.down_proj.weight": down[:, keep]
        }  # fmt: skip
    for name, value in target.named_parameters():
        value.copy_(weights[name])
