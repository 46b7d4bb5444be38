"""A thousand simulated clients on one machine: memory over the rounds and over the number of clients, time, disk.

    python benchmarks/scale.py                              # table; about half an hour of one quiet core
    python benchmarks/scale.py --json > scale.json
    python benchmarks/scale.py --from scale.json --markdown --plot docs/figures/scale.svg
    python benchmarks/scale.py --small tiny --clients 100,300,1000,3000     # the engine alone, without a real proxy

Every number of clients is a run of its own in a process of its own: `run_training` over generated text that is dealt
to the clients, `--records` each, cohort 64, mode `distributed`. The large LM is a tiny random one, asked only after
the last round; the trained one is the built-in proxy (`--small builtin`) or a tiny random one (`--small tiny`).

Memory is the kernel's: `VmHWM`, the largest resident set, begun anew with every round (`/proc/self/clear_refs`; Linux
only), and `VmRSS` after it. Bytes on disk are what files of `clients/` occupy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCHEMA = "fedpt-secure/scale/1"
WORDS = 400
_PROC = Path("/proc/self")


class Watch:
    """A `Progress` that notes time and memory when a round is over, and shows the last line on stderr."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.rounds: list[dict[str, float]] = []
        self.before_rounds: dict[str, float] | None = None
        self._began = self._used = 0.0

    @contextmanager
    def task(self, name: str, total: float | None, *, unit: str = "") -> Iterator[Watch | Ignored]:
        if name != "rounds":
            yield Ignored()
            return
        self.before_rounds = memory()
        self._begin()
        yield self

    def advance(self, amount: float = 1) -> None:
        if amount != 1:
            return  # rounds of before a restart; here none
        used = memory()
        seconds, processor = time.perf_counter() - self._began, time.process_time() - self._used
        self.rounds.append({"seconds": seconds, "processor_seconds": processor, **used})
        print(
            f"{self.label}: round {len(self.rounds)} in {self.rounds[-1]['seconds']:.1f} s, peak "
            f"{used['peak_bytes'] / 1e6:.0f} MB",
            file=sys.stderr,
            flush=True,
        )
        self._begin()

    def describe(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def _begin(self) -> None:
        (_PROC / "clear_refs").write_text("5")
        self._began, self._used = time.perf_counter(), time.process_time()


class Ignored:
    """A bar that nobody looks at."""

    def advance(self, amount: float = 1) -> None:
        pass

    def describe(self, text: str) -> None:
        pass


def memory() -> dict[str, float]:
    """Bytes of this process: `peak_bytes` since it was last begun anew, and `resident_bytes` now."""
    fields = dict(line.split(":", 1) for line in (_PROC / "status").read_text().splitlines())
    return {
        name: int(fields[field].split()[0]) * 1024
        for name, field in (("peak_bytes", "VmHWM"), ("resident_bytes", "VmRSS"))
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run in this process."""
    from fedpt_secure.config import RunConfig, build
    from fedpt_secure.data import Cache
    from fedpt_secure.federation import RunDirectory, run_training

    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        place = Path(folder)
        write_text(place / "text.jsonl", clients=arguments.measure, records=arguments.records, words=arguments.words)
        large = write_tiny_model(place / "large", seed=0)
        small = "builtin" if arguments.small == "builtin" else write_tiny_model(place / "small", seed=1)
        config = build(
            RunConfig,
            {
                "data": {
                    "source": str(place / "text.jsonl"),
                    "clients": arguments.measure,
                    "partition": "equal",
                    "minimum_records": 2,
                },
                "models": {"small": small, "large": large, "context_length": 128, "device": "cpu"},
                "privacy": {"mode": "distributed", "epsilon": 8.0, "delta": 1e-6},
                "federation": {"rounds": arguments.rounds, "cohort": arguments.cohort},
                "evaluation": {"records": 10, "bootstrap_samples": 200},
            },
        )
        watch = Watch(f"{arguments.measure} clients")
        directory = RunDirectory.create(place / "run", config)
        began = time.perf_counter()
        result = run_training(config, directory, cache=Cache(place / "cache"), progress=watch)
        seconds = time.perf_counter() - began
        kept = place / "run" / "clients"
        used = [path.stat() for path in kept.rglob("*") if path.is_file()]
        asked = {client for line in result.transcripts for client in line["cohort"]}
        return {
            "clients": arguments.measure,
            "asked": len(asked),
            "survivors": [len(line["survivors"]) for line in result.transcripts],
            "seconds": seconds,
            "prepare_seconds": result.seconds["prepare"],
            "before_rounds": watch.before_rounds,
            "rounds": watch.rounds,
            "phase_seconds": phase_seconds(result.transcripts),
            "dimension": result.dimension,
            "disk": {
                "clients": sum(1 for path in kept.iterdir() if path.is_dir()),
                "bytes": sum(stat.st_size for stat in used),
                "occupied_bytes": sum(stat.st_blocks * 512 for stat in used),
            },
        }


def phase_seconds(transcripts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean over rounds, all clients one after the other."""
    return {
        phase: sum(line["seconds"].get(phase, 0.0) for line in transcripts) / len(transcripts)
        for phase in transcripts[0]["seconds"]
    }


def write_text(path: Path, *, clients: int, records: int, words: int) -> None:
    """Distinct records, as many as the clients need."""
    rng = random.Random(clients)
    known = ["".join(rng.choices("aeioubdgklmnprst", k=rng.randint(2, 7))) for _ in range(WORDS)]
    with path.open("w", encoding="utf-8") as stream:
        for index in range(clients * records):
            stream.write(json.dumps({"text": " ".join([*rng.choices(known, k=words), str(index)])}) + "\n")


def write_tiny_model(path: Path, *, seed: int) -> str:
    """A random Llama of two narrow layers over the built-in tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedpt_secure.lm.base import builtin_directory

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    shutil.copy(builtin_directory() / "tokenizer.json", path / "tokenizer.json")
    return str(path)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All numbers of clients, each in a fresh process."""
    runs = []
    for clients in options.clients:
        command = [
            *(
                sys.executable,
                __file__,
                "--measure",
                str(clients),
                "--records",
                str(options.records),
                "--words",
                str(options.words),
            ),
            *("--cohort", str(options.cohort), "--rounds", str(options.rounds), "--small", options.small),
            *(() if options.directory is None else ("--directory", str(options.directory))),
        ]
        child = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        runs.append(json.loads(child.stdout))
    conditions = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "small": options.small,
        "cohort": options.cohort,
        "records": options.records,
        "words": options.words,
        "command": "python benchmarks/scale.py "
        + f"--clients {','.join(map(str, options.clients))} --rounds {options.rounds} --small {options.small}",
    }
    return {"schema": SCHEMA, "conditions": conditions, "runs": runs}


HEADINGS = (
    "clients",
    "asked",
    "before the rounds",
    "peak, first round",
    "peak, last round",
    "highest peak",
    "s a round",
    "of a processor",
    "s before the rounds",
    "on disk a client",
)


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row a run."""
    found = []
    for entry in results["runs"]:
        peaks = [one["peak_bytes"] for one in entry["rounds"]]
        seconds, processor = (
            statistics.median(one[name] for one in entry["rounds"]) for name in ("seconds", "processor_seconds")
        )
        found.append(
            (
                f"{entry['clients']:,}",
                f"{entry['asked']:,}",
                _mb(entry["before_rounds"]["resident_bytes"]),
                _mb(peaks[0]),
                _mb(peaks[-1]),
                _mb(max(peaks)),
                f"{seconds:.1f}",
                f"{processor:.1f}",
                f"{entry['prepare_seconds']:.1f}",
                f"{entry['disk']['occupied_bytes'] / entry['disk']['clients'] / 1e3:.1f} kB",
            )
        )
    return found


def markdown(results: dict[str, Any]) -> str:
    """The table for docs/scale.md."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + " ---: |" * len(HEADINGS)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(results)]
    phases = results["runs"][-1]["phase_seconds"]
    shown = ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases.items())
    lines += ["", f"Seconds of a round by phase, {results['runs'][-1]['clients']:,} clients: {shown}."]
    return "\n".join(lines)


def write_plot(results: dict[str, Any], path: Path) -> None:
    """Peak of every round, one line a number of clients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.5))
    for entry in results["runs"]:
        peaks = [one["peak_bytes"] / 1e6 for one in entry["rounds"]]
        axis.plot(range(1, len(peaks) + 1), peaks, marker="o", markersize=3, label=f"{entry['clients']:,} clients")
    axis.set_ylim(0, 1.15 * max(one["peak_bytes"] / 1e6 for entry in results["runs"] for one in entry["rounds"]))
    axis.set_xlabel("round")
    axis.set_ylabel("largest resident set in the round, MB")
    axis.set_title(f"cohort {results['conditions']['cohort']}, one process", fontsize=9)
    axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _mb(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or read measurements, and show them; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="100,300,1000", type=_counts, help="numbers of clients, by commas")
    parser.add_argument("--rounds", type=int, default=16, help="16 rounds of 64 ask every one of 1,000 clients")
    parser.add_argument("--cohort", type=int, default=64)
    parser.add_argument("--records", type=int, default=10, help="of a client; a fifth is held out")
    parser.add_argument("--words", type=int, default=40, help="of a record; two or three tokens each, 128 at most")
    parser.add_argument("--small", choices=("builtin", "tiny"), default="builtin")
    parser.add_argument("--directory", type=Path, help="where runs are kept while they last; default: the system's")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--plot", type=Path, help=".svg or .png")
    parser.add_argument("--from", dest="read", type=Path, metavar="JSON", help="show results measured earlier")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure is not None:
        print(json.dumps(measure(options)))
        return 0
    results = json.loads(options.read.read_text()) if options.read else run(options)
    if options.plot:
        write_plot(results, options.plot)
    if options.json:
        print(json.dumps(results, indent=2, allow_nan=False))
    else:
        print(markdown(results))
    return 0


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
