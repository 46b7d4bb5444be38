"""`fedpt-secure evaluate`: a finished run against the large model alone and against the large model tuned directly.

Reads the run directory, and the text and models it names, checked against the run's digests. Trains nothing but the
ceiling, and changes nothing of the run: `evaluation.json` is added to its directory.

**Held-out text is private and chooses nothing here.** What is printed are averages over records that were never trained
on. To pick a run, a rule or a number of rounds by them is a choice made on private text, whose cost no ledger counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from fedpt_secure import files
from fedpt_secure.config import Count, Settings
from fedpt_secure.data import Cache
from fedpt_secure.data.records import Record
from fedpt_secure.errors import ConfigError
from fedpt_secure.evaluation import (
    Ceiling,
    DirectSettings,
    Estimate,
    ResponseTask,
    black_box_losses,
    bootstrap_rng,
    ceiling_document,
    evaluate_arms,
    gap_closed,
    ratio_interval,
    respond,
    score_responses,
    tune_ceiling,
)
from fedpt_secure.federation import (
    FinishedRun,
    RunDirectory,
    held_out_sample,
    large_examples,
    open_finished,
    seeded_sample,
)
from fedpt_secure.progress import Progress
from fedpt_secure.proxy import BlackBoxLM, LocalTransformersLM, SmallPair, SteeringRule
from fedpt_secure.report.summary import arm, utility

SCHEMA = "fedpt-secure/evaluation/1"
NO_CHOICE = (
    "Averages over held-out private records, which chose nothing in this run. Choosing a run, a rule or a stopping "
    "point by them would cost privacy that no ledger counts."
)
OF_A_CEILING = (
    "The ceiling's figures come from a model trained on all training records without privacy: no epsilon covers them."
)
ALONE = SteeringRule(alpha=0.0)
SMALL_ALONE = SteeringRule(alpha=0.0, shares=((0, 1.0),))
"""The tuned small LM; tokens it cannot tell apart share its unknown class in the large model's proportions."""


class EvaluateConfig(Settings):
    """What `evaluate` is asked for."""

    records: Annotated[int, Field(ge=10, le=1_000_000)] | None = None
    """Held-out records scored; nothing for as many as the run's own report, which are then the same ones."""
    ceiling: bool = False
    """Tune the large model directly as well, without privacy."""
    ceiling_records: Count | None = None
    """Training records of the ceiling; nothing for all."""
    ceiling_epochs: Annotated[int, Field(ge=1, le=100)] = 1
    responses: Annotated[int, Field(ge=0, le=100_000)] = 20
    """Held-out prompts that every arm responds to, where the data has prompts; 0 for none."""
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 64

    @field_validator("responses")
    @classmethod
    def _has_an_interval(cls, value: int) -> int:
        if value == 1:
            raise ValueError("one response has no interval: 0 for none, or 2 and more")
        return value


def evaluate_run(directory: RunDirectory, asked: EvaluateConfig, *, cache: Cache, progress: Progress) -> dict[str, Any]:
    """Judge a finished run; the result is written to its `evaluation.json` too.

    Raises:
        RunDirectoryError: the run is not finished, or its text or models are not what they were.
        FedptError: text or models cannot be loaded, a model misbehaves, or the ceiling cannot be trained.
    """
    run = open_finished(directory, cache=cache, progress=progress)
    config = run.config
    rule = SteeringRule.of(config.proxy, responses=config.data.has_prompts)
    records = held_out_sample(run.text, config, records=asked.records)
    examples = large_examples(records, run.models, config)
    ceiling = _ceiling(run, asked, cache, progress) if asked.ceiling else None
    black_box = run.models.black_box(progress)
    evaluation = evaluate_arms(examples, black_box, run.models.pair, [rule], progress)
    resamples = config.evaluation.bootstrap_samples
    content = utility(evaluation, rule=rule, seed=config.seed, resamples=resamples)
    tuned_directly = None
    if ceiling is not None:
        tuned_directly = LocalTransformersLM(run.models.weights.path, run.models.device, adapter=ceiling.adapter)
        losses = black_box_losses(examples, tuned_directly, progress, name="held-out loss of the ceiling")
        rng = bootstrap_rng(config.seed)
        content["arms"]["large_tuned"] = arm(losses, evaluation.tokens, rng, resamples=resamples)
        closed = gap_closed(evaluation.large_base, evaluation.proxy_tuned[rule], losses, rng, resamples=resamples)
        content["gap_closed"] = None if closed is None else _estimate(closed)
        content["ceiling"] = ceiling_document(ceiling)
    content["responses"] = _responses(run, records, asked, black_box, tuned_directly, progress)
    privacy = run.privacy
    result = {
        "schema": SCHEMA,
        "private": privacy["private"],
        "privacy": {key: privacy[key] for key in ("claim", "epsilon", "delta", "unit")},
        **content,
        "alpha": config.proxy.alpha,
        "shares": [list(entry) for entry in rule.shares],
        "run": {
            "rounds": config.federation.rounds,
            "mode": config.privacy.mode,
            "data": run.text.name,
            "data_digest": run.text.digest,
            "large": run.models.weights.source,
            "large_digest": run.models.weights.digest,
            "small": config.models.small,
        },
        "black_box": run.models.black_box_document(),
        "statement": NO_CHOICE if ceiling is None else f"{NO_CHOICE} {OF_A_CEILING}",
    }
    files.write_json(directory.path / "evaluation.json", result)
    return result


def _ceiling(run: FinishedRun, asked: EvaluateConfig, cache: Cache, progress: Progress) -> Ceiling:
    if run.models.source is not None:
        raise ConfigError(
            "the large model is behind an API, so that it cannot be tuned directly and there is no ceiling",
            hint="leave out --ceiling, or train with --large PATH where the weights are at hand",
        )
    records = [record for client in run.text.clients for record in client.train]
    settings = DirectSettings(records=asked.ceiling_records, epochs=asked.ceiling_epochs, seed=run.config.seed)
    return tune_ceiling(
        run.models.weights,
        large_examples(records, run.models, run.config),
        settings,
        cache=cache,
        device=run.models.device,
        progress=progress,
    )


def _responses(
    run: FinishedRun,
    records: Sequence[Record],
    asked: EvaluateConfig,
    black_box: BlackBoxLM,
    tuned_directly: BlackBoxLM | None,
    progress: Progress,
) -> dict[str, Any] | None:
    """How near each arm's responses come to the references; None without two prompts, or if none was asked for."""
    with_prompt = [record for record in records if record.prompt]
    if len(with_prompt) < 2 or asked.responses == 0:
        return None
    chosen = seeded_sample(with_prompt, asked.responses, purpose="response sample", seed=run.config.seed)
    tasks = [
        ResponseTask(example.ids[: example.loss_from], record.text)
        for record, example in zip(chosen, large_examples(chosen, run.models, run.config), strict=True)
    ]
    references = [task.reference for task in tasks]
    score_responses([], [])  # a missing package is missed before minutes of decoding
    arms: dict[str, tuple[BlackBoxLM, SmallPair | None, SteeringRule]] = {
        "large_base": (black_box, None, ALONE),
        "small_tuned": (black_box, run.models.pair, SMALL_ALONE),
        "proxy_tuned": (black_box, run.models.pair, SteeringRule.of(run.config.proxy, responses=True)),
    }
    if tuned_directly is not None:
        arms["large_tuned"] = (tuned_directly, None, ALONE)
    scores = {}
    for name, (box, pair, rule) in arms.items():
        responses = respond(
            tasks,
            box,
            pair,
            rule,
            run.models.tokenizer,
            max_new_tokens=asked.max_new_tokens,
            name=name,
            progress=progress,
        )
        scores[name] = score_responses(responses, references)
    rng, resamples = bootstrap_rng(run.config.seed), run.config.evaluation.bootstrap_samples

    def mean(values: npt.NDArray[np.float64]) -> dict[str, Any]:
        return _estimate(ratio_interval(values, np.ones(len(values)), rng, resamples=resamples))

    return {
        "records": len(tasks),
        "max_new_tokens": asked.max_new_tokens,
        "decoding": "greedy",
        "arms": {name: {metric: mean(values) for metric, values in of_arm.items()} for name, of_arm in scores.items()},
        "improvement": {
            metric: mean(values - scores["large_base"][metric]) for metric, values in scores["proxy_tuned"].items()
        },
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "ci": [estimate.low, estimate.high]}
