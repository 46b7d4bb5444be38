"""Where the noise is born, and what it costs: central DP-SGD, `distributed`, `local` and non-private training.

    python benchmarks/privacy_modes.py                      # 26 clients of the default chat, 30 rounds; half an hour
    python benchmarks/privacy_modes.py --quick              # under a minute
    python benchmarks/privacy_modes.py --json > modes.json  # the results; --from modes.json shows them again
    python benchmarks/privacy_modes.py --markdown --plots docs/figures

All arms take the same noise multiplier, sampling rate and number of rounds, clip to the same norm, and step with the
same server optimizer from the same adapter. They differ in the noise of a round's sum over n clients alone: none; one
Gaussian (central: a trusted server); the honest survivors' discrete shares, sized for the fewest survivors less the
tolerated colluders (distributed); one Gaussian from each client (local). Losses are of the tuned small LM on held-out
records; nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedpt_secure.config import RunConfig, build
from fedpt_secure.crypto import default_threshold
from fedpt_secure.data import Cache, load_federated_text
from fedpt_secure.data.examples import encode
from fedpt_secure.data.simulation import simulation_rng
from fedpt_secure.federation.server_optimizer import ServerOptimizer
from fedpt_secure.federation.setup import load_models
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy import (
    RingMechanism,
    SecureRandom,
    SmallExample,
    calibrate_noise,
    example_losses,
    sampled_gradient_sum,
)
from fedpt_secure.progress import SILENT

ARMS = ("non-private", "central", "distributed", "local")
COORDINATE_BOUND = 16.0

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """What all arms share."""

    epsilon: float
    delta: float
    clients: int
    rounds: int
    sampling_rate: float
    clip_norm: float
    learning_rate: float
    corrupt_fraction: float
    seeds: int
    held_out: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or read measurements, and show them; the exit code."""
    options = _parse(arguments)
    console = Console(stderr=True)
    results = json.loads(options.read.read_text()) if options.read else measure(_setting(options), console)
    if options.plots:
        console.print(f"wrote {plot(results, options.plots)}", markup=False)
    if options.json:
        print(json.dumps(results, indent=2))
    elif options.markdown:
        print(_markdown(results))
    else:
        Console().print(_table(results))
    return 0


def measure(setting: Setting, console: Console) -> dict:
    """Train every arm for every seed; the losses after each round, and the noise that each sum held."""
    multiplier = calibrate_noise(
        epsilon=setting.epsilon, delta=setting.delta, sampling_rate=setting.sampling_rate, steps=setting.rounds
    )
    config = build(RunConfig, {"privacy": {"clip_norm": setting.clip_norm}})
    text = load_federated_text(config.data, seed=0, cache=Cache(), progress=SILENT)
    models = load_models(config.for_population(len(text.clients)), cache=Cache(), progress=SILENT)
    chosen = simulation_rng("benchmark clients", 0).permutation(len(text.clients))[: setting.clients]
    clients = [text.clients[index] for index in sorted(chosen)]

    def examples(records: Sequence[str]) -> list[SmallExample]:
        encoded = (encode(record, models.tokenizer, context_length=128) for record in records)
        return [SmallExample(tuple(models.small.token_map.to_small(item.ids)), item.loss_from) for item in encoded]

    train = [examples(client.train) for client in clients]
    held_out = examples([record for client in clients for record in client.held_out])[: setting.held_out]
    mechanism = _ring(setting, multiplier, models.small.dimension)
    curves: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for seed in range(setting.seeds):
            for arm in ARMS:
                task = progress.add_task(f"{arm}, seed {seed}", total=setting.rounds)
                curve = _curve(
                    models.small,
                    train,
                    held_out,
                    setting,
                    _noised(arm, mechanism, multiplier),
                    advance=lambda task=task: progress.advance(task),
                )
                curves[arm].append(curve)
    deviations = {
        "non-private": 0.0,
        "central": multiplier,
        "distributed": mechanism.share_sigma * setting.clients**0.5 / mechanism.encoding.scale,
        "local": multiplier * setting.clients**0.5,
    }
    return {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "setting": asdict(setting),
        "noise_multiplier": multiplier,
        "records": sum(len(records) for records in train),
        "noise_in_clip_norms": deviations,
        "held_out_loss": curves,
    }


def _ring(setting: Setting, multiplier: float, dimension: int) -> RingMechanism:
    return RingMechanism.plan(
        noise_multiplier=multiplier,
        honest_shares=default_threshold(setting.clients) - int(setting.corrupt_fraction * setting.clients),
        cohort=setting.clients,
        dimension=dimension,
        coordinate_bound=COORDINATE_BOUND,
        ring_bits=32,
    )


def _noised(arm: str, mechanism: RingMechanism, multiplier: float) -> Callable[[list[Vector]], Vector]:
    """The noised sum of the clients' vectors, in clip norms, as each arm makes it."""

    def gaussian(count: int, deviation: float) -> Vector:
        return SecureRandom().gaussian(count, standard_deviation=deviation)

    def distributed(vectors: list[Vector]) -> Vector:
        total = mechanism.encode(vectors[0], SecureRandom())
        for vector in vectors[1:]:
            total += mechanism.encode(vector, SecureRandom())
        mechanism.encoding.reduce(total)
        return mechanism.decode(total)

    return {
        "non-private": lambda vectors: np.sum(vectors, axis=0),
        "central": lambda vectors: np.sum(vectors, axis=0) + gaussian(vectors[0].size, multiplier),
        "distributed": distributed,
        "local": lambda vectors: np.sum([vector + gaussian(vector.size, multiplier) for vector in vectors], axis=0),
    }[arm]


def _curve(
    small: SmallLM,
    train: Sequence[Sequence[SmallExample]],
    held_out: Sequence[SmallExample],
    setting: Setting,
    noised_sum: Callable[[list[Vector]], Vector],
    *,
    advance: Callable[[], None],
) -> list[float]:
    adapter = np.zeros(small.dimension, dtype=np.float32)
    optimizer = ServerOptimizer.fresh(
        "adam", learning_rate=setting.learning_rate, momentum=0.9, dimension=small.dimension
    )
    losses = []
    try:
        for _ in range(setting.rounds):
            small.load_adapter_vector(adapter)
            vectors = [
                sampled_gradient_sum(
                    small,
                    records,
                    sampling_rate=setting.sampling_rate,
                    clip_norm=setting.clip_norm,
                    noise=SecureRandom(),
                )
                for records in train
            ]
            adapter, optimizer = optimizer.apply(adapter, -noised_sum(vectors) / setting.clients)
            small.load_adapter_vector(adapter)
            losses.append(_loss(small, held_out))
            advance()
    finally:
        small.load_adapter_vector(np.zeros(small.dimension, dtype=np.float32))
    return losses


def _loss(small: SmallLM, held_out: Sequence[SmallExample]) -> float:
    with torch.inference_mode():
        return float(
            torch.cat([example_losses(small, held_out[at : at + 32]) for at in range(0, len(held_out), 32)]).mean()
        )


def plot(results: dict, directory: Path) -> Path:
    """One line an arm: the mean over seeds; a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for arm, curves in results["held_out_loss"].items():
        values = np.array(curves)
        rounds = np.arange(1, values.shape[1] + 1)
        (line,) = axes.plot(rounds, values.mean(0), label=arm)
        if len(values) > 1:
            axes.fill_between(rounds, values.min(0), values.max(0), alpha=0.2, color=line.get_color())
    setting = results["setting"]
    axes.set_xlabel("round")
    axes.set_ylabel("held-out loss of the tuned small LM, nats per token")
    axes.set_title(
        f"epsilon {setting['epsilon']:g}, noise multiplier {results['noise_multiplier']:.2f}, rate "
        f"{setting['sampling_rate']:g}, {setting['clients']} clients, {results['records']} records"
    )
    axes.legend()
    figure.tight_layout()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "privacy_modes.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _rows(results: dict) -> list[tuple[str, ...]]:
    rows = []
    for arm, curves in results["held_out_loss"].items():
        final = [curve[-1] for curve in curves]
        spread = f"[{min(final):.4f}, {max(final):.4f}]" if len(final) > 1 else ""
        rows.append((arm, f"{results['noise_in_clip_norms'][arm]:.2f}", f"{np.mean(final):.4f}", spread))
    return rows


_HEADER = ("arm", "noise of the sum, clip norms", "held-out loss", "lowest and highest seed")


def _table(results: dict) -> Table:
    table = Table(*_HEADER, title=f"after {results['setting']['rounds']} rounds")
    for row in _rows(results):
        table.add_row(*row)
    return table


def _markdown(results: dict) -> str:
    lines = ["| " + " | ".join(_HEADER) + " |", "|" + " --- |" * len(_HEADER)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in _rows(results)])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few clients and rounds")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epsilon", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clients", type=int, default=26)
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--held-out", type=int, default=100, help="records that each round's loss is over")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--plots", type=Path, metavar="DIR")
    parser.add_argument("--from", dest="read", type=Path, metavar="JSON", help="show results measured earlier")
    return parser.parse_args(arguments)


def _setting(options: argparse.Namespace) -> Setting:
    return Setting(
        epsilon=options.epsilon,
        delta=1e-5,
        clients=8 if options.quick else options.clients,
        rounds=4 if options.quick else options.rounds,
        sampling_rate=options.rate,
        clip_norm=0.1,
        learning_rate=0.02,
        corrupt_fraction=0.1,
        seeds=options.seeds,
        held_out=48 if options.quick else options.held_out,
    )


if __name__ == "__main__":
    sys.exit(main())
