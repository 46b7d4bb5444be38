"""Text by the large model on a GPU: thousands of rows at once, each row filled to its end with one text after another.

A row opens with the separator and a prompt from the pool; tokens of a prompt are forced, the others sampled. Where the
model ends its text (end of message or of text), the next prompt of the pool follows in the same row, so that no
position is idle. One step of all rows is one CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from plain_llama import Shape, Weights, layer_weights, norm, rotary, rotate
from torch import Tensor

SEPARATOR_ID, MESSAGE_END_ID = 0, 2
TEMPERATURES = (0.7, 0.85, 1.0)
LEAST_OF_BEST = 0.03
"""A token is drawn only if it is at least this likely against the likeliest one: a small teacher's tail is noise."""
LENGTH_STEP = 64
"""Attention reads the cache up to the next multiple of this."""


@dataclass(frozen=True)
class Pool:
    """Prompts.

    Attributes:
        ids: int64 `[prompts, longest]`, each opened by the separator, padded with zeros. The last one opens the answer
            to a question that the model asked itself.
        lengths: int64 `[prompts]`.
        asks: bool `[prompts]`; the model first asks, then the last prompt follows and it answers.
    """

    ids: Tensor
    lengths: Tensor
    asks: Tensor

    @classmethod
    def of(cls, prompts: list[list[int]], asks: list[bool], answer: list[int], device: torch.device) -> Pool:
        """Lay prompts out; `answer` opens the answer to a question of the model's own, without a separator."""
        rows = [*prompts, answer]
        table = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
        for row, prompt in zip(table, rows, strict=True):
            row[: len(prompt)] = prompt
        lengths = torch.tensor([len(row) for row in rows])
        return cls(torch.from_numpy(table).to(device), lengths.to(device), torch.tensor([*asks, False]).to(device))


class Writer:
    """Writes batches of `[rows, length]` tokens.

    Args:
        weights: the large model's, in the dtype that it computes in.
        graphs: whether steps are captured as CUDA graphs; not on a CPU.
    """

    def __init__(
        self, weights: Weights, shape: Shape, pool: Pool, *, rows: int, length: int, seed: int, graphs: bool
    ) -> None:
        self._weights, self._shape, self._pool = weights, shape, pool
        self._rows, self._length, self._graphs = rows, length, graphs
        embedding = weights["model.embed_tokens.weight"]
        self._device, dtype = embedding.device, embedding.dtype
        torch.manual_seed(seed)
        width = embedding.shape[1] // shape.heads
        self._cosines, self._sines = rotary(length, shape, width, self._device)
        self._fused = [self._fuse(layer_weights(weights, index)) for index in range(shape.layers)]
        keep = {"device": self._device, "dtype": dtype}
        self._keys = [torch.zeros(rows, shape.kv_heads, length, width, **keep) for _ in range(shape.layers)]
        self._values = [torch.zeros_like(keys) for keys in self._keys]
        whole = {"device": self._device, "dtype": torch.int64}
        self._at = torch.zeros(1, **whole)
        self._prompt, self._place = torch.zeros(rows, **whole), torch.zeros(rows, **whole)
        self._temperature = torch.ones(rows, 1, device=self._device)
        self._out = torch.zeros(rows, length, **whole)
        self._captured: dict[int, torch.cuda.CUDAGraph] = {}

    @staticmethod
    def _fuse(weights: list[Tensor]) -> tuple[Tensor, ...]:
        first, second, q, k, v, o, gate, up, down = weights
        return first, second, torch.cat([q, k, v]), o, torch.cat([gate, up]), down

    def write(self) -> Tensor:
        """One batch, uint16-sized ids as int32 `[rows, length]`; the first of each row is the separator."""
        prompts = len(self._pool.lengths) - 1
        self._prompt.random_(0, prompts)
        self._place.fill_(1)
        choice = torch.randint(len(TEMPERATURES), (self._rows, 1), device=self._device)
        self._temperature.copy_(torch.tensor(TEMPERATURES, device=self._device)[choice])
        self._out.zero_()
        self._at.zero_()
        for step in range(self._length - 1):
            self._advance(min(self._length, (step // LENGTH_STEP + 1) * LENGTH_STEP))
        return self._out.to(torch.int32)

    def _advance(self, read: int) -> None:
        if not self._graphs:
            self._step(read)
            return
        if read not in self._captured:
            kept = [tensor.clone() for tensor in (self._at, self._prompt, self._place, self._out)]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._step(read)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step(read)
            for tensor, value in zip((self._at, self._prompt, self._place, self._out), kept, strict=True):
                tensor.copy_(value)
            self._captured[read] = graph
        self._captured[read].replay()

    def _step(self, read: int) -> None:
        """Read the token at `_at` of each row, and put the next one behind it."""
        token = self._out.gather(1, self._at.expand(self._rows, 1))[:, 0]
        drawn = self._draw(self._logits(token, read))
        pool, prompts = self._pool, len(self._pool.lengths) - 1
        forced = self._place < pool.lengths[self._prompt]
        told = pool.ids[self._prompt, self._place.clamp(max=pool.ids.shape[1] - 1)]
        following = torch.where(forced, told, drawn)
        ended = ~forced & ((drawn == SEPARATOR_ID) | (drawn == MESSAGE_END_ID))
        answers = pool.asks[self._prompt] & (drawn == MESSAGE_END_ID)
        fresh = torch.where(answers, prompts, torch.randint(prompts, (self._rows,), device=self._device))
        # A text that ended with the separator has the next one's opening already; the answer's opening has none.
        opening = torch.where((drawn == SEPARATOR_ID) & ~answers, 1, 0)
        self._prompt.copy_(torch.where(ended, fresh, self._prompt))
        self._place.copy_(torch.where(ended, opening, self._place + forced))
        self._at.add_(1)
        self._out.scatter_(1, self._at.expand(self._rows, 1), following[:, None])

    def _logits(self, token: Tensor, read: int) -> Tensor:
        shape, rows = self._shape, self._rows
        embedding = self._weights["model.embed_tokens.weight"]
        x = F.embedding(token, embedding)
        cosines, sines = self._cosines[self._at], self._sines[self._at]
        late = torch.arange(read, device=self._device) > self._at
        for index, (first, second, qkv, o, gate_up, down) in enumerate(self._fused):
            h = norm(x, first, shape.epsilon)
            heads = F.linear(h, qkv).view(rows, shape.heads + 2 * shape.kv_heads, -1)
            turned = rotate(heads[:, : shape.heads + shape.kv_heads], cosines, sines).to(x.dtype)
            queries = turned[:, : shape.heads].view(rows, shape.kv_heads, shape.heads // shape.kv_heads, -1)
            keys, values = self._keys[index], self._values[index]
            keys.index_copy_(2, self._at, turned[:, shape.heads :, None])
            values.index_copy_(2, self._at, heads[:, shape.heads + shape.kv_heads :, None])
            scores = queries @ keys[:, :, :read].transpose(2, 3) * queries.shape[-1] ** -0.5
            shares = scores.masked_fill(late, -torch.inf).softmax(-1, dtype=torch.float32).to(x.dtype)
            x = x + F.linear((shares @ values[:, :, :read]).view(rows, -1), o)
            gate, up = F.linear(norm(x, second, shape.epsilon), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.linear(norm(x, self._weights["model.norm.weight"], shape.epsilon), embedding)

    def _draw(self, logits: Tensor) -> Tensor:
        """Sampled at each row's temperature from the tokens that are likely enough (the Gumbel-max trick)."""
        scaled = logits.float() / self._temperature
        floor = scaled.amax(-1, keepdim=True) + float(np.log(LEAST_OF_BEST))
        noise = torch.empty_like(scaled).exponential_().log_()
        return (scaled - noise).masked_fill(scaled < floor, -torch.inf).argmax(-1)
