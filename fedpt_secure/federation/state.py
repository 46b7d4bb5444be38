"""What changes from round to round, and how it goes to and comes from the checkpoint."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass

import numpy as np

from fedpt_secure.config import RunConfig, build
from fedpt_secure.errors import RunDirectoryError
from fedpt_secure.federation.iterate_average import IterateAverage
from fedpt_secure.federation.run_directory import Checkpoint, RunDirectory, new_run_id
from fedpt_secure.federation.server_optimizer import ServerOptimizer
from fedpt_secure.lm.small import FloatVector, SmallLM


@dataclass(slots=True)
class RunState:
    """The run after `rounds_done` rounds; the adapter itself is loaded in the small LM.

    Attributes:
        average: of the iterates so far; what the run leaves behind.
        new: no checkpoint has been written yet.
        clip_norm: of the next round.
        seconds: wall time by phase of the run, restarts included.
    """

    run_id: bytes
    rounds_done: int
    optimizer: ServerOptimizer
    average: IterateAverage
    seconds: dict[str, float]
    clip_norm: float
    new: bool

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Count time spent."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


def released_adapter(checkpoint: Checkpoint, config: RunConfig) -> FloatVector:
    """What the run leaves behind at this checkpoint: the average of its iterates, or the last one (decay 0)."""
    average = IterateAverage(
        config.training.average_decay, checkpoint.tensors["average"], checkpoint.scalars["optimizer_steps"]
    )
    return average.value(checkpoint.tensors["adapter"].astype(np.float32))


def restore(directory: RunDirectory, config: RunConfig, data_digest: str, small: SmallLM) -> RunState:
    """The state after the last checkpoint, its adapter loaded, or the state before the first round.

    Args:
        data_digest: of the text that is trained on, or, where nobody has all of it, of who trains.

    Raises:
        RunDirectoryError: the checkpoint is damaged, or belongs to other settings, other text or another small LM.
    """
    training = config.training
    checkpoint = directory.load_checkpoint()
    if checkpoint is None:
        optimizer = ServerOptimizer.fresh(
            training.server_optimizer,
            learning_rate=training.server_learning_rate,
            momentum=training.server_momentum,
            dimension=small.dimension,
        )
        average = IterateAverage.fresh(training.average_decay, dimension=small.dimension)
        return RunState(new_run_id(), 0, optimizer, average, {}, config.privacy.clip_norm, new=True)
    _require_same(directory, checkpoint, config, data_digest, small)
    small.load_adapter_vector(checkpoint.tensors["adapter"])
    optimizer = ServerOptimizer(
        training.server_optimizer,
        training.server_learning_rate,
        training.server_momentum,
        checkpoint.tensors["first_moment"],
        checkpoint.tensors["second_moment"],
        checkpoint.tensors["seen"],
        int(checkpoint.scalars["optimizer_steps"]),
    )
    directory.cut_logs(checkpoint.rounds_done)
    return RunState(
        checkpoint.run_id,
        checkpoint.rounds_done,
        optimizer,
        IterateAverage(training.average_decay, checkpoint.tensors["average"], optimizer.steps),
        dict(checkpoint.scalars["seconds"]),
        checkpoint.scalars["clip_norm"],
        new=False,
    )


def save(directory: RunDirectory, state: RunState, config: RunConfig, data_digest: str, small: SmallLM) -> None:
    """Replace the checkpoint; the rounds done are done when this returns."""
    directory.save_checkpoint(
        Checkpoint(
            run_id=state.run_id,
            rounds_done=state.rounds_done,
            config_toml=config.to_toml(),
            data_digest=data_digest,
            model_digest=small.digest,
            tensors={
                "adapter": small.adapter_vector(),
                "first_moment": state.optimizer.first_moment,
                "second_moment": state.optimizer.second_moment,
                "seen": state.optimizer.seen,
                "average": state.average.total,
            },
            scalars={
                "optimizer_steps": state.optimizer.steps,
                "seconds": state.seconds,
                "clip_norm": state.clip_norm,
            },
        )
    )
    state.new = False


def _require_same(
    directory: RunDirectory, checkpoint: Checkpoint, config: RunConfig, data_digest: str, small: SmallLM
) -> None:
    started = build(RunConfig, tomllib.loads(checkpoint.config_toml))
    if differences := started.differences(config):
        raise RunDirectoryError(
            f"{directory.path} was started with other settings (there != here): {'; '.join(differences)}",
            hint="restore its config.toml, or start a new run",
        )
    for what, then, now in (
        ("text", checkpoint.data_digest, data_digest),
        ("small LM", checkpoint.model_digest, small.digest),
    ):
        if then != now:
            raise RunDirectoryError(
                f"{directory.path} was trained on another {what} than the one found now",
                hint="restore it, or start a new run",
            )
