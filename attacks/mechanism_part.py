"""The audit's part `mechanism`: the installed build, under the run's settings, held to the claimed noise."""

from __future__ import annotations

import time
from typing import Any

from fedpt_secure.attacks.findings import Check, Finding
from fedpt_secure.attacks.mechanism import Observer, longest_gradient, noise_scale, two_worlds
from fedpt_secure.attacks.public_constants import compare_public_constants
from fedpt_secure.attacks.settings import TimeBudget
from fedpt_secure.attacks.subject import Claim, Subject
from fedpt_secure.federation.setup import load_public_text
from fedpt_secure.federation.terms import calibrate
from fedpt_secure.privacy import SmallExample
from fedpt_secure.progress import Progress

MOST_TRIALS, FEWEST_TRIALS = 300, 40
"""In each of two worlds."""
MOST_ROUNDS = 16
"""Of noise alone."""
_PUBLIC_TEXTS = 12
_LONG_ENOUGH = 2.0
"""Clip norms that the record's gradient should have at least, for missing clipping to be noticed."""


def audit_mechanism(subject: Subject, claim: Claim, budget: TimeBudget, progress: Progress, *, alpha: float) -> Finding:
    """Noise scale and two worlds against the claim's noise multiplier, and public constants against the data.

    Args:
        alpha: of each of the two statistical checks.
    """
    config, small = subject.config, subject.models.small
    result: dict[str, Any] = {}
    checks = []
    if claim.noise_multiplier is None or claim.epsilon is None:
        result["skipped"] = "no noise is claimed"
    else:
        observer = Observer.of(config, small, noise_multiplier=calibrate(config, subject.schedule))
        texts = load_public_text(subject.models.tokenizer, context_length=config.models.context_length).sequences
        examples = [SmallExample(tuple(small.token_map.to_small(ids)), 1) for ids in texts[:_PUBLIC_TEXTS]]
        record, length = longest_gradient(small, examples)
        began = time.monotonic()
        observer.observe((), -1)
        alone = time.monotonic() - began
        began = time.monotonic()
        observer.observe((record,), -1)
        both = alone + time.monotonic() - began
        rounds = budget.fit(
            "noise scale, rounds",
            MOST_ROUNDS,
            seconds_each=alone,
            share=0.03,
            minimum=1,
            consequence="a smaller lack of noise goes unnoticed",
        )
        trials = budget.fit(
            "two worlds, trials",
            MOST_TRIALS,
            seconds_each=both,
            share=0.1,
            minimum=FEWEST_TRIALS,
            consequence="error rates below 3/{count} cannot be told from 0",
        )
        with progress.task("mechanism", rounds + trials, unit="trials") as task:
            result["noise_scale"] = noise_scale(
                observer, claimed=claim.noise_multiplier, rounds=rounds, alpha=alpha, advance=task.advance
            )
            result["two_worlds"] = two_worlds(
                observer, record, claimed=claim.noise_multiplier, trials=trials, alpha=alpha, advance=task.advance
            )
        result["two_worlds"]["gradient_length"] = length / config.privacy.clip_norm
        checks = [_scale_check(result["noise_scale"], alpha), _worlds_check(result["two_worlds"], alpha)]
    result["public_constants"] = compare_public_constants(subject, progress)
    checks.append(_constants_check(result["public_constants"]))
    return Finding(result, tuple(checks))


def _scale_check(found: dict[str, Any], alpha: float) -> Check:
    sentence = (
        f"noise of {found['measured_deviation']:.4f} clip norms over {found['values']} numbers; claimed "
        f"{found['claimed_deviation']:.4f}, a correct build has at least {found['interval'][0]:.4f}"
    )
    return Check("noise scale", found["violation"], True, alpha, sentence)


def _worlds_check(found: dict[str, Any], alpha: float) -> Check:
    sentence = (
        f"two worlds told apart with mu >= {found['mu_lower_bound']:.3f} over {found['trials']} trials each; claimed "
        f"mu {found['mu_claimed']:.3f}"
    )
    if found["gradient_length"] < _LONG_ENOUGH:
        sentence += f" (the record's gradient is only {found['gradient_length']:.1f} clip norms long: missing clipping "
        sentence += "would hardly show)"
    return Check("two worlds", found["violation"], True, alpha, sentence)


def _constants_check(found: dict[str, Any]) -> Check:
    sentence = (
        f"public constants follow the data: {'; '.join(found['differences'])}"
        if found["differences"]
        else f"{len(found['compared'])} public constants are those agreed before, whatever the data"
    )
    return Check("public constants", bool(found["differences"]), True, 0.0, sentence)
