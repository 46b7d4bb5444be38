"""Rehearse proxy tuning on public text, to compare proxies and to choose the steering rule's constants.

A run of the product may not pick alpha or shares on private data: that would cost budget. So they are picked here.
Public domains that the proxy was never pretrained on stand in for private ones; on each, the proxy's LoRA B matrices
are tuned on one part, and the loss of the large model under many rules is measured on the rest.

    python tools/choose_alpha.py --large LARGE --books BOOKS --chat CHAT --legends DIR --work WORK [--proxy DIR]
    python tools/choose_shares.py WORK/positions-*.npz     # alpha and shares by place, from what that leaves behind

Texts: the books of two authors with a voice of their own (`proxy_corpus.REHEARSAL_AUTHORS`), each record from the
beginning of a paragraph, and CHAT, the folder of English dialogues of the `chatterbot-corpus` package (1.3.3,
BSD-3-Clause; `chatterbot_corpus/data/english` of the unpacked wheel). Pairs in the chat format, judged on the response:
an utterance of those dialogues and its answer; and, with `--legends`, "Tell me about the Aztecs." and the paragraph in
Freeciv's nation files (GPL-2.0-or-later; the folder `nation` of the Debian package `freeciv-data`). Seeded; the noise
is simulated and protects nobody here. A noise multiplier is in clip norms over a sum of 256 records: 4.3 is mode
`local` with 60 clients of a default run at epsilon 4, 0.5 is mode `distributed` with a tenth of 5,000 records a step.

The numbers: nats per token of the large vocabulary over the same held-out positions; "small" losses are over the
small vocabulary with its unknown class, so they compare with each other only.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from proxy_corpus import REHEARSAL_AUTHORS, SEPARATOR_ID, book_paragraphs, large_to_small
from safetensors.torch import load_file, save_file
from steering_positions import positions
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fedpt_secure.config import FederationConfig, LoraSettings, PrivacyConfig, TrainingConfig
from fedpt_secure.lm.base import load_builtin_weights
from fedpt_secure.lm.directions import FILE, Directions
from fedpt_secure.lm.vocabulary import Vocabulary

MICRO_BATCH = 64
NOISE_RECORDS = 256
"""The records a step over which the noise multipliers are stated."""
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
BUILTIN = Path(__file__).resolve().parent.parent / "fedpt_secure" / "lm" / "builtin"


@dataclass(frozen=True)
class Domain:
    """Sequences of large ids, each opened by the separator; at most `context` predicted tokens."""

    name: str
    train: list[list[int]]
    held_out: list[list[int]]
    starts: dict[tuple[int, ...], int] = field(default_factory=dict)
    """The first judged position of a sequence, where it is not 1: pairs are judged on the response."""


@dataclass(frozen=True)
class LargeScores:
    """What the large model says about a domain's held-out positions, in the small vocabulary's terms.

    Attributes:
        inside: float16 `[positions, small_vocab]`; log-probability of each mapped token, -inf for unknown.
        outside: float32 `[positions]`; log of the mass on tokens outside the map.
        target: float32 `[positions]`; log-probability of the token that came.
    """

    inside: Tensor
    outside: Tensor
    target: Tensor


PAIR_OPENING, PAIR_TURN, PAIR_END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=Path, required=True)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--chat", type=Path, required=True)
    parser.add_argument("--legends", type=Path, help="Freeciv's data/nation")
    parser.add_argument("--work", type=Path, required=True, help="large model's scores, and what rules are chosen from")
    parser.add_argument("--proxy", type=Path, default=BUILTIN)
    parser.add_argument("--domains", default="", help="comma-separated subset")
    parser.add_argument("--steps", type=int, default=FederationConfig().rounds)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--records", type=int, default=2000, help="of a domain, training and held-out together")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--lr", type=float, default=TrainingConfig().server_learning_rate)
    parser.add_argument("--clip-norm", type=float, default=PrivacyConfig().clip_norm)
    parser.add_argument("--rank", type=int, default=LoraSettings().rank)
    parser.add_argument("--noise-multipliers", default="0,4.3")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    mapping = np.asarray(json.loads((options.proxy / "small_to_large.json").read_text()), dtype=np.int64)
    rows = []
    for domain in domains(options):
        scores = large_scores(options, domain, mapping)
        for noise_multiplier in map(float, options.noise_multipliers.split(",")):
            rows.append(rehearse(options, domain, scores, mapping, noise_multiplier))  # and writes positions-*.npz
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if options.json:
        json.dump({"schema": 1, "options": {k: str(v) for k, v in vars(options).items()}, "rows": rows}, sys.stdout)
        print()
    else:
        print(table(rows))


def domains(options: argparse.Namespace) -> Iterator[Domain]:
    """Read and cut the rehearsal domains; every fifth sequence is held out, up to the number asked for."""
    tokenizer = Tokenizer.from_file(str(options.large / "tokenizer.json"))

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    talks = dialogues(options.chat)
    found: dict[str, list[tuple[list[int], int]]] = {
        "dialogues": [([SEPARATOR_ID, *ids(text)], 1) for text in talks],
        "answers": [_pair(ids, *text.splitlines()[:2]) for text in talks if text.count("\n") > 1],
    }
    for author in REHEARSAL_AUTHORS:
        found[author] = [([SEPARATOR_ID, *text], 1) for text in passages(options, author, ids)]
    if options.legends:
        found["legends"] = [_pair(ids, f"Tell me about the {who}.", text) for who, text in legends(options.legends)]
    for name, records in found.items():
        if options.domains and name not in options.domains.split(","):
            continue
        cut = [(sequence[: options.context + 1], start) for sequence, start in records]
        cut = [(sequence, start) for sequence, start in cut if start < len(sequence)]
        order = np.random.default_rng(options.seed).permutation(len(cut))[: options.records]
        held = min(options.held_out, len(order) // 4)
        starts = {tuple(sequence): start for sequence, start in cut if start != 1}
        train, held_out = ([cut[index][0] for index in part] for part in (order[held:], order[:held]))
        yield Domain(name, train, held_out, starts)


def passages(options: argparse.Namespace, author: str, ids: Callable[[str], list[int]]) -> Iterator[list[int]]:
    """Passages of an author's books, each from the beginning of a paragraph to the context's end."""
    current: list[int] = []
    for paragraph in islice(book_paragraphs(options.books, [author]), options.records * 6):
        current += ids(paragraph)
        if len(current) >= options.context:
            yield current[: options.context]
            current = []


def legends(directory: Path) -> Iterator[tuple[str, str]]:
    """Nations and what Freeciv tells about them."""
    for path in sorted(directory.glob("*.ruleset")):
        content = path.read_text(encoding="utf-8", errors="replace")
        plural = re.search(r'^plural\s*=\s*_\("(?:\?[^:"]*:)?([^"]*)"\)', content, re.M)
        legend = re.search(r'^legend\s*=\s*_\("(.*?)"\)', content, re.M | re.S)
        if plural and legend:
            text = re.sub(r"\s+", " ", legend[1].replace("\\\n", " ").replace("\\n", " ").replace('\\"', '"')).strip()
            if len(text) > 80:
                yield plural[1], text


def _pair(ids: Callable[[str], list[int]], prompt: str, response: str) -> tuple[list[int], int]:
    before = [SEPARATOR_ID, *ids(PAIR_OPENING), *ids(prompt), *ids(PAIR_TURN)]
    return [*before, *ids(response.strip()), *ids(PAIR_END)], len(before)


def dialogues(directory: Path) -> list[str]:
    """The corpus's conversations, one text each, one line an utterance, one conversation per opening line.

    Lists of facts, code, and the support log (one form letter repeated) are left out.
    """
    found = []
    for path in sorted(directory.glob("*.yml")):
        if path.stem in {"coding", "trivia", "literature", "computers", "tech_support"}:
            continue
        lines: list[str] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            match = re.match(r"^\s*(- )?- (.*)$", line)
            if not match or line.startswith("categories"):
                continue
            if match[1] and lines:
                found.append("\n".join(lines) + "\n")
                lines = []
            lines.append(match[2].strip().strip("'\"").replace("''", "'"))
        found.append("\n".join(lines) + "\n")
    return list({text.split("\n", 1)[0].lower(): text for text in found}.values())


def padded(sequences: list[list[int]], starts: dict[tuple[int, ...], int] | None = None) -> tuple[Tensor, Tensor]:
    """Right-padded ids `[rows, longest]` and the mask of judged positions `[rows, longest - 1]`."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), SEPARATOR_ID)
    mask = torch.zeros(len(sequences), longest - 1, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, (starts or {}).get(tuple(sequence), 1) - 1 : len(sequence) - 1] = True
    return ids, mask


@torch.no_grad()
def large_scores(options: argparse.Namespace, domain: Domain, mapping: np.ndarray) -> LargeScores:
    """Score the held-out sequences once; kept in WORK for the next proxy over the same vocabulary."""
    key = sha256(json.dumps([domain.held_out, sorted(domain.starts.values()), mapping.tolist()]).encode()).hexdigest()[
        :16
    ]
    path = options.work / f"scores-{key}.safetensors"
    if not path.exists():
        large = AutoModelForCausalLM.from_pretrained(options.large, dtype=torch.float32).eval()
        kept = torch.from_numpy(mapping[mapping >= 0])
        left_out = torch.ones(large.config.vocab_size, dtype=torch.bool)
        left_out[kept] = False
        inside, outside, target = [], [], []
        for begin in range(0, len(domain.held_out), 8):
            ids, mask = padded(domain.held_out[begin : begin + 8], domain.starts)
            logprobs = large(ids[:, :-1]).logits.log_softmax(-1)[mask]
            target.append(logprobs.gather(1, ids[:, 1:][mask][:, None])[:, 0])
            inside.append(torch.cat([logprobs[:, kept], torch.full((len(logprobs), 1), -torch.inf)], 1).half())
            outside.append(logprobs[:, left_out].logsumexp(1))
        options.work.mkdir(parents=True, exist_ok=True)
        scores = {"inside": torch.cat(inside), "outside": torch.cat(outside), "target": torch.cat(target)}
        save_file(scores, path)
    return LargeScores(**load_file(path))


def rehearse(
    options: argparse.Namespace, domain: Domain, scores: LargeScores, mapping: np.ndarray, noise_multiplier: float
) -> dict:
    """Tune the proxy on the domain, then score every alpha on its held-out sequences."""
    lookup = torch.from_numpy(large_to_small(mapping))
    ids, mask = padded(domain.held_out, domain.starts)
    small = lookup[ids]
    model = load_builtin_weights(options.proxy, Vocabulary.from_file(options.large / "tokenizer.json"))[0].eval()
    base = predict(model, small, mask)
    began = time.time()
    tuned_model, tokens = tune(
        options,
        model,
        [lookup[torch.tensor(s)].tolist() for s in domain.train],
        noise_multiplier,
        [domain.starts.get(tuple(s), 1) for s in domain.train],
    )
    seconds = time.time() - began
    tuned = predict(tuned_model, small, mask)
    targets = small[:, 1:][mask]
    found = positions(scores.inside, scores.outside, scores.target, base, tuned, targets, mask, mapping)
    name = f"positions-{domain.name.replace(' ', '-')}-{noise_multiplier:g}-{options.seed}.npz"
    np.savez_compressed(options.work / name, **found)
    return {
        "domain": domain.name,
        "noise_multiplier": noise_multiplier,
        "train_sequences": len(domain.train),
        "positions": int(mask.sum()),
        "small_base": nll(base, targets),
        "small_tuned": nll(tuned, targets),
        "proxied": {str(alpha): proxied(scores, base, tuned, targets, alpha) for alpha in ALPHAS},
        "tokens_per_s": round(tokens / seconds),
    }


@torch.no_grad()
def predict(model: nn.Module, small: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities `[positions, small_vocab]`."""
    parts = [
        model(input_ids=small[row : row + 16, :-1]).logits.float().log_softmax(-1)[mask[row : row + 16]]
        for row in range(0, len(small), 16)
    ]
    return torch.cat(parts)


def nll(logprobs: Tensor, targets: Tensor) -> float:
    return round(float(-logprobs.gather(1, targets[:, None]).mean()), 4)


def proxied(scores: LargeScores, base: Tensor, tuned: Tensor, targets: Tensor, alpha: float) -> float:
    """Mean loss of the shifted large model; a token outside the map gets the shift of the unknown class."""
    total = 0.0
    for begin in range(0, len(targets), 1024):
        part = slice(begin, begin + 1024)
        shift = alpha * (tuned[part] - base[part])
        inside = (scores.inside[part].float() + shift).logsumexp(1)
        normaliser = torch.logaddexp(inside, scores.outside[part] + shift[:, -1])
        moved = scores.target[part] + shift.gather(1, targets[part, None])[:, 0]
        total += float((normaliser - moved).sum())
    return round(total / len(targets), 4)


def tune(
    options: argparse.Namespace,
    model: nn.Module,
    sequences: list[list[int]],
    noise_multiplier: float,
    starts: list[int] | None = None,
):
    """Tune the default adapter, of the asked rank, by clipped, summed and (if asked) noised gradients under Adam.

    Returns:
        The tuned model and the number of tokens trained on.
    """
    settings = LoraSettings(rank=options.rank)
    last = model.config.num_hidden_layers
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale * settings.rank,
        target_modules=list(settings.modules),
        layers_to_transform=list(range(last - settings.layers, last)) if settings.layers else None,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(options.seed)
    tuned = get_peft_model(model, config)
    set_public_directions(tuned, options.proxy, settings.rank)
    layers = [m for n, m in tuned.named_modules() if n.endswith("lora_B.default")]
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad = "lora_B" in name
    seen: dict[nn.Module, Tensor] = {}
    per_example: dict[nn.Module, Tensor] = {}
    for layer in layers:
        layer.register_forward_hook(lambda m, i, _o: seen.__setitem__(m, i[0].detach()))
        layer.register_full_backward_hook(
            lambda m, _i, o: per_example.__setitem__(m, torch.einsum("bto,bti->boi", o[0].float(), seen[m].float()))
        )
    stepper = torch.optim.Adam([m.weight for m in layers], lr=options.lr)
    rng = np.random.default_rng(options.seed)
    noise = torch.Generator().manual_seed(options.seed)
    tokens = 0
    for _ in range(options.steps):
        chosen = rng.choice(len(sequences), min(options.batch, len(sequences)), replace=False)
        sums = {layer: torch.zeros_like(layer.weight) for layer in layers}
        for part in np.array_split(chosen, -(-len(chosen) // MICRO_BATCH)):
            ids, mask = padded([sequences[i] for i in part])
            for row, index in enumerate(part):
                mask[row, : (starts[index] if starts else 1) - 1] = False
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = tuned(input_ids=ids[:, :-1]).logits
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            losses = (losses.view_as(mask) * mask).sum(1) / mask.sum(1)
            losses.sum().backward()
            norms = torch.stack([per_example[m].flatten(1).norm(dim=1) for m in layers]).norm(dim=0)
            factor = (options.clip_norm / norms).clamp(max=1.0)
            for layer in layers:
                sums[layer] += torch.einsum("b,boi->oi", factor, per_example[layer])
            tokens += int(mask.sum())
        # The same noise per example, however small a domain's batch is.
        scale = noise_multiplier * options.clip_norm * len(chosen) / NOISE_RECORDS
        for layer in layers:
            sums[layer] += scale * torch.randn(sums[layer].shape, generator=noise)
            layer.weight.grad = sums[layer] / len(chosen)
        stepper.step()
    return tuned.eval(), tokens


def set_public_directions(tuned: nn.Module, proxy: Path, rank: int) -> None:
    """LoRA's A as a run has it: the proxy's public directions where it ships them, else PEFT's random ones."""
    if not (proxy / FILE).exists():
        return
    directions = Directions.load(proxy / FILE)
    prefix, suffix = "base_model.model.", ".lora_A.default.weight"
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith(suffix):
                parameter.copy_(directions.lora_a(name.removeprefix(prefix).removesuffix(suffix), rank))


def table(rows: list[dict]) -> str:
    """A Markdown table: one line a domain and noise level."""
    head = ["domain", "noise", "small base", "small tuned", *(f"alpha {a:g}" for a in ALPHAS), "tokens/s"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [row["domain"], f"{row['noise_multiplier']:g}", row["small_base"], row["small_tuned"]]
        lines.append("| " + " | ".join(map(str, [*cells, *row["proxied"].values(), row["tokens_per_s"]])) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
