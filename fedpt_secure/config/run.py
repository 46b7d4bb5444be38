"""`RunConfig`: one run, wholly described; its file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import Field, model_validator

from fedpt_secure import files
from fedpt_secure.config.data import DataConfig
from fedpt_secure.config.federation import SMALLEST_COHORT, FederationConfig, TrainingConfig, most_corrupt
from fedpt_secure.config.models import ApiConfig, LoraSettings, ModelConfig
from fedpt_secure.config.privacy import PrivacyConfig, require_compatible
from fedpt_secure.config.proxy import EvaluationConfig, ProxyConfig
from fedpt_secure.config.settings import Seed, Settings, build
from fedpt_secure.errors import ConfigError, RunDirectoryError


class AuditConfig(Settings):
    """What is planted into the text, and kept, for a later `fedpt-secure audit`. None of it is part of the release.

    A run with planted records is an audit's object: its adapter has been trained on them too.
    """

    canaries: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Records of random words, dealt to the clients, each trained on or not by a fair coin of its own (docs/audits.md).
    The coins are kept for the auditor."""
    secrets: Annotated[int, Field(ge=0, le=1000)] = 0
    """Invented personal records with a secret number, this many for each of 1, 4 and 16 repetitions."""
    record_server_view: bool = False
    """Keep what the server receives: every client's masked vectors, byte for byte."""

    @property
    def plants(self) -> bool:
        """Whether records are added to the clients' own."""
        return bool(self.canaries or self.secrets)


class RunConfig(Settings):
    """One run, wholly described."""

    seed: Seed = 0
    """Fixes the data split, the cohorts and the public LoRA matrices; never keys, masks or noise."""
    insecure_deterministic: bool = False
    """Noise, sampling and rounding from the seed too, for debugging. Marks every artefact as not private."""
    data: DataConfig = DataConfig()
    models: ModelConfig = ModelConfig()
    api: ApiConfig = ApiConfig()
    lora: LoraSettings = LoraSettings()
    privacy: PrivacyConfig = PrivacyConfig()
    federation: FederationConfig = FederationConfig()
    training: TrainingConfig = TrainingConfig()
    proxy: ProxyConfig = ProxyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    audit: AuditConfig = AuditConfig()

    @model_validator(mode="after")
    def _canaries_are_units(self) -> RunConfig:
        if self.audit.canaries and self.privacy.mode == "client":
            raise ValueError(
                "audit.canaries are records, and in mode client the unit is a client: their coins would bound another "
                "epsilon than the one that is promised; plant them in mode local or distributed"
            )
        return self

    @model_validator(mode="after")
    def _proof_holds(self) -> RunConfig:
        require_compatible(self.federation.aggregator, self.privacy.mode)
        return self

    @model_validator(mode="after")
    def _prompts_travel_safely(self) -> RunConfig:
        endpoint = self.models.endpoint
        if endpoint is not None:
            try:
                endpoint.require_safe(plain_http=self.api.plain_http)
            except ConfigError as error:
                raise ValueError(f"models.large: {error.message}; {error.hint}") from None
        return self

    @model_validator(mode="after")
    def _one_step_a_sum(self) -> RunConfig:
        if self.privacy.mode == "distributed" and self.training.local_steps != 1:
            raise ValueError(
                "training.local_steps must be 1 in mode distributed: its noise exists in the sum only, and a client "
                "cannot take a second step from what it has not seen"
            )
        return self

    @model_validator(mode="after")
    def _tiers_are_parts(self) -> RunConfig:
        for tier in self.federation.tiers:
            if tier.rank is not None and tier.rank > self.lora.rank:
                raise ValueError(f"tier {tier.name!r} has rank {tier.rank}, above lora.rank {self.lora.rank}")
            if tier.layers is not None and self.training.layers_per_round is not None:
                raise ValueError(
                    f"tier {tier.name!r} chooses layers, and so does training.layers_per_round: in some rounds it "
                    "would train nothing, and pay for it"
                )
        return self

    def for_population(self, clients: int) -> RunConfig:
        """The configuration with the cohort settled for this many clients.

        Raises:
            ConfigError: too few clients for a cohort, or fewer in a cohort than must survive.
        """
        federation = self.federation
        cohort = federation.cohort or min(clients, max(SMALLEST_COHORT, clients // federation.rounds))
        if not 3 <= cohort <= clients:
            raise ConfigError(
                f"a cohort of {max(cohort, 3)} needs as many clients with enough records; the data has {clients}",
                hint="--cohort with a smaller number, or a smaller --minimum-records",
            )
        if federation.minimum_survivors is not None and federation.minimum_survivors > cohort:
            raise ConfigError(f"minimum_survivors {federation.minimum_survivors} is above the cohort of {cohort}")
        return self.model_copy(update={"federation": federation.model_copy(update={"cohort": cohort})})

    @property
    def corrupt_clients(self) -> int:
        """How many clients of a round may collude with the server without breaking modes `distributed` and `client`."""
        return most_corrupt(self.privacy.corrupt_fraction, self.federation.agreed_cohort)

    def to_toml(self) -> str:
        """The whole configuration, defaults included; absent optional settings are left out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def differences(self, other: RunConfig) -> list[str]:
        """Lines `section.field: ours != theirs`, for every setting in which two configurations differ."""
        ours, theirs = _flatten(self.model_dump()), _flatten(other.model_dump())
        return [f"{key}: {ours[key]!r} != {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]


def load(path: Path) -> RunConfig:
    """Read a run's TOML file.

    Raises:
        RunDirectoryError: no such file, or not TOML.
        ConfigError: a setting is not acceptable.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RunDirectoryError(f"cannot read configuration {path}: {error}") from error
    return build(RunConfig, values)


def save(config: RunConfig, path: Path) -> None:
    """Write a configuration as TOML, atomically."""
    files.write_text(path, config.to_toml())


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
