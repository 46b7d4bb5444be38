"""What limits proxy tuning without noise: the adapter, or the proxy?

    python benchmarks/utility_limits.py --results limits.jsonl --data chat --device cuda

Tunes **all** weights of the small LM, centrally, without privacy, clipping or secure aggregation (AdamW, a linear rate,
shuffled batches), and steers the large LM with that. No adapter of the small LM can bring much more than the best of
these runs, so that what they leave of the gap is the proxy's own and the steering rule's.

Each line has the gain on records to choose by and the fraction of the gap on those that `utility.py` judges, by alpha;
the shares are the default's. They are a yardstick and no setting to be had: no round of a federation trains so.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from utility import gap_closed
from utility_command import finished, floats
from utility_data import NAMES, changed_by, data_settings
from utility_gradients import RecordSums
from utility_results import append_line, read_lines
from utility_simulation import Case, Simulation, Trained, Which
from utility_study import SPLIT, ceiling_losses

from fedpt_secure.data import Cache
from fedpt_secure.federation.setup import load_models
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.progress import SILENT, Progress

BATCH = 32
WHICH: Sequence[Which] = ("choice", "judged")
ALPHAS = (0.25, 0.5, 0.75, 1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not in the results yet; the exit code."""
    options = parse(arguments)
    return finished(lambda progress: limits(options, progress))


def limits(options: argparse.Namespace, progress: Progress) -> None:
    """Tune and judge for every rate and number of passes.

    Raises:
        FedptError: a run cannot be made, or there is no ceiling for the records.
    """
    settings = {"data": data_settings(options.data, options.data_folder), "models": {"device": options.device}}
    simulation = Simulation(changed_by(settings, options.set), SPLIT, progress)
    tuned = ceiling_losses(simulation)
    untouched = Trained(np.zeros(simulation.loaded({}).models.small.dimension, dtype=np.float32), 0, 0.0)
    for which in WHICH:  # the base's own predictions, before any weight is touched
        simulation.judge(Case(), untouched, which, [Case().rule(simulation.config)])
    done = [(line["data"], line["rate"], line["passes"]) for line in read_lines(options.results)]
    for rate in options.rates:
        for passes in options.passes:
            if (options.data, rate, passes) in done:
                continue
            began = time.perf_counter()
            loaded = load_models(simulation.config, cache=Cache(), progress=SILENT)
            small = loaded.small
            records = simulation.loaded({}).train
            tune(small, records, rate=rate, passes=passes, progress=progress)
            rules = [Case(alpha=alpha).rule(simulation.config) for alpha in ALPHAS]
            line: dict[str, Any] = {"data": options.data, "rate": rate, "passes": passes}
            for which in WHICH:
                held_out = simulation.held_out(which)
                judged = RecordSums(small, held_out.small, dtype=torch.float32, at_once=64)
                losses = held_out.judge(judged.logits(range(len(held_out.small))), rules)
                line[f"{which}_small_tuned"] = round(losses.per_token(losses.small_tuned), 4)
                for alpha, rule in zip(ALPHAS, rules, strict=True):
                    gain = losses.per_token(losses.large - losses.proxied[rule])
                    line[f"{which}_gain_{alpha:g}"] = round(gain, 4)
                    if which == "judged":
                        fraction, _ = gap_closed(losses.large, losses.proxied[rule], tuned, SPLIT)
                        line[f"gap_closed_{alpha:g}"] = round(fraction, 4)
            append_line(options.results, line | {"seconds": round(time.perf_counter() - began, 1)})


def tune(small: SmallLM, records: RecordSums, *, rate: float, passes: int, progress: Progress) -> None:
    """Train every weight of the small LM on all records, each token alike."""
    parameters = [p for name, p in small.model.named_parameters() if "lora_" not in name]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    count = len(records.rows)
    steps = passes * math.ceil(count / BATCH)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50, 1 - step / steps))
    shuffled = np.random.default_rng(SPLIT)
    with progress.task("steps", steps) as task:
        for _ in range(passes):
            for chosen in np.array_split(shuffled.permutation(count), math.ceil(count / BATCH)):
                ids, targets = records.texts(chosen)
                with torch.autocast(ids.device.type, torch.bfloat16, enabled=small.compute.dtype == torch.bfloat16):
                    logits = small.model(input_ids=ids, use_cache=False).logits
                loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                falling.step()
                task.advance()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--data", choices=NAMES, default="chat")
    parser.add_argument("--data-folder", type=Path, default=Path("../shared/data"))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting, in TOML")
    parser.add_argument("--rates", type=floats, default=[3e-4, 1e-3])
    parser.add_argument("--passes", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
