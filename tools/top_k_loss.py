"""What a truncated black box costs: held-out loss by how many tokens an answer holds, and by how the tail is filled.

    python tools/top_k_loss.py --run RUN [--records 60] [--top-k 5 20 100] [--json FILE]

The large model is asked once, in process, for whole distributions; they are cut to the k most likely tokens and
completed again (`fedpt_secure.proxy.top_logprobs.complete`), so every column is about the same predictions. Tails:

    uniform      the mass that is left, evenly over the tokens that were left out
    base         in the proportions of the small base LM, none likelier than the least likely returned token
    base-free    the same without that bound

It measures; it chooses nothing. RUN is a finished run (or one with a checkpoint); its data and models are used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedpt_secure.data import Cache, load_federated_text
from fedpt_secure.data.examples import encode
from fedpt_secure.data.simulation import simulation_rng
from fedpt_secure.federation import RunDirectory
from fedpt_secure.federation.setup import load_models
from fedpt_secure.progress import SILENT
from fedpt_secure.proxy import SteeringRule, spread_logprobs, steered_token_logprobs
from fedpt_secure.proxy.top_logprobs import TopLogprobs, complete

ALPHAS = (0.5, 0.75)
TAILS = ("uniform", "base", "base-free")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--records", type=int, default=60)
    parser.add_argument("--top-k", type=int, nargs="+", default=[5, 20, 100])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)

    directory = RunDirectory.open(arguments.run)
    config = directory.config()
    checkpoint = directory.load_checkpoint()
    if checkpoint is None:
        sys.exit(f"{arguments.run} has no checkpoint")
    text = load_federated_text(config.data, seed=config.seed, cache=Cache(), progress=SILENT)
    models = load_models(config, cache=Cache(), progress=SILENT)
    models.small.load_adapter_vector(checkpoint.tensors["adapter"])
    held_out = [
        encode(record, models.tokenizer, context_length=config.models.context_length)
        for client in text.clients
        for record in client.held_out
    ]
    # The evaluation's own sample, so that the figures can be laid beside summary.json; its first records.
    chosen = sorted(simulation_rng("evaluation sample", config.seed).permutation(len(held_out))[: arguments.records])
    examples = [held_out[index] for index in chosen]

    token_map = models.small.token_map
    rules = [SteeringRule(alpha=alpha) for alpha in ALPHAS]
    box = models.black_box(SILENT)
    sums: dict[str, list[Tensor]] = defaultdict(list)
    masses: dict[int, list[float]] = defaultdict(list)
    for number, example in enumerate(examples):
        ids = example.ids[:-1]
        (large,) = box.score([ids])
        ((base, tuned),) = models.pair.score([token_map.to_small(ids)])
        first = example.loss_from - 1
        large, base, tuned = large[first:], base[first:], tuned[first:]
        targets = torch.tensor(example.ids[example.loss_from :])
        places = torch.arange(len(targets))

        def add(name: str, rows: Tensor, *, base=base, tuned=tuned, targets=targets, places=places) -> None:
            own = rows.gather(-1, targets[:, None]).squeeze(-1)
            steered = steered_token_logprobs(rows, base, tuned, targets, token_map, rules, places)
            sums[name].append(-torch.stack([own, *steered]).double().sum(dim=-1))

        add("full", large)
        shapes = spread_logprobs(base, token_map)
        for k in arguments.top_k:
            values, indices = large.topk(k, dim=-1)
            masses[k] += values.exp().sum(dim=-1).tolist()
            tops = [
                TopLogprobs(row_ids.numpy(), row_values.double().numpy())
                for row_ids, row_values in zip(indices, values, strict=True)
            ]
            for tail in TAILS:
                rows = torch.stack(
                    [
                        complete(
                            top,
                            torch.zeros_like(shape) if tail == "uniform" else shape,
                            bound=0.0 if tail == "base-free" else None,
                        )
                        for top, shape in zip(tops, shapes, strict=True)
                    ]
                )
                add(f"{k} {tail}", rows)
        print(f"{number + 1}/{len(examples)} records", file=sys.stderr, flush=True)

    tokens = sum(len(example.ids) - example.loss_from for example in examples)
    result = {
        "records": len(examples),
        "tokens": tokens,
        "top_k_mass": {str(k): float(np.mean(values)) for k, values in masses.items()},
        "loss": {
            name: dict(
                zip(
                    ["large", *(f"alpha {alpha:g}" for alpha in ALPHAS)],
                    (torch.stack(values).sum(dim=0) / tokens).tolist(),
                    strict=True,
                )
            )
            for name, values in sums.items()
        },
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
