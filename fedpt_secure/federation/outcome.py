"""The server's side of a run, the same in every engine: how a round begins, what its sum does, what is left behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from fedpt_secure import files
from fedpt_secure.config import RunConfig
from fedpt_secure.crypto import Roster
from fedpt_secure.errors import ModelError, RoundError
from fedpt_secure.federation.aggregation import Aggregation, privacy_document
from fedpt_secure.federation.client import LARGEST_ADAPTER_ENTRY, ClientTerms
from fedpt_secure.federation.mechanisms import RingNoiseMechanism
from fedpt_secure.federation.run_directory import RunDirectory
from fedpt_secure.federation.server import AggregationServer, RoundAggregate
from fedpt_secure.federation.server_optimizer import pace_of
from fedpt_secure.federation.state import RunState, save
from fedpt_secure.federation.transcript import Transcript
from fedpt_secure.lm.small import SmallLM
from fedpt_secure.privacy import PrivacyStatement, Release, local_statement, ring_statement


def round_server(
    terms: ClientTerms, roster: Roster, state: RunState, small: SmallLM, *, round_index: int, attempt: int
) -> AggregationServer:
    """The server's side of a round from the adapter that is loaded, on terms that everybody agreed to."""
    adapter = small.adapter_vector()
    return AggregationServer(
        config=terms.config,
        config_digest=terms.config_digest,
        run_id=state.run_id,
        round_index=round_index,
        attempt=attempt,
        cohort=terms.schedule[round_index],
        roster=roster,
        adapter=adapter,
        model_digest=small.weights_digest(adapter),
        mechanism=terms.mechanism,
        clip_norm=state.clip_norm,
        contributors=lambda survivors: terms.plan.contributors(small, survivors, round_index),
    )


def record_round(
    directory: RunDirectory,
    config: RunConfig,
    aggregation: Aggregation,
    state: RunState,
    small: SmallLM,
    transcript: Transcript,
    *,
    data_digest: str,
    seconds: float,
    noted: Mapping[str, Any] | None = None,
) -> float:
    """Make a round durable: its lines in both logs, then the checkpoint that knows it; the adapter's norm.

    Args:
        data_digest: as in `state.restore`.
        seconds: the round's wall time.
        noted: what else its transcript says.
    """
    state.rounds_done = transcript.round_index + 1
    state.add_seconds("rounds", seconds)
    norm = float(np.linalg.norm(small.adapter_vector()))
    private = math.isfinite(config.privacy.epsilon) and not config.insecure_deterministic
    mark = {"round": transcript.round_index, "private": private}
    summed = {"aggregator": aggregation.name, "trust": aggregation.trust}
    directory.append("transcript", mark | dict(noted or {}) | summed | asdict(transcript))
    directory.append(
        "metrics", mark | {"adapter_norm": norm, "clip_norm": state.clip_norm, "aborted": bool(transcript.aborted)}
    )
    save(directory, state, config, data_digest, small)
    return norm


def take_step(
    config: RunConfig,
    state: RunState,
    small: SmallLM,
    aggregate: RoundAggregate,
    round_index: int,
    *,
    distil: Callable[[], object] | None = None,
) -> None:
    """The server's step from the adapter that is loaded, which the result replaces; then distillation, if it is on.

    Args:
        distil: teaches the small LM on public text (FedPT); None for no distillation.

    Raises:
        ModelError: the adapter is no longer finite or small.
    """
    state.clip_norm = aggregate.clip_norm
    training = config.training
    pace = pace_of(
        round_index,
        rounds=config.federation.rounds,
        warm_up=training.server_warm_up,
        cool_down=training.server_cool_down,
    )
    moved, state.optimizer = state.optimizer.apply(
        small.adapter_vector(), aggregate.mean_update, pace=pace, trained=aggregate.trained
    )
    if not np.abs(moved).max() <= LARGEST_ADAPTER_ENTRY:
        raise ModelError(
            f"training diverged in round {round_index}: the adapter is no longer finite or small",
            hint="a smaller --server-learning-rate; a new run",
        )
    small.load_adapter_vector(moved)
    if distil is not None:
        distil()
    state.average = state.average.with_iterate(small.adapter_vector())


def completed_rounds(directory: RunDirectory) -> list[dict[str, Any]]:
    """The transcripts of all rounds, of which one at least has a sum.

    Raises:
        RoundError: every round was aborted.
    """
    transcripts = directory.read_log("transcript")
    if all(line["aborted"] for line in transcripts):
        declined = set().union(*(line.get("declined", ()) for line in transcripts))
        raise RoundError(
            f"all {len(transcripts)} rounds were aborted; the last because: {transcripts[-1]['aborted']}",
            hint=f"{len(declined)} clients are over their own budgets, which `fedpt-secure ledger show` prints: a "
            "smaller --epsilon, fewer rounds or other clients; only a ledger's owner raises its budget"
            if declined
            else "fewer dropouts, larger cohorts, or a smaller --minimum-survivors",
        )
    return transcripts


def publish(
    directory: RunDirectory, statement: PrivacyStatement, aggregation: Aggregation, state: RunState, small: SmallLM
) -> None:
    """Load the adapter that the run releases, and write it with its privacy statement."""
    small.load_adapter_vector(state.average.value(small.adapter_vector()))
    files.write_json(directory.path / "privacy.json", privacy_document(statement, aggregation))
    readme = _adapter_readme(statement, directory.config(), small.name)
    directory.replace_adapter(small.save_adapter, readme=readme)


def statement_of(
    terms: ClientTerms, releases: Mapping[str, Sequence[Release]], transcripts: Sequence[Mapping[str, Any]]
) -> PrivacyStatement:
    """The privacy statement over what clients have released.

    Args:
        releases: by client; what ledgers counted, or more.
        transcripts: of all rounds.
    """
    config, mechanism = terms.config, terms.mechanism
    noise_is_private = all(release.noise_is_private for rows in releases.values() for release in rows)
    if isinstance(mechanism, RingNoiseMechanism):
        statement = ring_statement(
            {client: [release.round_index for release in rows] for client, rows in releases.items()},
            survivors={line["round"]: len(line["survivors"]) for line in transcripts if line["survivors"]},
            mechanism=mechanism.ring,
            by_client=config.privacy.mode == "client",
            sampling_rate=config.privacy.sampling_rate,
            delta=config.privacy.delta,
            clip_norm=_clip_norm_in_words(config),
            corrupt_clients=config.corrupt_clients,
            noise_is_private=noise_is_private,
        )
    else:
        statement = local_statement(
            {client: tuple(release.spent for release in rows) for client, rows in releases.items()},
            delta=config.privacy.delta,
            clip_norm=config.privacy.clip_norm,
            noise_is_private=noise_is_private,
        )
    return _with_planted(statement, config)


def _clip_norm_in_words(config: RunConfig) -> str:
    privacy = config.privacy
    if privacy.clipping == "fixed":
        return f"{privacy.clip_norm:g}"
    return f"the private {privacy.clip_quantile:g} quantile of earlier rounds (first {privacy.clip_norm:g})"


def _with_planted(statement: PrivacyStatement, config: RunConfig) -> PrivacyStatement:
    """The statement of a run that was planted for an audit says so: its claim is for records that are nobody's too."""
    if not config.audit.plants:
        return statement
    said = (
        f"{_planted_in_words(config)}: whoever has the run's audit/ folder can measure what the adapter tells about "
        "them, and the copies of one secret are as many records"
    )
    return replace(statement, not_covered=(*statement.not_covered, said))


def _planted_in_words(config: RunConfig) -> str:
    return (
        f"records planted for an audit ({config.audit.canaries} canaries, {config.audit.secrets} secrets for each "
        "number of copies), which the adapter was trained on beside the clients' own"
    )


def _adapter_readme(statement: PrivacyStatement, config: RunConfig, base: str) -> str:
    audited = f"\nAn audit's object: {_planted_in_words(config)}.\n" if config.audit.plants else ""
    heading = f"# LoRA adapter of a fedpt-secure run\n\nBase model: {base} small LM.\n\n"
    return f"{heading}Privacy: {statement.claim()}\n{audited}"
