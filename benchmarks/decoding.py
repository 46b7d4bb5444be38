"""How fast the proxied large model decodes, against the large model alone, and how many tokens a call of it yields.

    python benchmarks/decoding.py --run runs/NAME                     # local models, batches of 1 and 8
    python benchmarks/decoding.py --run runs/NAME --server llama.cpp:http://127.0.0.1:8080
    python benchmarks/decoding.py --run runs/NAME --json

Prompts are beginnings of the run's held-out records; the adapter is the run's. All arms decode the same prompts, in
turn, prompt by prompt, so that whatever else the machine does falls on all of them alike. The large model alone is the
faster of Transformers' own `generate` and this project's engine without a small LM. Times are CPU seconds of this
process by default, because other work on the machine does not count there (one thread; `--clock wall` for a GPU).

`tokens_per_call` counts every call of the large model, the one that reads the prompt included. It is reported for
greedy decoding with both sources of drafts, and with `--kinds` also for each source alone, with a repetition penalty,
and sampled: greedy text of a small model repeats itself, and a lookup guesses repetitions well.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedpt_secure.config import ApiConfig
from fedpt_secure.data import Cache, load_federated_text
from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.endpoint import Endpoint
from fedpt_secure.errors import FedptError, RunDirectoryError
from fedpt_secure.federation import RunDirectory
from fedpt_secure.federation.setup import RunModels, load_models
from fedpt_secure.federation.state import released_adapter
from fedpt_secure.progress import SILENT
from fedpt_secure.proxy import (
    BlackBoxLM,
    DecodingEngine,
    DecodingSettings,
    EngineCounts,
    Request,
    Speculation,
    SteeringRule,
    connect,
    load_causal_lm,
)
from fedpt_secure.proxy.connection import black_box_of

ALONE = SteeringRule(alpha=0.0)
Prompts = Sequence[tuple[int, ...]]


@dataclass
class Calls:
    """Tokens and calls of the large model, per row."""

    tokens: int = 0
    calls: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, counts: EngineCounts) -> None:
        self.tokens += counts.tokens
        self.calls += counts.row_calls
        self.drafted += counts.drafted
        self.accepted += counts.accepted

    @property
    def tokens_per_call(self) -> float:
        return self.tokens / self.calls


@dataclass
class Arm:
    """One way to decode, and what it took so far."""

    decode: Callable[[Prompts, int], int]
    tokens: int = 0
    seconds: float = 0.0
    """Of prompt and continuation together."""
    calls: Calls = field(default_factory=Calls)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass
class Bench:
    """Models, prompts and settings of one run of this script."""

    models: RunModels
    black_box: BlackBoxLM
    rule: SteeringRule
    new_tokens: int
    clock: Callable[[], float]

    def engine_arm(self, rule: SteeringRule, speculation: Speculation | None = None, **changes: Any) -> Arm:
        arm = Arm(lambda prompts, new_tokens: 0)

        def decode(prompts: Prompts, new_tokens: int) -> int:
            small = self.models.pair if rule.needs_the_small_lm else None
            engine = DecodingEngine(self.black_box, small, speculation=speculation)
            wanted = DecodingSettings(rule=rule, max_new_tokens=new_tokens, **changes)
            some = [Request(prompt=prompt, settings=wanted, first_place=len(prompt) - 1) for prompt in prompts]
            tokens = sum(1 for _ in engine.run(some))
            engine.close()
            arm.calls.add(engine.counts)
            return tokens

        arm.decode = decode
        return arm

    def transformers_arm(self) -> Arm:
        model = load_causal_lm(self.models.weights.path, torch.float32).eval()
        ends = list(self.black_box.vocabulary.end_ids)

        def decode(prompts: Prompts, new_tokens: int) -> int:
            longest = max(map(len, prompts))
            ids = torch.tensor([[ends[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    eos_token_id=ends,
                    pad_token_id=ends[0],
                )
            # Up to and including the end token, as the engine's events count.
            new = out[:, longest:]
            ended = torch.isin(new, torch.tensor(ends))
            return int(sum(int(row.nonzero()[0]) + 1 if row.any() else len(row) for row in ended))

        return Arm(decode)

    def time_in_turn(self, arms: dict[str, Arm], batches: Sequence[Prompts], say: Callable[[str], None]) -> None:
        for arm in arms.values():
            arm.decode([prompt[:2] for prompt in batches[0]], 2)  # warm-up, not counted
            arm.calls = Calls()
        for index, prompts in enumerate(batches):
            for arm in arms.values():
                begin = self.clock()
                arm.tokens += arm.decode(prompts, self.new_tokens)
                arm.seconds += self.clock() - begin
            rates = ", ".join(f"{name} {arm.tokens_per_second:.2f}" for name, arm in arms.items())
            say(f"batch {index + 1}/{len(batches)} of {len(prompts)}, tokens/s so far: {rates}")

    def count_calls(self, prompts: Prompts, speculation: Speculation, **changes: Any) -> Calls:
        counted = Calls()
        for seed, prompt in enumerate(prompts):
            engine = DecodingEngine(self.black_box, self.models.pair, speculation=speculation)
            wanted = DecodingSettings(rule=self.rule, max_new_tokens=self.new_tokens, seed=seed, **changes)
            list(engine.run([Request(prompt=prompt, settings=wanted, first_place=len(prompt) - 1)]))
            counted.add(engine.counts)
        return counted


def held_out_prompts(
    directory: RunDirectory, tokenizer: TextTokenizer, count: int, longest: int
) -> list[tuple[int, ...]]:
    """The first halves of a seeded choice of held-out records, 3 to `longest` tokens each."""
    config = directory.config()
    text = load_federated_text(config.data, seed=config.seed, cache=Cache(), progress=SILENT)
    records = [record for client in text.clients for record in client.held_out]
    prompts = []
    for index in np.random.default_rng(0).permutation(len(records)):
        ids = tokenizer.ids(records[index].text)
        kept = min(len(ids) // 2, longest - 1)
        if kept >= 2:
            prompts.append((tokenizer.separator_id, *ids[:kept]))
        if len(prompts) == count:
            break
    return prompts


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures, by name."""
    torch.set_num_threads(options.threads)
    directory = RunDirectory.open(options.run)
    config = directory.config()
    checkpoint = directory.load_checkpoint()
    if checkpoint is None:
        raise RunDirectoryError(f"{options.run} has no checkpoint yet", hint="let it finish a round first")
    models = load_models(config, cache=Cache(), progress=SILENT)
    models.small.load_adapter_vector(released_adapter(checkpoint, config))
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    bench = Bench(
        models, models.black_box(SILENT), SteeringRule.of(config.proxy, responses=False), options.new_tokens, clock
    )
    prompts = held_out_prompts(directory, models.tokenizer, max(options.prompts, 8), options.prompt_tokens)
    found: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "clock": options.clock,
        "new_tokens": options.new_tokens,
        "prompts": options.prompts,
        "rule": {"alpha": bench.rule.alpha, "shares": bench.rule.shares},
    }
    plain = bench.transformers_arm()
    guess = Speculation()
    of_size = {1: [[prompt] for prompt in prompts[: options.prompts]], 8: [prompts[:8]] * options.repeats}
    for size in options.batch or sorted(of_size):
        batches = of_size[size]
        arms = {
            "transformers": Arm(plain.decode),
            "engine_alone": bench.engine_arm(ALONE),
            "proxied": bench.engine_arm(bench.rule),
            "speculative": bench.engine_arm(bench.rule, guess),
        }
        bench.time_in_turn(arms, batches, say)
        alone = max(arms["transformers"].tokens_per_second, arms["engine_alone"].tokens_per_second)
        found[f"local_ratio_batch{size}"] = arms["proxied"].tokens_per_second / alone
        found[f"local_speculative_ratio_batch{size}"] = arms["speculative"].tokens_per_second / alone
        calls = arms["speculative"].calls
        found[f"tokens_per_call_batch{size}"] = calls.tokens_per_call
        found[f"accepted_batch{size}"] = calls.accepted / max(calls.drafted, 1)
        say(json.dumps(found))
        found[f"local_tokens_per_second_batch{size}"] = {name: arm.tokens_per_second for name, arm in arms.items()}
    chosen = prompts[: options.prompts]
    if "tokens_per_call_batch1" in found:
        found["tokens_per_call"] = found["tokens_per_call_batch1"]
    kinds: dict[str, tuple[Speculation, dict[str, Any]]] = {
        "greedy_small_only": (replace(guess, lookup=False), {}),
        "greedy_lookup_only": (replace(guess, small=False), {}),
        "greedy_penalty_1.3": (guess, {"repetition_penalty": 1.3}),
        "sampled_temperature_1": (guess, {"temperature": 1.0}),
    }
    counted = {}
    for name, (speculation, changes) in kinds.items() if options.kinds else ():
        counted[name] = bench.count_calls(chosen, speculation, **changes)
        say(f"tokens per call, {name}: {counted[name].tokens_per_call:.2f}")
    found["tokens_per_call_by_kind"] = {name: calls.tokens_per_call for name, calls in counted.items()}
    found["accepted_by_kind"] = {name: calls.accepted / max(calls.drafted, 1) for name, calls in counted.items()}
    if options.server:
        found |= measure_server(bench, options, chosen, say)
    return found


def measure_server(
    bench: Bench, options: argparse.Namespace, prompts: Prompts, say: Callable[[str], None]
) -> dict[str, Any]:
    """The same over llama.cpp's HTTP API, by the wall clock: the server is another process."""
    endpoint = Endpoint.parse(options.server)
    if endpoint is None or endpoint.api != "llama.cpp":
        raise FedptError(f"{options.server!r} is no llama.cpp server", hint="llama.cpp:http://127.0.0.1:8080")
    settings = ApiConfig(top_k=options.top_k)
    source = connect(endpoint, settings, bench.models.vocabulary, bench.models.tokenizer, progress=SILENT)
    remote = replace(
        bench,
        black_box=black_box_of(source, settings, bench.models.pair, progress=SILENT),
        clock=time.perf_counter,
    )

    def own(some: Prompts, new_tokens: int) -> int:
        """The server's own greedy decoding, each prompt one request."""
        import httpx

        tokens = 0
        for prompt in some:
            body = {
                "prompt": list(prompt),
                "n_predict": new_tokens,
                "temperature": 0.0,
                "repeat_penalty": 1.0,
                "cache_prompt": True,
            }
            answer = httpx.post(f"{endpoint.url}/completion", json=body, timeout=600.0)
            answer.raise_for_status()
            tokens += int(answer.json()["tokens_predicted"])
        return tokens

    arms = {"server_alone": Arm(own), "proxied": remote.engine_arm(bench.rule)}
    remote.time_in_turn(arms, [[prompt] for prompt in prompts[: options.server_prompts]], say)
    source.close()
    return {
        "http_ratio_batch1": arms["proxied"].tokens_per_second / arms["server_alone"].tokens_per_second,
        "http_tokens_per_second_batch1": {name: arm.tokens_per_second for name, arm in arms.items()},
        "http_top_k": options.top_k,
    }


def show(found: dict[str, Any], console: Console) -> None:
    """One row per figure."""
    table = Table("figure", "value", title="Decoding")
    for name, value in found.items():
        if isinstance(value, dict):
            for part, inner in value.items():
                table.add_row(f"{name}: {part}", f"{inner:.3f}" if isinstance(inner, float) else str(inner))
        else:
            table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run directory: its adapter, rule and held-out text")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--prompt-tokens", type=int, default=24, help="longest prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2, help="times the batch of 8 is decoded")
    parser.add_argument("--batch", type=int, action="append", choices=[1, 8], help="only this size; both by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu", help="of the local arms")
    parser.add_argument(
        "--server", help="a llama.cpp server with the run's large model: llama.cpp:http://127.0.0.1:8080"
    )
    parser.add_argument("--server-prompts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=1000, help="log-probabilities asked of the server per position")
    parser.add_argument(
        "--kinds", action="store_true", help="tokens per call of other ways to guess and to sample, too"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    error_console = Console(stderr=True)
    try:
        found = measure(options, lambda line: error_console.print(line, highlight=False))
    except FedptError as error:
        error_console.print(f"error: {error.message}\nhint: {error.hint}", highlight=False)
        return error.exit_code
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
