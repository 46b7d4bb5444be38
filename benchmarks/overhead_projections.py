"""PROJECTIONS, not measurements: what the same comparison gives for published pairs, from their configurations.

Counts matrix products as `torch.utils.flop_counter` does (a test compares the two on small models): a product of
`[n, a]` and `[a, b]` is `2 n a b` operations. Softmax, norms and activations are left out, as there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-type model's published shape."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear maps."""
        key_value = self.hidden // self.heads * self.key_value_heads
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (self.hidden, key_value),
            "v_proj": (self.hidden, key_value),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def parameters(self) -> int:
        """All weights: linear maps, embedding, output layer, norms."""
        layer = sum(a * b for a, b in self.matrices.values()) + 2 * self.hidden
        return self.layers * layer + self.hidden * (1 + self.vocabulary * (1 if self.tied else 2))

    def forward(self, tokens: int) -> int:
        """Operations of reading `tokens` and predicting after each."""
        layer = sum(2 * tokens * a * b for a, b in self.matrices.values()) + 4 * tokens * tokens * self.hidden
        return self.layers * layer + 2 * tokens * self.hidden * self.vocabulary

    def lora(self, tokens: int, rank: int) -> int:
        """Forward and backward with LoRA's B trained on every matrix, A and all weights frozen."""
        adapters = sum(2 * tokens * rank * (a + b) for a, b in self.matrices.values())
        # Backward: gradients of activations as much as the forward (attention: two products become four), and of B.
        attention = 4 * tokens * tokens * self.hidden
        trained = sum(2 * tokens * rank * b for _, b in self.matrices.values())
        return 2 * self.forward(tokens) + self.layers * (attention + 2 * adapters + trained)

    def full(self, tokens: int) -> int:
        """Forward and backward with every weight trained."""
        return 3 * self.forward(tokens)

    def lora_parameters(self, rank: int) -> int:
        """Entries of B on every matrix."""
        return self.layers * sum(rank * b for _, b in self.matrices.values())


LLAMA2_7B = Shape("Llama-2-7B", 4096, 11008, 32, 32, 32, 32_000)
LLAMA2_13B = Shape("Llama-2-13B", 5120, 13824, 40, 40, 40, 32_000)
LLAMA2_70B = Shape("Llama-2-70B", 8192, 28672, 80, 64, 8, 32_000)
QWEN25_05B = Shape("Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 151_936, tied=True)
QWEN25_72B = Shape("Qwen2.5-72B", 8192, 29568, 80, 64, 8, 152_064)
PAIRS = ((LLAMA2_7B, LLAMA2_13B), (LLAMA2_7B, LLAMA2_70B), (QWEN25_05B, QWEN25_72B))
RANK = 16


def projections(*, tokens: int, records: int) -> list[dict[str, Any]]:
    """One client's round for each published pair: the small model tuned (FedPT), the large one by LoRA, and in full.

    Memory is that of the weights in bfloat16 alone, plus gradients and sums in float32 where all are trained: a lower
    bound. Bytes are the vectors', 4 a parameter either way; secure aggregation adds kilobytes.
    """
    rows = []
    for small, large in PAIRS:
        for label, shape, flops, trained in (
            ("FedPT", small, small.lora(tokens, RANK), small.lora_parameters(RANK)),
            ("federated LoRA of the large", large, large.lora(tokens, RANK), large.lora_parameters(RANK)),
            ("federated full tuning of the large", large, large.full(tokens), large.parameters),
        ):
            everything = trained == shape.parameters
            rows.append(
                {
                    "projection": True,
                    "pair": f"{small.name} / {large.name}",
                    "way": label,
                    "shape": asdict(shape),
                    "rank": None if everything else RANK,
                    "model_parameters": shape.parameters,
                    "trained_parameters": trained,
                    "flops": flops * records,
                    "least_memory_bytes": shape.parameters * (2 + (8 if everything else 0)),
                    "bytes_up": 4 * trained,
                    "bytes_down": 4 * trained,
                }
            )
    return rows
