"""What a black box says about public text: asked once, cut to the most likely classes, kept on disk.

Distillation reads these answers round after round, and run after run; a paid API should be asked once. Per position the
`top_k` most likely small classes are kept with the log of the mass on all others. Read back, the others get that mass
in the proportions of the small base: a uniform tail would put probability on classes that neither model believes in.

**The cache** is addressed by content: the black box's identity, the token map, `top_k` and the text's own ids, so that
an answer is never taken for another's. Every file opens with the SHA-256 of the rest and is checked when it is read; a
damaged one is shown, and asked for again. An interrupted job goes on with the first text that has no file.

Only public text comes here (`PublicText`): what is sent may be stored by whoever owns the black box.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedpt_secure import files
from fedpt_secure.errors import ConfigError, DataError
from fedpt_secure.lm.token_map import TokenMap
from fedpt_secure.progress import SILENT, Progress
from fedpt_secure.proxy.arithmetic import restricted_logprobs
from fedpt_secure.proxy.black_box import BlackBoxLM, guard

_HASH_BYTES = 32


@dataclass(frozen=True, slots=True)
class PublicText:
    """Text that is nobody's secret, cut by the large tokenizer.

    Attributes:
        source: what it is and under which licence; stands in the report.
        sequences: large token ids, each opened by the separator; at least two sequences, none empty.

    Raises:
        DataError: the source is not named, or there are fewer than two sequences, or one is empty.
    """

    source: str
    sequences: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise DataError("public text needs its source named", hint="say what it is and under which licence")
        if len(self.sequences) < 2 or not all(self.sequences):
            raise DataError(
                f"public text needs two sequences or more, none empty; {self.source} gave {len(self.sequences)}",
                hint="one part teaches, another part measures",
            )


@dataclass(frozen=True, slots=True)
class TopClasses:
    """The most likely small classes after each position of one text.

    Attributes:
        ids: int32 `[len, k]`, most likely first.
        logprobs: float16 `[len, k]`; -inf for a class the black box excludes.
        rest: float32 `[len]`, log of the mass on all other classes; -inf where there is none.
    """

    ids: Tensor
    logprobs: Tensor
    rest: Tensor

    @classmethod
    def of(cls, classes: Tensor, top_k: int) -> TopClasses:
        """Cut log-probabilities `[len, v]` to the `top_k` most likely."""
        kept = classes.topk(min(top_k, classes.shape[1]), dim=1)
        others = classes.clone().scatter_(1, kept.indices, -torch.inf)
        return cls(kept.indices.int().cpu(), kept.values.half().cpu(), torch.logsumexp(others, dim=1).float().cpu())

    def fill(self, base: Tensor) -> Tensor:
        """Log-probabilities of all classes, float32 `[len, v]`: the others in the proportions of `base` `[len, v]`."""
        others = base.float().clone().scatter_(1, self.ids.long(), -torch.inf)
        # Where everything is kept there is nothing to spread: -inf - -inf would be NaN.
        share = torch.where(torch.isneginf(others), -torch.inf, others - torch.logsumexp(others, 1, keepdim=True))
        filled = (share + self.rest[:, None]).scatter_(1, self.ids.long(), self.logprobs.float())
        return torch.log_softmax(filled, dim=1)

    @property
    def size_in_bytes(self) -> int:
        """The memory it takes."""
        return sum(part.numel() * part.element_size() for part in (self.ids, self.logprobs, self.rest))


@dataclass(frozen=True, slots=True)
class PublicAnswers:
    """What the black box says about a public text, as far as the small vocabulary can express it.

    Attributes:
        source: the text's.
        token_map: whose small classes are meant.
        small_ids: the text in small ids, sequence by sequence.
        top: per sequence, the most likely classes after each position.
    """

    source: str
    token_map: TokenMap
    small_ids: tuple[tuple[int, ...], ...]
    top: tuple[TopClasses, ...]

    def classes(self, index: int, base: Tensor) -> Tensor:
        """Log-probabilities of all small classes after each position of one sequence, float32 `[len, v]`.

        Args:
            index: of the sequence.
            base: `[len, v]`, the small base's log-probabilities there; they shape what was cut off.
        """
        return self.top[index].fill(base)

    @property
    def size_in_bytes(self) -> int:
        """The memory the answers take."""
        return sum(part.size_in_bytes for part in self.top)


@dataclass(frozen=True, slots=True)
class AskingCost:
    """What asking costs, known before anything is asked.

    Attributes:
        texts: sequences still to be asked about; `cached`: those whose answers are on disk already.
        tokens: of those still to be asked.
        calls: requests they take at most: one a text, or one a token where the API cannot score a text.
        kept_bytes: what their answers will take on disk, about.
        leaves: the tokens go to another machine, perhaps somebody else's and paid for.
    """

    texts: int
    cached: int
    tokens: int
    calls: int
    kept_bytes: int
    leaves: bool

    def sentence(self) -> str:
        """One line for people."""
        if not self.texts:
            return f"black box on public text: all {self.cached:,} answers are in the cache; nothing is asked"
        where = "they LEAVE this machine" if self.leaves else "they stay on this machine"
        return (
            f"black box on public text: {self.texts:,} texts to ask about ({self.cached:,} in the cache), "
            f"{self.tokens:,} tokens in at most {self.calls:,} calls, {where}; "
            f"{self.kept_bytes / 1e6:.1f} MB to keep"
        )


class AnswerCache:
    """Answers on disk, one file a text.

    Args:
        directory: where they lie; made when first written to.
        model: the black box's identity: a digest of its weights, or address and name of an API.
        token_map: whose small classes are meant.
        top_k: classes kept a position.

    Raises:
        ConfigError: `top_k` is not at least 1, or the model is not named.
    """

    def __init__(self, directory: Path, *, model: str, token_map: TokenMap, top_k: int) -> None:
        if top_k < 1:
            raise ConfigError(f"distillation: top_k is {top_k}; it must be at least 1")
        if not model.strip():
            raise ConfigError("answers can only be kept of a black box that is named")
        self._directory = directory
        self._top_k = min(top_k, token_map.small_vocabulary_size)
        self._scope = hashlib.sha256(b"fedpt-secure/public-answers/v1\n")
        self._scope.update(json.dumps([model, self._top_k]).encode() + b"\n")
        self._scope.update(token_map.small_to_large.astype("<i8").tobytes())

    @property
    def top_k(self) -> int:
        """Classes kept a position, at most all."""
        return self._top_k

    def path(self, sequence: Sequence[int]) -> Path:
        """Where the answer about a text lies or will lie."""
        digest = self._scope.copy()
        digest.update(json.dumps(list(sequence)).encode())
        name = digest.hexdigest()
        return self._directory / name[:2] / name[2:]

    def load(self, sequence: Sequence[int], progress: Progress) -> TopClasses | None:
        """The answer about a text; None where there is none, or what is there is damaged (which is shown)."""
        path = self.path(sequence)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(content[_HASH_BYTES:]).digest() == content[:_HASH_BYTES]:
            try:
                found = TopClasses(**load(content[_HASH_BYTES:]))
                if found.ids.shape == found.logprobs.shape == (len(sequence), self._top_k):
                    return found
            except (SafetensorError, TypeError):
                pass  # what has the right hash and cannot be read was written by something else: damage all the same
        progress.note(f"the answer {path} is damaged; asking again")
        return None

    def save(self, sequence: Sequence[int], answer: TopClasses) -> None:
        """Keep an answer."""
        content = save({"ids": answer.ids, "logprobs": answer.logprobs, "rest": answer.rest})
        files.write_bytes(self.path(sequence), hashlib.sha256(content).digest() + content, mode=0o600)


def ask_black_box(
    black_box: BlackBoxLM, token_map: TokenMap, text: PublicText, cache: AnswerCache, progress: Progress = SILENT
) -> PublicAnswers:
    """What the black box says after every position of a public text; only what is not in the cache is asked.

    The cost is shown as a note before the first request, and an estimate of the time after it.

    Raises:
        BlackBoxError: it cannot score whole texts over the full vocabulary, or misbehaves.
        ModelError: the text has ids outside the large vocabulary.
    """
    found = {sequence: cache.load(sequence, progress) for sequence in dict.fromkeys(text.sequences)}
    missing = sorted((sequence for sequence, answer in found.items() if answer is None), key=len, reverse=True)
    progress.note(asking_cost(black_box, missing, cached=len(found) - len(missing), top_k=cache.top_k).sentence())
    if missing:
        tokens = sum(map(len, missing))
        with progress.task("black box on public text", tokens, unit="tokens") as task:
            began = time.monotonic()
            scored = guard(black_box).score(missing)
            for index, (sequence, dense) in enumerate(zip(missing, scored, strict=True)):
                said = TopClasses.of(restricted_logprobs(dense, token_map), cache.top_k)
                cache.save(sequence, said)
                found[sequence] = said
                if index == 0:
                    seconds = (time.monotonic() - began) * tokens / len(dense)
                    progress.note(f"at the speed of the first text this takes {seconds / 60:.1f} minutes or less")
                task.advance(len(dense))
    small_ids = tuple(tuple(token_map.to_small(sequence)) for sequence in text.sequences)
    answers = tuple(answer for sequence in text.sequences if (answer := found[sequence]) is not None)
    return PublicAnswers(text.source, token_map, small_ids, answers)


def asking_cost(black_box: BlackBoxLM, missing: Sequence[Sequence[int]], *, cached: int, top_k: int) -> AskingCost:
    """What asking about these texts costs."""
    able = black_box.capabilities
    tokens = sum(map(len, missing))
    return AskingCost(
        texts=len(missing),
        cached=cached,
        tokens=tokens,
        calls=len(missing) if able.prompt_logprobs else tokens,
        kept_bytes=tokens * (6 * top_k + 4),
        leaves=able.leaves_this_machine,
    )
