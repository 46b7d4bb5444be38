"""Distil the built-in small LM from the large one on a GPU, in minutes: the large model writes, scores, and teaches.

    python tools/distil_proxy.py prepare --large LARGE --books BOOKS --packages PACKAGES --work WORK    # on any machine
    python tools/distil_proxy.py generate --large LARGE --work WORK --seconds 60
    python tools/distil_proxy.py score --large LARGE --work WORK
    python tools/distil_proxy.py train --large LARGE --work WORK --seconds 300
    python tools/distil_proxy.py export --large LARGE --work WORK --books BOOKS --out OUT

Everything is rows of `ROW` tokens of the large vocabulary, each opened by the separator: books and packages' text
(`proxy_corpus.py`, `proxy_modern.py`), and what the large model writes from the prompts of `proxy_prompts.py`.
`score` ranks the small vocabulary, and keeps the teacher's `TOP` likeliest classes at every position, the unknown class
among them. `train` minimises the divergence from that answer, mixed with cross-entropy. Held-out rows are never trained
on. Only `export` needs the package installed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from gpu_generation import Pool, Writer
from plain_llama import Shape, block, hidden, load
from proxy_corpus import HELD_OUT_AUTHORS, SEPARATOR_ID, Stream, cached_books, large_to_small, rank_vocabulary, tokenize
from proxy_modern import modern_texts
from proxy_prompts import answer_opening, prompts
from proxy_student import train, train_options
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

ROW = 256
TOP = 64
PROMPTS = 120_000
HELD_OUT_ROWS = 256
"""Of each kind of text; those of generated text are its last."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    steps = {"prepare": prepare, "generate": generate, "score": score, "train": train, "export": write}
    for name, run in steps.items():
        sub = commands.add_parser(name)
        sub.set_defaults(run=run)
        sub.add_argument("--large", type=Path, required=True, help="the large model, in Transformers' format")
        sub.add_argument("--work", type=Path, required=True)
        sub.add_argument("--seed", type=int, default=1)
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sub = commands.choices["prepare"]
    sub.add_argument("--books", type=Path, required=True)
    sub.add_argument("--packages", type=Path, required=True, help="unpacked packages of `proxy_modern.SOURCES`")
    sub.add_argument("--books-share", type=float, default=0.25)
    sub.add_argument("--prompts", type=int, default=PROMPTS)
    sub = commands.choices["generate"]
    sub.add_argument("--rows", type=int, default=4096, help="written at once")
    sub.add_argument("--seconds", type=float, default=60)
    sub = commands.choices["score"]
    sub.add_argument("--vocabulary", type=int, default=16_384)
    sub.add_argument("--rows", type=int, default=128, help="scored at once")
    train_options(commands.choices["train"])
    sub = commands.choices["export"]
    sub.add_argument("--books", type=Path, required=True, help="the same file; its hash is stated")
    sub.add_argument("--name", default="proxy")
    sub.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.run(options)


def prepare(options: argparse.Namespace) -> None:
    """Write the prompts and the rows of books and packages' text, training and held-out."""
    tokenizer = Tokenizer.from_file(str(options.large / "tokenizer.json"))
    drawn = list(prompts(tokenizer, options.packages / "wordnet-base", options.prompts, options.seed))
    longest = max(len(ids) for ids, _ in drawn)
    table = np.zeros((len(drawn), longest), dtype=np.uint16)
    for row, (ids, _) in zip(table, drawn, strict=True):
        row[: len(ids)] = ids
    np.savez(
        options.work / "prompts.npz", ids=table, lengths=np.array([len(ids) for ids, _ in drawn], dtype=np.uint16),
        asks=np.array([asks for _, asks in drawn]), answer=np.array(answer_opening(tokenizer), dtype=np.uint16),
    )  # fmt: skip
    for held_out in (False, True):
        name = "held-out" if held_out else "train"
        authors = HELD_OUT_AUTHORS if held_out else None
        share = 1.0 if held_out else options.books_share
        streams = {
            "books": cached_books(options.books, tokenizer, options.work / "streams", name, authors, share),
            "modern": tokenize(modern_texts(options.packages, held_out=held_out), tokenizer),
        }
        for kind, stream in streams.items():
            rows = in_rows(stream)
            if held_out:
                rows = np.random.default_rng(options.seed).permutation(rows)[:HELD_OUT_ROWS]
            np.save(options.work / f"{kind}-{name}.npy", rows)
            print(f"{kind} {name}: {len(stream.ids):,} tokens in {len(rows):,} rows", flush=True)


def in_rows(stream: Stream) -> np.ndarray:
    """uint16 `[rows, ROW]`: the separator, then text; a row begins with a paragraph where one begins late enough."""
    rows = []
    begin = 0
    while begin + ROW - 1 <= len(stream.ids):
        rows.append(np.concatenate([[SEPARATOR_ID], stream.ids[begin : begin + ROW - 1]]))
        unit = int(stream.starts[np.searchsorted(stream.starts, begin + ROW - 1, side="right") - 1])
        begin = unit if unit > begin + ROW // 2 else begin + ROW - 1
    return np.stack(rows).astype(np.uint16)


def generate(options: argparse.Namespace) -> None:
    """Let the large model write until the time is up; into `generated.npy`."""
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with np.load(options.work / "prompts.npz") as kept:
        lengths = kept["lengths"].astype(int)
        ids = [row[:length].astype(int).tolist() for row, length in zip(kept["ids"], lengths, strict=True)]
        pool = Pool.of(ids, kept["asks"].tolist(), kept["answer"].astype(int).tolist(), device)
    writer = Writer(
        load(options.large, device, dtype), Shape.read(options.large), pool,
        rows=options.rows, length=ROW, seed=options.seed, graphs=device.type == "cuda",
    )  # fmt: skip
    began, parts = time.time(), []
    with torch.inference_mode():
        while not parts or time.time() - began < options.seconds:
            parts.append(writer.write().cpu().numpy().astype(np.uint16))
            tokens = sum(part.size for part in parts)
            print(f"{tokens:,} tokens, {tokens / (time.time() - began):,.0f} a second", flush=True)
    rows = np.concatenate(parts)
    np.save(options.work / "generated.npy", rows)


def texts(work: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kind of text -> training rows and held-out rows."""
    written = np.load(work / "generated.npy")
    kinds = {"generated": (written[:-HELD_OUT_ROWS], written[-HELD_OUT_ROWS:])}
    for kind in ("books", "modern"):
        kinds[kind] = np.load(work / f"{kind}-train.npy"), np.load(work / f"{kind}-held-out.npy")
    return kinds


@torch.inference_mode()
def score(options: argparse.Namespace) -> None:
    """Rank the small vocabulary; keep the teacher's answer to every row."""
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kinds = texts(options.work)
    tokenizer = Tokenizer.from_file(str(options.large / "tokenizer.json"))
    streams = [Stream(rows[:, 1:].reshape(-1), np.zeros(1, dtype=np.int64)) for rows, _ in kinds.values()]
    mapping = rank_vocabulary(streams, tokenizer, options.vocabulary)
    (options.work / "small_to_large.json").write_text(json.dumps(mapping.tolist()))
    table = large_to_small(mapping)
    unknown = len(mapping) - 1
    for kind, (_, held_out) in kinds.items():
        print(f"{kind}: {(table[held_out[:, 1:]] == unknown).mean():.2%} of held-out tokens unknown", flush=True)
    weights, shape = load(options.large, device, dtype), Shape.read(options.large)
    embedding = weights["model.embed_tokens.weight"]
    kept = torch.from_numpy(mapping[:-1]).to(device)
    outside = torch.ones(len(embedding), dtype=torch.bool, device=device)
    outside[kept] = False
    heads = embedding[kept].contiguous(), embedding[outside].contiguous()
    layer = torch.compile(block) if device.type == "cuda" else block
    began = time.time()
    for split in (0, 1):
        rows = np.concatenate([pair[split] for pair in kinds.values()])
        ids = torch.empty(len(rows), ROW - 1, TOP, dtype=torch.int16, device=device)
        shares = torch.empty(len(rows), ROW - 1, TOP, dtype=torch.float16, device=device)
        for first in range(0, len(rows), options.rows):
            part = torch.from_numpy(rows[first : first + options.rows, :-1].astype(np.int64)).to(device)
            short = options.rows - len(part)
            padded = torch.cat([part, part.new_zeros(short, ROW - 1)]) if short else part
            states = hidden(weights, padded, shape, dtype, layer)[: len(part)]
            found = answers(states.reshape(-1, states.shape[-1]), *heads)
            for target, value in zip((ids, shares), found, strict=True):
                target[first : first + options.rows] = value.view(len(part), ROW - 1, TOP)
            if first // options.rows % 50 == 0:
                print(f"scored {first + len(part):,} of {len(rows):,} rows, {time.time() - began:.0f} s", flush=True)
        name = "held-out" if split else "train"
        small = torch.from_numpy(table[rows].astype(np.int16))
        save_file(
            {"rows": small, "top_ids": ids.cpu(), "top_shares": shares.cpu()},
            options.work / f"scored-{name}.safetensors",
            metadata={"kinds": json.dumps({kind: len(pair[split]) for kind, pair in kinds.items()})},
        )


def answers(states: Tensor, inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's likeliest classes: small ids int16 and probabilities float16 `[n, TOP]`, the unknown class last."""
    ids, shares = [], []
    for part in states.split(8192):
        logits = part @ inside.T
        rest = (part @ outside.T).float().logsumexp(-1, keepdim=True)
        total = torch.logaddexp(logits.float().logsumexp(-1, keepdim=True), rest)
        best, where = logits.topk(TOP - 1)
        ids.append(torch.cat([where, torch.full_like(where[:, :1], len(inside))], 1).to(torch.int16))
        shares.append(torch.cat([(best.float() - total).exp(), (rest - total).exp()], 1).to(torch.float16))
    return torch.cat(ids), torch.cat(shares)


def write(options: argparse.Namespace) -> None:
    """Write what the package ships, measured on the held-out rows."""
    from proxy_export import export  # needs the package, which a borrowed GPU machine may lack

    export(options, texts(options.work))


if __name__ == "__main__":
    main()
