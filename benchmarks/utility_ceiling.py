"""The ceilings of the utility benchmark: the large model tuned directly, centrally and without privacy.

    nice python benchmarks/utility_ceiling.py chat medquad dolly

Trains `fedpt_secure.evaluation.tune_ceiling` (LoRA of rank 16 on all matrices, AdamW at 1e-3, one pass; no held-out
record chooses anything) on the clients' training records, resumable and kept in the cache, and judges it in float32 on
the benchmark's held-out records. Only the losses per record go into `benchmarks/ceilings.json`, by the digest of the
records.

`--records N` trains on a seeded sample of N: the directly tuned model is then worse than it could be, so that the gap
is underestimated and the fraction of it that is closed overestimated. The file says how many were used of how many.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from utility_data import NAMES, Records, data_settings, load_records

from fedpt_secure import files
from fedpt_secure.cli.progress import shown_on
from fedpt_secure.cli.quiet import quiet_libraries
from fedpt_secure.data import Cache
from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.evaluation import DirectSettings, black_box_losses, tune_ceiling
from fedpt_secure.lm.devices import resolve_device
from fedpt_secure.lm.large_weights import LargeWeights, resolve_large
from fedpt_secure.lm.vocabulary import Vocabulary, load_tokenizer
from fedpt_secure.progress import Progress
from fedpt_secure.proxy import LocalTransformersLM

CEILINGS = Path(__file__).parent / "ceilings.json"
EVALUATION_RECORDS = 200
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=NAMES)
    parser.add_argument("--data-folder", type=Path, default=Path("../shared/data"))
    parser.add_argument("--ceilings", type=Path, default=CEILINGS)
    parser.add_argument("--records", type=int, help="train on a sample of so many; default: all")
    parser.add_argument("--evaluation-records", type=int, default=EVALUATION_RECORDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto", help="where it trains; it is judged on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet_libraries()
    with shown_on(Console(stderr=True)) as progress:
        weights = resolve_large(None, cache=Cache(), progress=progress)
        for name in options.names:
            settings = data_settings(name, options.data_folder)
            data = load_records(
                settings, tokenizer_of(weights), seed=options.seed, evaluation_records=options.evaluation_records
            )
            entry = compute(
                name, data, weights, options.ceilings,
                records=options.records, seed=options.seed, device=options.device, progress=progress,
            )  # fmt: skip
            loss = math.fsum(entry["losses"]) / sum(entry["tokens"])
            print(f"{name}: tuned directly {loss:.4f} nats per token", flush=True)


def compute(
    name: str,
    data: Records,
    weights: LargeWeights,
    ceilings: Path,
    *,
    records: int | None,
    seed: int,
    progress: Progress,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train or find the ceiling, judge it, and write the entry into the file.

    Args:
        name: of the data set, for the reader of the file.
        data: what is trained on and judged.
        weights: the large model.
        ceilings: the file; entries of other records stay.
        records: train on a seeded sample of so many; None for all.
        seed: of the training.
        progress: bars.
        device: where it trains, `auto` for a GPU where there is one.
    """
    settings = DirectSettings(records=records, seed=seed)
    place = resolve_device(device)
    ceiling = tune_ceiling(weights, data.train, settings, cache=Cache(), device=place, progress=progress)
    box = LocalTransformersLM(weights.path, CPU, adapter=ceiling.adapter)
    losses = black_box_losses(data.evaluation, box, progress, name="held-out loss of the ceiling")
    entry = {
        "data": name,
        "seed": seed,
        "digest": data.digest,
        "large": weights.digest,
        "settings": ceiling.settings,
        "trained_records": ceiling.records,
        "train_records": len(data.train),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "seconds": round(ceiling.seconds),
        "tokens": [len(example.ids) - example.loss_from for example in data.evaluation],
        "losses": [round(float(value), 3) for value in losses],
    }
    known = json.loads(ceilings.read_text(encoding="utf-8")) if ceilings.exists() else []
    kept = [other for other in known if (other["digest"], other["large"]) != (data.digest, weights.digest)]
    files.write_text(ceilings, "[\n" + ",\n".join(json.dumps(line) for line in [*kept, entry]) + "\n]\n")
    return entry


def find(ceilings: Path, data: Records, weights: LargeWeights) -> dict[str, Any] | None:
    """The entry for these records and this large model, or None."""
    if not ceilings.exists():
        return None
    known: list[dict[str, Any]] = json.loads(ceilings.read_text(encoding="utf-8"))
    wanted = (data.digest, weights.digest)
    return next((entry for entry in known if (entry["digest"], entry["large"]) == wanted), None)


def tokenizer_of(weights: LargeWeights) -> TextTokenizer:
    """The tokenizer that lies beside the large model's weights."""
    backend = load_tokenizer(weights.path / "tokenizer.json")
    return TextTokenizer(backend, separator_id=Vocabulary.from_tokenizer(backend).separator_id)


if __name__ == "__main__":
    main()
