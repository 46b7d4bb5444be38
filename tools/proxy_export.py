"""Write the pretrained proxy the way the package ships it: weights, map, card, public sample, manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from proxy_corpus import HELD_OUT_AUTHORS, KEPT_SPECIAL_IDS, REHEARSAL_AUTHORS, Stream
from proxy_modern import HELD_OUT_SHARE, SOURCES
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from fedpt_secure.lm.compact_weights import compact

PUBLIC_TEXT_BYTES = 300_000
RECORD_SEPARATOR = "\n\n%%\n\n"
MANIFEST_FILES = (
    "model.safetensors",
    "config.json",
    "small_to_large.json",
    "tokenizer.json",
    "public_text.txt",
    "MODEL_CARD.md",
)

BUILTIN = Path(__file__).resolve().parent.parent / "fedpt_secure" / "lm" / "builtin"
CARD_TEMPLATE = Path(__file__).with_name("proxy_card.md.in")
NOT_SETTINGS = {
    "command",
    "large",
    "books",
    "generated",
    "packages",
    "start",
    "work",
    "name",
    "device",
    "threads",
    "compile",
    "minutes",
    "seed",
}


def write_model(model: LlamaForCausalLM, mapping: np.ndarray, out: Path) -> None:
    """`model.safetensors` in 8 bits (the tied head is not stored twice), `config.json`, `small_to_large.json`.

    What a reader gets is rounded: measure `load_builtin_weights(out, ...)`, not `model`.
    """
    out.mkdir(parents=True, exist_ok=True)
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(compact(state), out / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.dtype = torch.float32
    (out / "config.json").write_text(model.config.to_json_string(use_diff=True))
    (out / "small_to_large.json").write_text(json.dumps(mapping.tolist(), separators=(",", ":")) + "\n")


def public_records(directory: Path) -> Iterator[str]:
    """The records of a shipped `public_text.txt`."""
    yield from (directory / "public_text.txt").read_text(encoding="utf-8").rstrip("\n").split(RECORD_SEPARATOR)


def generated_records(stream: Stream, tokenizer: Tokenizer) -> list[str]:
    """Whole generated sequences of the held-out shards, `PUBLIC_TEXT_BYTES` in all."""
    records: list[str] = []
    size = 0
    bounds = [*stream.starts.tolist(), len(stream.ids)]
    for begin, end in pairwise(bounds):
        text = tokenizer.decode(stream.ids[begin + 1 : end].tolist()).strip()
        if len(text) < 40 or "%%" in text or "\ufffd" in text:
            continue
        records.append(text)
        size += len(text.encode()) + len(RECORD_SEPARATOR)
        if size >= PUBLIC_TEXT_BYTES:
            break
    return records


def write_public_text(records: Sequence[str], out: Path) -> None:
    """`public_text.txt`: the records, joined by `RECORD_SEPARATOR`."""
    (out / "public_text.txt").write_text(RECORD_SEPARATOR.join(records) + "\n", encoding="utf-8")


def write_manifest(out: Path, facts: dict) -> None:
    """`manifest.json`: the SHA-256 of each file beside it, and `facts` about the model."""
    files = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in MANIFEST_FILES}
    content = {"schema": 1, "files": files, "record_separator": RECORD_SEPARATOR, **facts}
    (out / "manifest.json").write_text(json.dumps(content, indent=2) + "\n")


def special_small_ids(mapping: np.ndarray) -> dict[str, int]:
    """Small ids of the separator, of the chat template's tokens and of the unknown class."""
    where = {int(large): small for small, large in enumerate(mapping)}
    names = ("separator", "message_start", "message_end")
    return {name: where[large] for name, large in zip(names, KEPT_SPECIAL_IDS, strict=True)} | {"unknown": where[-1]}


def loss_table(log: Sequence[dict], rows: int = 12) -> str:
    """A Markdown table of the held-out losses along the run, thinned to about `rows` lines."""
    points = list({entry["tokens"]: entry for entry in log if "held_out_books" in entry}.values())
    picked = points[:: max(1, len(points) // rows)]
    if points and picked[-1] is not points[-1]:
        picked.append(points[-1])
    names = [key for key in points[-1] if key.startswith("held_out_")] if points else []
    head = ["tokens (M)", *(name.replace("_", "-", 1).replace("_", " ") for name in names)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += [
        "| " + " | ".join([f"{p['tokens'] / 1e6:.2f}", *(f"{p[name]:.3f}" for name in names)]) + " |" for p in picked
    ]
    return "\n".join(lines)


def file_digest(path: Path) -> str:
    """SHA-256 in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_card(out: Path, facts: dict, log: Sequence[dict]) -> None:
    """`MODEL_CARD.md`, from the facts measured at export and the run's own log."""
    shards = facts["generated_shards"]
    runs = [entry["options"] for entry in log if "options" in entry]
    settings = {k: v for k, v in runs[-1].items() if k not in NOT_SETTINGS and v not in ("", "0", "0.0", "None")}
    text = CARD_TEMPLATE.read_text(encoding="utf-8").format(
        parameters=facts["parameters"] / 1e6,
        vocabulary=facts["vocabulary"],
        tokens=facts["tokens_seen"] / 1e6,
        losses=held_out_table(facts),
        training_shards=shards["training"],
        held_out_shards=shards["held_out"],
        packages=package_table(),
        rehearsal_authors=" and ".join(REHEARSAL_AUTHORS),
        held_out_authors=", ".join(HELD_OUT_AUTHORS),
        books_digest=facts["books_sha256"],
        weights_digest=file_digest(out / "model.safetensors"),
        continued=continued(facts),
        seed=runs[-1]["seed"],
        settings=", ".join(f"{name} {value}" for name, value in sorted(settings.items())),
        table=loss_table(log),
    )
    (out / "MODEL_CARD.md").write_text(text, encoding="utf-8")


def package_table() -> str:
    """Rows of a Markdown table: the packages whose text is read, with their licences."""
    use = f"training, with {HELD_OUT_SHARE:.0%} of its documents held out"
    return "\n".join(f"| `{s.package}` ({s.registry}) | {s.licence} | {use} |" for s in SOURCES.values())


def held_out_table(facts: dict) -> str:
    """A Markdown table: each held-out text with its loss, that of the weights continued from, and the unknown share."""
    before = facts.get("continued_from", {}).get("held_out_loss", {})
    lines = ["| held-out text | loss | before this release | outside the vocabulary |", "| --- | --- | --- | --- |"]
    for name, loss in facts["held_out_loss"].items():
        old = f"{before[name]:.3f}" if name in before else ""
        lines.append(f"| {name} | {loss:.3f} | {old} | {facts['held_out_unknown_share'][name]:.1%} |")
    return "\n".join(lines)


def continued(facts: dict) -> str:
    """The sentence that says which weights the run went on from."""
    if "continued_from" not in facts:
        return ""
    before = facts["continued_from"]
    share = f", of which {before['weight']:.0%} was kept by averaging the weights" if before["weight"] else ""
    return (
        f"The last run continued from the weights `{before['model_sha256']}` ({before['tokens_seen'] / 1e6:.2f} M "
        f"tokens){share}."
    )
