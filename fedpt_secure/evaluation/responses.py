"""Responses that the arms write to held-out prompts, and how near they come to the reference.

Loss asks how probable the reference is; this asks what a user would read. Decoding is greedy, so a figure has no
sampling noise of its own.

- **ROUGE-L** (Lin 2004): F-measure of the longest common subsequence of words, by `rouge-score` with stemming. Its
  words are runs of the letters a-z and digits: for text in another script it says nothing.
- **Exact match**: equal after case folding and with white space collapsed.
- **Number match**, where every reference ends as GSM8K's do (`#### 42`): equal final numbers. Of the response the
  number after its last `####` counts, else its last number at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from fedpt_secure.data.tokenizer import TextTokenizer
from fedpt_secure.errors import ConfigError, DataError
from fedpt_secure.progress import SILENT, Progress
from fedpt_secure.proxy import BlackBoxLM, DecodingSettings, SmallPair, SteeringRule, generate

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_FINAL = re.compile(r"####\s*(" + _NUMBER.pattern + r")\s*$")
_MARK = "####"

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ResponseTask:
    """A held-out prompt and its reference.

    Attributes:
        prompt: large token ids up to the first one of the response.
        reference: what the record's owner had as the response.
    """

    prompt: tuple[int, ...]
    reference: str


def respond(
    tasks: Sequence[ResponseTask],
    black_box: BlackBoxLM,
    pair: SmallPair | None,
    rule: SteeringRule,
    tokenizer: TextTokenizer,
    *,
    max_new_tokens: int,
    name: str,
    progress: Progress = SILENT,
) -> list[str]:
    """Greedy responses of one arm, in the order of the tasks.

    Args:
        tasks: at least one.
        black_box: the large model.
        pair: base and tuned small LM; None only where the rule does not need it.
        rule: alpha 0 and no shares for the black box alone; a share of 1 for the tuned small LM alone, with the tokens
            it cannot tell apart in the black box's proportions.
        tokenizer: the black box's.
        max_new_tokens: of a response; its end token may come earlier.
        name: of the arm, for the bar.
        progress: a bar that counts responses.

    Raises:
        DataError: there is no task.
        BlackBoxError, ModelError: a prompt and its response pass a context, or a model misbehaves.
    """
    if not tasks:
        raise DataError("there is no held-out prompt to respond to")
    settings = DecodingSettings(rule=rule, max_new_tokens=max_new_tokens)
    unused = np.random.default_rng(0)  # greedy decoding draws nothing
    responses = []
    with progress.task(f"responses ({name})", len(tasks), unit="responses") as bar:
        for task in tasks:
            tokens = list(generate(black_box, pair, task.prompt, settings, unused, first_place=0))
            responses.append(tokenizer.text(tokens))
            bar.advance()
    return responses


def score_responses(responses: Sequence[str], references: Sequence[str]) -> Mapping[str, Scores]:
    """`rouge_l`, `exact_match`, and `number_match` where every reference has a final number: float64 `[records]` each.

    Raises:
        ConfigError: `rouge-score` is not installed.
        DataError: not as many responses as references.
    """
    if len(responses) != len(references):
        raise DataError(f"{len(responses)} responses cannot be compared with {len(references)} references")
    scores: dict[str, Callable[[str, str], float]] = {"rouge_l": rouge_l(), "exact_match": exact_match}
    if all(has_final_number(reference) for reference in references):
        scores["number_match"] = number_match
    return {
        name: np.array([score(*pair) for pair in zip(responses, references, strict=True)])
        for name, score in scores.items()
    }


def rouge_l() -> Callable[[str, str], float]:
    """The ROUGE-L F-measure of a response and its reference.

    Raises:
        ConfigError: `rouge-score` is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ConfigError(
            "ROUGE-L needs the package rouge-score, which is not installed",
            hint='pip install "fedpt-secure[rouge]", or --responses 0 for held-out loss alone',
        ) from None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def score(response: str, reference: str) -> float:
        return float(scorer.score(reference, response)["rougeL"].fmeasure)

    return score


def exact_match(response: str, reference: str) -> float:
    """1 where both are equal after case folding and with white space collapsed, else 0."""
    return float(" ".join(response.casefold().split()) == " ".join(reference.casefold().split()))


def has_final_number(reference: str) -> bool:
    """Whether a reference ends as GSM8K's do: `#### 42`."""
    return _FINAL.search(reference) is not None


def number_match(response: str, reference: str) -> float:
    """1 where response and reference have the same final number (`1,000` and `1000.0` are the same), else 0."""
    found, wanted = final_number(response), final_number(reference)
    return float(wanted is not None and found == wanted)


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, else the last number of the text, else None."""
    _, mark, after = text.rpartition(_MARK)
    marked = _NUMBER.search(after) if mark else None
    numbers = [marked.group()] if marked else _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None
