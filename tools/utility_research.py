"""Utility research: how much of the gap to the directly tuned large model proxy tuning closes, and what limits it.

Simulates mode `distributed` as what its utility is, central DP-SGD over the union of the clients' training records.
Every subcommand is seeded, runs on a CPU or a GPU, and appends one JSON line per result to `WORK/results.jsonl`:

    python tools/utility_research.py prepare --work WORK --data-folder ../shared/data chat medquad dolly
    python tools/utility_research.py score   --work WORK --large LARGE chat
    python tools/utility_research.py ceiling --work WORK --large LARGE --task chat
    python tools/utility_research.py tune    --work WORK --task chat --epsilon 4 --steps 40 --rate 0.1
    python tools/utility_research.py batch FILE
    python tools/utility_research.py decode  --work WORK --task chat --adapter NAME

LARGE is a folder in Transformers format (float32). The noise comes from a seeded generator: nothing here is private.
What the numbers say stands in docs/utility_research.md.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM
from utility_research_data import CONTEXT, SPLITS, Task, builtin_tokenizer, judged_tokens, prepare
from utility_research_scores import (
    Answers,
    agreement,
    answers,
    blend,
    clipped_shift,
    confidence,
    large_answers,
    linear,
    mixture,
    proxied,
    proxied_tokens,
    small_alone,
    small_logprobs,
    top_k,
)
from utility_research_tuning import (
    Mechanism,
    Optimiser,
    batches,
    collate,
    divergence,
    judged_losses,
    perplexity_free_loss,
)

from fedpt_secure.config import LoraSettings
from fedpt_secure.lm.directions import FILE as DIRECTIONS_FILE
from fedpt_secure.lm.directions import Directions
from fedpt_secure.lm.small import BUILTIN, BaseLM, SmallLM, builtin_directory, load_builtin_weights
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.lm.vocabulary import Vocabulary
from fedpt_secure.privacy import calibrate_noise
from fedpt_secure.proxy.arithmetic import shifted_logprobs

ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CURVE_ALPHAS = (0.5, 0.75, 1.0)
DELTA = 1e-5
BUCKETS = (1, 4, 8, 16, 32, 64)
"""Borders between places in a record, for losses by place."""


@dataclass(frozen=True)
class Proxy:
    """A small LM and how its ids relate to the large model's."""

    base: BaseLM
    table: Tensor

    @classmethod
    def load(cls, directory: Path) -> Proxy:
        """The built-in proxy, or a folder with the same files (directions may be absent)."""
        vocabulary = Vocabulary.from_file(builtin_directory() / "tokenizer.json")
        model, token_map = load_builtin_weights(directory, vocabulary)
        known = directory / DIRECTIONS_FILE
        directions = Directions.load(known) if known.exists() else None
        return cls(BaseLM(model, token_map, BUILTIN, directions), token_map.tensors(torch.device("cpu")).small_of_large)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--work", type=Path, required=True)
    shared.add_argument("--seed", type=int, default=0)
    shared.add_argument("--threads", type=int, default=1)
    shared.add_argument("--device", default="cpu")
    shared.add_argument("--proxy", type=Path, default=builtin_directory())

    command = commands.add_parser("prepare", parents=[shared])
    command.add_argument("names", nargs="+")
    command.add_argument("--data-folder", type=Path, required=True)
    command.add_argument("--evaluation-records", type=int, default=300)
    command.set_defaults(run=run_prepare)

    command = commands.add_parser("score", parents=[shared])
    command.add_argument("names", nargs="+")
    command.add_argument("--large", type=Path, required=True)
    command.add_argument("--choice-only", action="store_true")
    command.set_defaults(run=run_score)

    command = commands.add_parser("ceiling", parents=[shared])
    command.add_argument("--task", required=True)
    command.add_argument("--large", type=Path, required=True)
    command.add_argument("--rank", type=int, default=16)
    command.add_argument("--rate", type=float, default=1e-3)
    command.add_argument("--batch", type=int, default=16)
    command.add_argument("--epochs", type=float, default=1.0)
    command.add_argument("--records", type=int, default=0, help="train on so many records only; 0 for all")
    command.add_argument("--checks", type=int, default=8, help="looks at the choice slice")
    command.add_argument("--seconds", type=float, default=math.inf, help="wall clock after which the rate decays to 0")
    command.add_argument("--modules", default="all")
    command.add_argument("--layers", type=int, default=0, help="last so many; 0 for all")
    command.add_argument("--choice-only", action="store_true")
    command.set_defaults(run=run_ceiling)

    command = commands.add_parser("tune", parents=[shared])
    command.add_argument("--task", required=True)
    command.add_argument("--name", default="")
    command.add_argument("--modules", default="down_proj", help="comma-separated, or `all`")
    command.add_argument("--layers", type=int, default=1, help="last so many; 0 for all")
    command.add_argument("--rank", type=int, default=32)
    command.add_argument("--directions", default="public", choices=("public", "random"))
    command.add_argument("--train-a", action="store_true")
    command.add_argument("--epsilon", type=float, default=math.inf)
    command.add_argument("--noise-factor", type=float, default=1.0, help="noise of survivors only, over the central")
    command.add_argument("--steps", type=int, default=40)
    command.add_argument("--rate-q", type=float, default=0.1)
    command.add_argument("--clip", type=float, default=0.1)
    command.add_argument("--optimiser", default="adam", choices=("adam", "adam-corrected", "momentum", "sgd"))
    command.add_argument("--lr", type=float, default=0.05)
    command.add_argument("--decay", type=float, default=0.0)
    command.add_argument("--average", type=float, default=0.0)
    command.add_argument("--momentum", type=float, default=0.9)
    command.add_argument("--checks", type=int, default=3)
    command.add_argument("--thin", type=float, default=1.0, help="share of each sample that is really computed")
    command.add_argument("--choice-only", action="store_true", help="for sweeps: leave the evaluation records alone")
    command.add_argument("--float32", action="store_true", help="no bfloat16 in the matrix products")
    command.set_defaults(run=run_tune)

    command = commands.add_parser("decode", parents=[shared])
    command.add_argument("--task", required=True)
    command.add_argument("--adapter", required=True, help="name of a run of `tune`")
    command.add_argument("--split", default="choice", choices=SPLITS[1:])
    command.add_argument("--rules", default="", help="comma-separated names of rules; default: all")
    command.add_argument("--mixtures", action="store_true", help="these rules only")
    command.set_defaults(run=run_decode)

    command = commands.add_parser("where", parents=[shared])
    command.add_argument("--task", required=True)
    command.add_argument("--adapter", required=True, help="name of a run of `tune`")
    command.add_argument("--ceiling", required=True, help="name of a run of `ceiling`")
    command.add_argument("--large", type=Path, required=True)
    command.add_argument("--alpha", type=float, default=0.5)
    command.add_argument("--split", default="choice", choices=SPLITS[1:])
    command.set_defaults(run=run_where)

    command = commands.add_parser("calibrate", parents=[shared])
    command.add_argument("--task", required=True)
    command.add_argument("--adapter", required=True, help="name of a run of `tune`: the tuned side")
    command.add_argument("--text", default="choice", help="`choice`, or the name of a file that `sample` wrote")
    command.add_argument("--start", default="base", choices=("base", "tuned"))
    command.add_argument("--modules", default="all")
    command.add_argument("--layers", type=int, default=0)
    command.add_argument("--rank", type=int, default=16)
    command.add_argument("--directions", default="public", choices=("public", "random"))
    command.add_argument("--train-a", action="store_true")
    command.add_argument("--epochs", type=int, default=8)
    command.add_argument("--lr", type=float, default=0.005)
    command.add_argument("--limit", type=int, default=100, help="evaluation records looked at")
    command.set_defaults(run=run_calibrate)

    command = commands.add_parser("sample", parents=[shared])
    command.add_argument("--adapter", required=True, help="name of a run of `tune`")
    command.add_argument("--large", type=Path, required=True)
    command.add_argument("--count", type=int, default=16)
    command.add_argument("--tokens", type=int, default=80)
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--alpha", type=float, default=0.75)
    command.set_defaults(run=run_sample)

    command = commands.add_parser("prefixed", parents=[shared])
    command.add_argument("--task", required=True)
    command.add_argument("--adapter", required=True, help="name of a run of `tune`")
    command.add_argument("--large", type=Path, required=True)
    command.add_argument("--texts", type=Path, required=True, help="JSON list of texts, as `sample` writes it")
    command.add_argument("--count", type=int, default=4, help="texts in the prefix")
    command.add_argument("--joint", default="\n\n", help="text between records; empty for the separator")
    command.add_argument("--split", default="choice", choices=SPLITS[1:])
    command.add_argument("--limit", type=int, default=40, help="records looked at")
    command.set_defaults(run=run_prefixed)

    command = commands.add_parser("batch", help="run the command lines of a file, one after the other")
    command.add_argument("file", type=Path)
    command.set_defaults(run=None)

    options = parser.parse_args()
    lines = [None] if options.run else [shlex.split(line) for line in options.file.read_text().splitlines() if line]
    for line in lines:
        options = parser.parse_args(line)
        torch.set_num_threads(options.threads)
        options.run(options)


def write(options: argparse.Namespace, kind: str, result: dict[str, object]) -> None:
    """Append one line to the results and print it."""
    skipped = {"run", "work", "proxy", "large", "data_folder"}
    settings = {
        k: v.name if isinstance(v, Path) else str(v) if v == math.inf else v
        for k, v in vars(options).items()
        if k not in skipped
    }
    line = json.dumps({"kind": kind, "settings": settings} | result)
    with (options.work / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def run_prepare(options: argparse.Namespace) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        task = prepare(name, options.data_folder, seed=options.seed, evaluation_records=options.evaluation_records)
        task.save(options.work / f"{name}.npz")
        sizes = {
            split: [
                len(task.split(split)),
                sum(len(e.ids) for e in task.split(split)),
                int(judged_tokens(task.split(split)).sum()),
            ]
            for split in SPLITS
        }
        write(options, "prepare", {"task": name, "clients": task.clients, "records_ids_judged": sizes})


def scores_path(options: argparse.Namespace, task: str, split: str, token_map: TokenMap) -> Path:
    """One file per task, split and vocabulary."""
    path: Path = options.work / f"scores-{task}-{split}-{token_map.small_vocabulary_size}.safetensors"
    return path


def run_score(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    token_map = Proxy.load(options.proxy).base.token_map
    large = LlamaForCausalLM.from_pretrained(options.large, dtype=torch.float32).to(device).eval()
    for name in options.names:
        task = Task.load(options.work / f"{name}.npz")
        for split in SPLITS[1:2] if options.choice_only else SPLITS[1:]:
            examples = task.split(split)
            path = scores_path(options, name, split, token_map)
            _, target = large_answers(large, examples, token_map, path, device)
            write(options, "score", {"task": name, "split": split, "large_base": -float(target.mean())})


def run_ceiling(options: argparse.Namespace) -> None:
    """Tune the large model itself: LoRA (A and B), AdamW, the checkpoint chosen on the choice slice.

    On the last layers alone it says what such an adapter could do on a perfect proxy.
    """
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    task = Task.load(options.work / f"{options.task}.npz")
    base = LlamaForCausalLM.from_pretrained(options.large, dtype=torch.bfloat16).to(device)
    head = base.lm_head.weight.detach()
    depth = base.config.num_hidden_layers
    modules = MATRICES if options.modules == "all" else options.modules.split(",")
    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=list(modules),
        layers_to_transform=list(range(depth - options.layers, depth)) if options.layers else None,
    )
    model = get_peft_model(base, config)
    inner = model.base_model.model.model
    table = torch.arange(base.config.vocab_size)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.0, betas=(0.9, 0.98))
    rng = np.random.default_rng(options.seed)
    order = rng.permutation(len(task.train))[: options.records or None]
    plan = list(planned_batches(order, task, options.batch, options.epochs, rng))
    checks = set(np.linspace(0, len(plan), options.checks + 1).astype(int).tolist()[1:])
    best, best_state, curve, seen, began, late = math.inf, {}, [], 0, time.time(), 0
    for step, chosen in enumerate(plan):
        elapsed = (time.time() - began) / options.seconds
        share = max(step / len(plan), elapsed)
        for group in optimiser.param_groups:
            group["lr"] = options.rate * min(1.0, (step + 1) / 20, max(0.0, (1 - share) / 0.3))
        count = 0
        parts = [
            collate([task.train[i] for i in part], table, device) for part in batches(np.asarray(chosen), task.train)
        ]
        total = sum(len(batch.targets) for batch in parts)
        for batch in parts:
            loss, _ = judged_losses(inner, head, batch, torch.full_like(batch.weights, 1 / total))
            loss.backward()
            count += batch.ids.numel()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        seen += len(chosen)
        late = int(share >= 1)
        if step + 1 in checks or late:
            value = float(
                large_losses(inner, head, task.choice, table, device).sum() / judged_tokens(task.choice).sum()
            )
            curve.append([seen, round(value, 4), round(time.time() - began)])
            print(json.dumps({"task": options.task, "step": step + 1, "curve": curve[-1]}), flush=True)
            if value < best:
                best, best_state = (
                    value,
                    {k: v.detach().clone() for k, v in model.named_parameters() if v.requires_grad},
                )
        if late:
            break
    model.load_state_dict(best_state, strict=False)
    name = "-".join(
        map(str, ("ceiling", options.task, options.rate, options.records, options.epochs, options.layers, options.seed))
    )
    save_file(best_state, options.work / f"{name}.safetensors")
    result: dict[str, object] = {"name": name, "choice": round(best, 4), "curve": curve}
    if not options.choice_only:
        records = large_losses(inner, head, task.evaluation, table, device)
        np.save(options.work / f"{name}.npy", records)
        result["evaluation"] = per_token(task.evaluation, records)
    write(options, "ceiling", result)


def planned_batches(
    order: np.ndarray, task: Task, size: int, epochs: float, rng: np.random.Generator
) -> Iterable[list[int]]:
    """Batches over whole and part epochs; records of like length share a batch, batches come in random order."""
    left = round(epochs * len(order))
    while left > 0:
        shuffled = rng.permutation(order)[:left]
        left -= len(shuffled)
        pools = np.array_split(shuffled, max(1, len(shuffled) // (size * 8)))
        for pool in pools:
            ranked = sorted(pool.tolist(), key=lambda i: len(task.train[i].ids))
            pieces = [ranked[a : a + size] for a in range(0, len(ranked), size)]
            yield from (pieces[i] for i in rng.permutation(len(pieces)))


@torch.no_grad()
def large_losses(inner: nn.Module, head: Tensor, examples, table: Tensor, device: torch.device) -> np.ndarray:
    """Negative log-likelihood per record, float64 `[records]`."""
    sums = np.zeros(len(examples))
    for chosen in batches(np.arange(len(examples)), examples):
        batch = collate([examples[i] for i in chosen], table, device)
        _, losses = judged_losses(inner, head, batch, batch.weights)
        sums[chosen] = torch.zeros(len(chosen)).index_add_(0, batch.rows.cpu(), losses.cpu()).numpy()
    return sums


def run_tune(options: argparse.Namespace) -> None:
    """Tune the proxy, watch the choice slice, score the evaluation records once at the end."""
    device = torch.device(options.device)
    task = Task.load(options.work / f"{options.task}.npz")
    proxy = Proxy.load(options.proxy)
    token_map = proxy.base.token_map
    splits = SPLITS[1:2] if options.choice_only else SPLITS[1:]
    found = {
        split: answers(
            None, proxy.base.model, task.split(split), token_map, proxy.table,
            scores_path(options, options.task, split, token_map), device,
        )
        for split in splits
    }  # fmt: skip
    small, trained = adapted(proxy, options, device)
    inner = small.model.base_model.model.model
    head = small.model.base_model.model.lm_head.weight.detach()
    head = head.float() if options.float32 else head.bfloat16()

    sigma = options.noise_factor * calibrate_noise(
        epsilon=options.epsilon, delta=DELTA, sampling_rate=options.rate_q, steps=options.steps
    )
    mechanism = Mechanism(options.rate_q, options.clip, sigma, thin=options.thin)
    deviation = sigma * options.clip / (options.rate_q * len(task.train))
    optimiser = Optimiser(
        options.optimiser, options.lr, options.steps, decay=options.decay, average=options.average,
        momentum=options.momentum, noise_variance=deviation**2,
    )  # fmt: skip
    rng = np.random.default_rng(options.seed + 1)
    generator = torch.Generator().manual_seed(options.seed + 1)
    weights = [module.weight.data for module in trained]
    checks = set(np.linspace(0, options.steps, options.checks + 1).astype(int).tolist()[1:-1])
    curve, began, spent = [], time.process_time(), 0.0
    for step in range(options.steps):
        start = time.process_time()
        release = mechanism.release(inner, head, trained, task.train, proxy.table, rng, generator)
        optimiser.step(weights, release)
        spent += time.process_time() - start
        if step + 1 in checks:
            kept = [w.clone() for w in weights]
            for weight, mean in zip(weights, optimiser.averaged(weights), strict=True):
                weight.copy_(mean)
            after = small_logprobs(small.model, task.choice, proxy.table, device)
            losses = proxied(found["choice"], after, {str(a): linear(a) for a in CURVE_ALPHAS})
            curve.append([step + 1, round(spent), *(per_token(task.choice, v) for v in losses.values())])
            print(json.dumps(curve[-1]), flush=True)
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)
    for weight, mean in zip(weights, optimiser.averaged(weights), strict=True):
        weight.copy_(mean)
    name = options.name or f"{options.task}-{round(time.time())}"
    save_file({str(i): w.contiguous() for i, w in enumerate(weights)}, options.work / f"adapter-{name}.safetensors")
    result: dict[str, object] = {
        "name": name, "dimension": sum(w.numel() for w in weights), "sigma": round(sigma, 3),
        "clipped": round(float(np.mean(mechanism.clipped)), 3), "train_cpu_s": round(spent),
        "tokens": mechanism.tokens, "tokens_per_cpu_s": round(mechanism.tokens / max(spent, 1e-9)), "curve": curve,
    }  # fmt: skip
    for split in splits:
        result[split] = report(options, name, split, task, found[split], small, proxy, device)
    result["cpu_s"] = round(time.process_time() - began)
    write(options, "tune", result)


def report(
    options: argparse.Namespace,
    name: str,
    split: str,
    task: Task,
    found: Answers,
    small: SmallLM,
    proxy: Proxy,
    device: torch.device,
) -> dict[str, object]:
    """All arms on one split; sums per record are kept in an npz file for intervals."""
    examples = task.split(split)
    after = small_logprobs(small.model, examples, proxy.table, device)
    losses = {
        "large_base": found.losses(-found.target),
        "small_base": small_alone(found, found.base, proxy.base.token_map),
        "small_tuned": small_alone(found, after, proxy.base.token_map),
    } | proxied(found, after, {str(a): linear(a) for a in ALPHAS})
    np.savez(options.work / f"records-{name}-{split}.npz", tokens=judged_tokens(examples), **losses)
    return {key: per_token(examples, value) for key, value in losses.items()}


def per_token(examples, sums: np.ndarray) -> float:
    """Nats per judged token, rounded."""
    value = torch.as_tensor(sums / judged_tokens(examples).sum()).sum()
    return round(perplexity_free_loss(value), 4)


def restored(options: argparse.Namespace, proxy: Proxy, device: torch.device) -> SmallLM:
    """The small LM with the adapter that a run of `tune` named `options.adapter` left."""
    lines = map(json.loads, (options.work / "results.jsonl").read_text(encoding="utf-8").splitlines())
    chosen = [line for line in lines if line.get("name") == options.adapter][-1]["settings"]
    small, trained = adapted(proxy, argparse.Namespace(**chosen), device)
    values = load_file(options.work / f"adapter-{options.adapter}.safetensors")
    for key, module in enumerate(trained):
        module.weight.data.copy_(values[str(key)])
    return small


def adapted(proxy: Proxy, options: argparse.Namespace, device: torch.device) -> tuple[SmallLM, list[nn.Linear]]:
    """A fresh adapter, and its trained linear modules in a fixed order."""
    modules = MATRICES if options.modules == "all" else tuple(options.modules.split(","))
    settings = LoraSettings(rank=options.rank, layers=options.layers, modules=modules, directions=options.directions)
    small = SmallLM(proxy.base, settings, seed=options.seed, device=device)
    trained = []
    for name, module in sorted(small.model.named_modules()):
        if isinstance(module, nn.Linear) and ("lora_B" in name or (options.train_a and "lora_A" in name)):
            module.weight.requires_grad_(True)
            trained.append(module)
    return small, trained


def run_decode(options: argparse.Namespace) -> None:
    """Compare rules of decoding on one split, for a tuned adapter."""
    device = torch.device(options.device)
    proxy = Proxy.load(options.proxy)
    task = Task.load(options.work / f"{options.task}.npz")
    examples = task.split(options.split)
    path = scores_path(options, options.task, options.split, proxy.base.token_map)
    found = answers(None, proxy.base.model, examples, proxy.base.token_map, proxy.table, path, device)
    small = restored(options, proxy, device)
    after = small_logprobs(small.model, examples, proxy.table, device)
    rules = {"large": linear(0.0), "small tuned": mixture(0.0, 0.0)} | {f"alpha {a:g}": linear(a) for a in ALPHAS}
    for a in (0.25, 0.5, 0.75, 1.0):
        rules |= {f"alpha {a:g} mixture {w:g}": mixture(a, w) for w in (0.6, 0.7, 0.8, 0.9)}
        rules |= {f"alpha {a:g} blend {w:g}": blend(a, w) for w in (0.1, 0.2, 0.4, 0.6, 0.8) if a in (0.25, 0.5)}
    for a in () if options.mixtures else (0.5, 0.75, 1.0):
        rules |= {f"alpha {a:g} temperature {t:g}": linear(a, temperature=t) for t in (0.9, 1.1)}
        rules |= {f"alpha {a:g} base {b:g}": linear(a, base_weight=b * a) for b in (0.8, 0.9)}
        rules |= {f"alpha {a:g} agreement {s:g}": agreement(a, s) for s in (0.1, 0.3)}
        rules |= {f"alpha {a:g} confidence {s:g}": confidence(a, s) for s in (-0.1, 0.1)}
        rules |= {f"alpha {a:g} top {k}": top_k(a, k) for k in (100, 1000)}
        rules |= {f"alpha {a:g} clipped {b:g}": clipped_shift(a, b) for b in (2.0, 4.0)}
    if options.rules:
        rules = {name: rules[name] for name in options.rules.split(",")}
    tokens = proxied_tokens(found, after, rules)
    places = torch.from_numpy(np.concatenate([np.arange(n) for n in judged_tokens(examples)]))
    bucket = torch.bucketize(places, torch.tensor(BUCKETS), right=True)
    counts = torch.bincount(bucket, minlength=len(BUCKETS) + 1).tolist()
    losses = {name: per_token(examples, found.losses(value)) for name, value in tokens.items()}
    places_losses = {
        name: [round(float(value[bucket == i].sum()) / max(1, n), 3) for i, n in enumerate(counts)]
        for name, value in tokens.items()
    }
    write(options, "decode", {"losses": losses, "buckets": counts, "by_place": places_losses})


def run_calibrate(options: argparse.Namespace) -> None:
    """Tune the *base* side too: towards what the large model says on the domain's text, then shift by the difference.

    The tuned side is what a model of this size can learn of the domain; the base side should be what a model of this
    size can learn of the large model *on such text*. As pretrained it is not: part of the shift then teaches the large
    model what it knows. With text sampled from the (private) tuned model this is post-processing.
    """
    device = torch.device(options.device)
    task = Task.load(options.work / f"{options.task}.npz")
    proxy = Proxy.load(options.proxy)
    token_map = proxy.base.token_map
    if options.text == "choice":
        examples, path = task.choice, scores_path(options, options.task, "choice", token_map)
    else:
        sampled = Task.load(options.work / f"{options.text}.npz")
        examples, path = sampled.choice, scores_path(options, options.text, "choice", token_map)
    public = answers(None, proxy.base.model, examples, token_map, proxy.table, path, device)
    judged = task.evaluation[: options.limit]
    known = answers(
        None, proxy.base.model, task.evaluation, token_map, proxy.table,
        scores_path(options, options.task, "evaluation", token_map), device, options.limit,
    )  # fmt: skip
    after = small_logprobs(restored(options, proxy, device).model, judged, proxy.table, device)
    if options.start == "tuned":
        small = restored(options, Proxy.load(options.proxy), device)
        trained = [m for n, m in sorted(small.model.named_modules()) if isinstance(m, nn.Linear) and "lora_B" in n]
    else:
        small, trained = adapted(Proxy.load(options.proxy), options, device)
    inner = small.model.base_model.model.model
    head = small.model.base_model.model.lm_head.weight.detach().bfloat16()
    borders = np.concatenate([[0], np.cumsum(judged_tokens(examples))])
    rng = np.random.default_rng(options.seed)
    weights = [module.weight for module in trained]
    steps = options.epochs * -(-len(examples) // 16)
    optimiser = torch.optim.Adam(weights, lr=options.lr, betas=(0.9, 0.99))
    curve, step = [], 0
    for _epoch in range(options.epochs):
        total = 0.0
        for chosen in np.array_split(rng.permutation(len(examples)), -(-len(examples) // 16)):
            wanted = torch.cat([public.large[borders[i] : borders[i + 1]] for i in chosen])
            loss = divergence(inner, head, collate([examples[i] for i in chosen], proxy.table, device), wanted)
            loss.backward()
            for group in optimiser.param_groups:
                group["lr"] = options.lr * min(1.0, 2 * (steps - step) / steps)
            optimiser.step()
            optimiser.zero_grad()
            total += float(loss) * len(chosen) / len(examples)
            step += 1
        curve.append(round(total, 4))
    base = small_logprobs(small.model, judged, proxy.table, device)
    result: dict[str, object] = {"kl": curve, "large_base": per_token(judged, known.losses(-known.target))}
    rules = {str(a): linear(a) for a in (*ALPHAS, 2.0)}
    for side, answered in (("pretrained base", known), ("calibrated base", known.with_base(base))):
        result[side] = {k: per_token(judged, v) for k, v in proxied(answered, after, rules).items()}
    write(options, "calibrate", result)


@torch.no_grad()
def run_sample(options: argparse.Namespace) -> None:
    """Sample plain texts from the proxied large model. From a private adapter this is post-processing."""
    device = torch.device(options.device)
    proxy = Proxy.load(options.proxy)
    small = restored(options, proxy, device)
    large = LlamaForCausalLM.from_pretrained(options.large, dtype=torch.float32).to(device).eval()
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.zeros(options.count, 1, dtype=torch.long)
    caches = [DynamicCache(config=model.config) for model in (large, proxy.base.model, proxy.base.model)]
    for _ in range(options.tokens):
        last = ids[:, -1:]
        said = large(input_ids=last, past_key_values=caches[0]).logits[:, -1].log_softmax(-1)
        tuned = small.model(input_ids=proxy.table[last], past_key_values=caches[1]).logits[:, -1]
        with small.model.disable_adapter():
            base = small.model(input_ids=proxy.table[last], past_key_values=caches[2]).logits[:, -1]
        mixed = shifted_logprobs(said, base, tuned, proxy.base.token_map, options.alpha)
        ids = torch.cat([ids, torch.multinomial(nucleus(mixed.exp(), options.top_p), 1, generator=generator)], dim=1)
    tokenizer = builtin_tokenizer()
    # An end of text ends a record.
    rows = [row[: row.index(0)] if 0 in row else row for row in ids[:, 1:].tolist()]
    texts = [text for text in (tokenizer.text(row).strip() for row in rows) if text]
    (options.work / f"sample-{options.adapter}-{options.alpha:g}-{options.top_p:g}.json").write_text(
        json.dumps(texts), encoding="utf-8"
    )
    write(options, "sample", {"texts": len(texts), "first": texts[:3]})


def nucleus(shares: Tensor, top_p: float) -> Tensor:
    """Probabilities with the least likely tokens, `1 - top_p` of the mass at most, set to 0."""
    ranked, order = shares.sort(dim=-1, descending=True)
    ranked[ranked.cumsum(-1) - ranked >= top_p] = 0.0
    return torch.zeros_like(shares).scatter_(-1, order, ranked)


@torch.no_grad()
def run_prefixed(options: argparse.Namespace) -> None:
    """Let the large model read some texts of the domain before each record, with and without the proxy's shift."""
    device = torch.device(options.device)
    tokenizer = builtin_tokenizer()
    texts = json.loads(options.texts.read_text(encoding="utf-8"))[: options.count]
    joint = tokenizer.ids(options.joint) or [tokenizer.separator_id]
    prefix = [tokenizer.separator_id]
    for text in texts:
        prefix += [*tokenizer.ids(text)[: CONTEXT - 1], *joint]
    task = Task.load(options.work / f"{options.task}.npz")
    proxy = Proxy.load(options.proxy)
    token_map = proxy.base.token_map
    examples = task.split(options.split)[: options.limit]
    plain = answers(
        None, proxy.base.model, task.split(options.split), token_map, proxy.table,
        scores_path(options, options.task, options.split, token_map), device, options.limit,
    )  # fmt: skip
    stem = f"{options.texts.stem}-{options.count}-{len(joint)}-{options.limit}"
    path = scores_path(options, f"{options.task}-{stem}", options.split, token_map)
    large = None if path.exists() else LlamaForCausalLM.from_pretrained(options.large, dtype=torch.float32).eval()
    classes, target = large_answers(large, examples, token_map, path, device, prefix)  # type: ignore[arg-type]
    after = small_logprobs(restored(options, proxy, device).model, examples, proxy.table, device)
    rules = {str(a): linear(a) for a in (0.0, *ALPHAS)}
    rules |= {f"{a:g} mixture {w:g}": mixture(a, w) for a in (0.0, 0.25, 0.5) for w in (0.7, 0.8, 0.9)}
    result: dict[str, object] = {"prefix_ids": len(prefix), "records": len(examples)}
    for side, found in (("plain", plain), ("prefixed", replace(plain, large=classes, target=target))):
        result[side] = {k: per_token(examples, v) for k, v in proxied(found, after, rules).items()}
    write(options, "prefixed", result)


@torch.no_grad()
def run_where(options: argparse.Namespace) -> None:
    """Where the gap lies and where proxy tuning closes it: mean losses by kind of token and by place in the record."""
    device = torch.device(options.device)
    proxy = Proxy.load(options.proxy)
    task = Task.load(options.work / f"{options.task}.npz")
    examples = task.split(options.split)
    path = scores_path(options, options.task, options.split, proxy.base.token_map)
    found = answers(None, proxy.base.model, examples, proxy.base.token_map, proxy.table, path, device)
    after = small_logprobs(restored(options, proxy, device).model, examples, proxy.table, device)
    ceiling = ceiling_losses(options, examples, device)
    shifted = proxied_tokens(found, after, {"": linear(options.alpha)})[""]
    tokenizer = builtin_tokenizer()
    texts = [tokenizer.text([int(i)]) for i in found.large_ids]
    places = np.concatenate([np.arange(n) for n in judged_tokens(examples)])
    unknown = proxy.base.token_map.unknown_id
    kinds: dict[str, list[bool]] = {
        "outside the small vocabulary": [int(c) == unknown for c in found.classes],
        "newline": [t.strip(" ") == "\n" for t in texts],
        "punctuation": [bool(t.strip()) and not any(c.isalnum() for c in t) for t in texts],
        "word, capital": [t.strip()[:1].isupper() for t in texts],
        "word, opening": [t[:1] == " " and t.strip()[:1].islower() for t in texts],
        "word, inside": [t[:1].islower() for t in texts],
    }
    kinds |= {
        f"position {a}-{b - 1}": ((places >= a) & (places < b)).tolist()
        for a, b in ((0, 4), (4, 16), (16, 48), (48, 128))
    }
    rows = {}
    for kind, chosen in kinds.items():
        mask = torch.tensor(chosen)
        if mask.any():
            values = (-found.target, shifted, ceiling)
            rows[kind] = [round(float(mask.float().mean()), 4), *(round(float(v[mask].mean()), 3) for v in values)]
    write(options, "where", {"columns": ["share", "large", "proxied", "ceiling"], "rows": rows})


def ceiling_losses(options: argparse.Namespace, examples, device: torch.device) -> Tensor:
    """Token losses of the directly tuned large model, positions in the order of the examples."""
    base = LlamaForCausalLM.from_pretrained(options.large, dtype=torch.float32).to(device)
    state = load_file(options.work / f"{options.ceiling}.safetensors")
    rank = next(value.shape[0] for name, value in state.items() if "lora_A" in name)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(MATRICES)))
    model.load_state_dict(state, strict=False)
    model.eval()
    table = torch.arange(base.config.vocab_size)
    parts = []
    for example in examples:
        batch = collate([example], table, device)
        parts.append(judged_losses(model.base_model.model.model, base.lm_head.weight, batch, batch.weights)[1])
    return torch.cat(parts).cpu()


if __name__ == "__main__":
    main()
