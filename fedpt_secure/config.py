"""`RunConfig`: one validated, frozen description of a run; TOML in, TOML out.

Settings are checked once, here; the inside of the package trusts them. All errors are reported together.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedpt_secure import files
from fedpt_secure.crypto import default_threshold
from fedpt_secure.endpoint import Endpoint
from fedpt_secure.errors import ConfigError, PrivacyError, RunDirectoryError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Alpha = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
Shares = tuple[tuple[int, float], ...]
"""`(from_place, share)` with ascending places: how much the tuned small LM's own prediction counts from there on."""
_SettingsType = TypeVar("_SettingsType", bound="Settings")

SMALLEST_COHORT = 8
"""Clients that a default round sums at least, where there are so many."""

TEXT_SHARES: Shares = ((0, 0.95), (1, 0.5), (2, 0.7), (4, 0.6), (8, 0.25))
RESPONSE_SHARES: Shares = ((0, 0.5), (1, 0.3), (2, 0.15), (4, 0.2), (16, 0.15), (32, 0.1), (64, 0.05))
"""How much of a steered prediction is the tuned small LM's own, by place; chosen on public text only (docs/LOG.md)."""

SMALLEST_DELTA = 1e-12
"""The accountant truncates probability mass near 1e-15, so that it cannot tell much smaller deltas apart."""

_SHOWN_CHARACTERS = 80


def require_shares(shares: Shares) -> Shares:
    """Accept the places and shares of a steering rule (`proxy.steering`), unchanged.

    Raises:
        ValueError: a share is not a number from 0 to 1, or the places do not ascend from 0 or later.
    """
    places = [place for place, _ in shares]
    if any(place < 0 for place in places) or any(a >= b for a, b in pairwise(places)):
        raise ValueError(f"places must ascend, the first at least 0; given {places}")
    if wrong := [share for _, share in shares if not 0 <= share <= 1]:
        raise ValueError(f"a share must be from 0 to 1; given {wrong[0]:g}")
    return shares


_Share = Annotated[tuple[Annotated[int, Field(strict=True)], Annotated[float, Field(strict=True)]], Field(strict=False)]
_Shares = Annotated[tuple[_Share, ...], Field(strict=False), AfterValidator(require_shares)]


class Settings(BaseModel):
    """A frozen group of settings; an unknown key or a value of another type is an error, not a surprise later."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, strict=True)

    @field_validator("*")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        for text in value if isinstance(value, tuple) else (value,):
            # Bytes of the command line that are not UTF-8 come as lone surrogates, and no file could hold them.
            if isinstance(text, str) and any(
                character == "\0" or "\ud800" <= character <= "\udfff" for character in text
            ):
                raise ValueError("must be valid UTF-8 text without NUL")
        return value


class DataConfig(Settings):
    """Which text, whose it is, and what is held out."""

    source: str = "chitchat"
    """`chitchat`, `sotu`, a path (JSONL, CSV, Parquet, folder of text files) or a Hugging Face data set id."""
    client_column: str | None = None
    """Column that names the owner of a record."""
    text_column: str | None = None
    """Column with the text, where a record is one text."""
    prompt_column: str | None = None
    """Column with the prompt, where a record is a pair; loss on the response only."""
    response_column: str | None = None
    label_column: str | None = None
    """Column a Dirichlet partition skews by."""
    clients: Count | None = None
    """How many clients to deal the records to, where no column names them."""
    partition: Literal["equal", "dirichlet"] | None = None
    dirichlet_alpha: Positive | None = None
    """Concentration of the Dirichlet partition; small is uneven."""
    minimum_records: Annotated[int, Field(ge=2)] = 8
    """A client with fewer records (before the split) does not take part."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of each client's records kept from training for the final report."""
    maximum_records: Count | None = None
    """Read no more than this many records from the source (quick trials)."""

    @property
    def has_prompts(self) -> bool:
        """Whether a record is a prompt with its response, not one text."""
        return self.prompt_column is not None

    @model_validator(mode="after")
    def _pairs(self) -> DataConfig:
        if (self.prompt_column is None) != (self.response_column is None):
            raise ValueError("prompt_column and response_column go together")
        if self.text_column and self.prompt_column:
            raise ValueError("give text_column or prompt_column with response_column, not both")
        if (self.partition is None) != (self.clients is None):
            raise ValueError("partition and clients go together: --clients 10 --partition equal")
        if self.client_column and self.partition:
            raise ValueError("client_column already says whose a record is; partition would deal them again")
        if (self.partition == "dirichlet") != (self.dirichlet_alpha is not None):
            raise ValueError("dirichlet_alpha goes with partition dirichlet, and only with it")
        return self


class ModelConfig(Settings):
    """The two language models and where they run."""

    small: str = "builtin"
    """The proxy that clients tune: `builtin`, or a Transformers causal LM (directory or Hugging Face id)."""
    large: str | None = None
    """The black box: nothing for SmolLM2-135M-Instruct, a Transformers directory or Hugging Face id, or an API:
    `llama.cpp:http://127.0.0.1:8080`, `openai:https://host/v1#model-name` (`[api]` has its settings)."""
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:N` or `mps`."""
    context_length: Annotated[int, Field(ge=8, le=8192)] = 128
    """Records are cut to this many tokens."""
    training_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products in a client's training; `auto`: bfloat16 where the processor has it. Gradients are clipped in
    float64 either way, one example a pass (docs/dp_training.md)."""
    activation_cache_mb: Annotated[int, Field(ge=0, le=1_000_000)] = 512
    """Most memory for activations below the first trained module, which no step changes; 0 computes them anew."""

    @field_validator("large")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        try:
            Endpoint.parse(value or "")
        except ConfigError as error:
            raise ValueError(f"{error.message}; {error.hint}") from None
        return value

    @property
    def endpoint(self) -> Endpoint | None:
        """The API that the black box is behind, if it is."""
        return Endpoint.parse(self.large or "")


class ApiConfig(Settings):
    """How a black box behind an API is asked, where `models.large` names one. Keys are read from the environment."""

    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    """Folder with the `tokenizer.json` (and chat template) of the API's model; nothing for the built-in proxy's."""
    key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "FEDPT_API_KEY"
    """Environment variable that holds the key. Another vendor's variable is sent nowhere unless it is named here."""
    top_k: Annotated[int, Field(ge=0)] | None = None
    """Log-probabilities asked for a position; the rest is filled in by the small LM's shape. Nothing for what such an
    API usually grants, 0 for one that has none and is steered by its logit bias (`generate` only)."""
    candidates: Annotated[int, Field(ge=0, le=64)] | None = None
    """While decoding, so many favourites of the small LM are scored one by one where the API left them out; nothing for
    4 where the API can, else 0."""
    context_length: Annotated[int, Field(ge=8)] | None = None
    """Of the API's model, where the API does not tell."""
    plain_http: bool = False
    """Allow plain http to another machine, where everybody on the way reads prompts and key."""
    connect_timeout_s: Positive = 5.0
    read_timeout_s: Positive = 60.0
    """Longest silence within an answer."""
    total_timeout_s: Positive = 300.0
    """Of one attempt, however it drips."""
    attempts: Annotated[int, Field(ge=1, le=100)] = 4
    longest_wait_s: Positive = 60.0
    """Of a back-off, or of what a server asks for by Retry-After; a longer wish is an error."""
    requests_per_second: Positive | None = None
    concurrency: Annotated[int, Field(ge=1, le=256)] = 4
    """Requests under way at once."""


class LoraSettings(Settings):
    """Which weights of the small LM are trained: the B matrices of LoRA; A is public and frozen.

    With A frozen, averaging B over clients is exact (FFA-LoRA, Sun et al. 2024), and half as many
    parameters carry noise.
    """

    rank: Annotated[int, Field(ge=1, le=1024)] = 32
    scale: Positive = 2.0
    """Factor on the adapter's output (PEFT's `lora_alpha / r`)."""
    layers: Annotated[int, Field(ge=0, le=1000)] = 1
    """Train only the last this many layers; 0 for all."""
    modules: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = ("down_proj",)
    """Linear layers that get an adapter. Few trained parameters carry little noise (docs/LOG.md)."""
    directions: Literal["auto", "public", "random"] = "auto"
    """Where A comes from: principal directions of public text, or random; `auto`: public if the small LM has them."""
    whitening: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    """How much the weaker public directions are raised to the energy of the strongest: 0 not at all, 1 fully."""


class PrivacyConfig(Settings):
    """What is promised, and the mechanism's public constants."""

    mode: Literal["local", "distributed", "client"] = "local"
    """`local`: a record is protected, and each client's own noise suffices (no trust in anybody). `distributed`: a
    record is protected, by the noise of all honest survivors together. `client`: so is a whole client."""
    epsilon: Annotated[float, Field(gt=0)] = 4.0
    """The promise over the whole run, for a record, or in mode `client` for a client; `inf` trains without privacy."""
    budget_epsilon: Annotated[float, Field(gt=0)] | None = None
    """What a simulated client's owner allows over all runs, where it has no ledger yet; default: `epsilon`. A ledger
    that is there keeps its own budget."""
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 1e-5
    """Chance with which the promise may fail; at least `SMALLEST_DELTA`."""
    clip_norm: Positive = 0.1
    """L2 norm each record's gradient, or in mode `client` the whole update, is clipped to."""
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Public probability with which a client's record takes part in a step (Poisson sampling); 1 takes all, which
    gives small clients the most signal for their noise (docs/privacy.md). In mode `client`: with which a client of the
    cohort contributes to a round, by a coin that only it sees."""
    corrupt_fraction: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Modes `distributed` and `client`: share of a cohort that may collude with the server; their noise is not counted
    on."""
    clipping: Literal["fixed", "quantile"] = "fixed"
    """`quantile`: the clip norm follows a private quantile of the units' norms (modes `distributed` and `client`)."""
    clip_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    clip_learning_rate: Annotated[float, Field(gt=0, le=2)] = 0.2
    """Of the geometric update of an adaptive clip norm."""

    @model_validator(mode="after")
    def _sums_carry_the_count(self) -> PrivacyConfig:
        if self.mode == "local" and self.clipping != "fixed":
            raise ValueError(
                "clipping quantile needs a secure sum of noised counts: mode distributed or client, not local"
            )
        return self

    @field_validator("epsilon", "budget_epsilon")
    @classmethod
    def _not_nan(cls, value: float | None) -> float | None:
        if value is not None and math.isnan(value):
            raise ValueError("epsilon must be a number above 0, or inf for no privacy")
        return value

    @field_validator("delta")
    @classmethod
    def _accountable(cls, value: float) -> float:
        if value < SMALLEST_DELTA:
            raise ValueError(
                f"delta must be at least {SMALLEST_DELTA:g}, below which the accountant is not exact enough"
            )
        return value


class Tier(Settings):
    """What a client with few resources declares when it joins: never chosen from its data, and public."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    share: Annotated[float, Field(gt=0, le=1)]
    """Of the clients (simulation); the shares of all tiers add up to 1."""
    memory_mb: Count | None = None
    """What training may take beyond the program itself; a run that would take more is refused before it starts."""
    rank: Count | None = None
    """Columns of every B that it trains, the first ones; default: all of `lora.rank`."""
    layers: Count | None = None
    """It trains only the last this many of the layers that have an adapter; default: all of them."""


class FederationConfig(Settings):
    """Rounds, cohorts, and the failures that are simulated."""

    rounds: Annotated[int, Field(ge=1, le=100_000)] = 8
    cohort: Annotated[int, Field(ge=3, le=100_000)] | None = None
    """Clients per round; default: so many that everybody takes part once, but no fewer than `SMALLEST_COHORT`."""
    minimum_survivors: Annotated[int, Field(ge=2)] | None = None
    """A round with fewer survivors is aborted; default: the secret-sharing threshold, 2/3 of the cohort."""
    dropout: Fraction = 0.0
    """Chance that a client vanishes in a round, at a random phase (simulation)."""
    ledgers: Annotated[str, Field(min_length=1)] | None = None
    """Directory where the simulated clients' ledgers outlive the run, so that a second run on the same data spends from
    the same budgets; default: inside the run directory. Made absolute, so that no later run misses it."""
    aggregator: Literal["masks", "ckks"] = "masks"
    """How updates are summed: under pairwise masks, or under CKKS, where one colluding client breaks the privacy of all
    (docs/ckks.md)."""
    ring_bits: Annotated[int, Field(ge=16, le=32)] = 32
    """Bits of a ring element; at most 32 in mode `local`: a client adds its noise before the encoding, and the grid of
    a 64-bit ring is finer than the noise's own, so that rounding would no longer hide the floats behind it."""

    tiers: Annotated[tuple[Tier, ...], Field(strict=False)] = ()
    """Kinds of clients by what they can train; none: all train the whole adapter (docs/constrained_clients.md)."""

    @field_validator("tiers")
    @classmethod
    def _cover_everybody(cls, value: tuple[Tier, ...]) -> tuple[Tier, ...]:
        if value and abs(sum(tier.share for tier in value) - 1) > 1e-9:
            raise ValueError(f"the tiers' shares add up to {sum(tier.share for tier in value):g}, must be 1")
        if len({tier.name for tier in value}) < len(value):
            raise ValueError("two tiers have the same name")
        return value

    @field_validator("ledgers")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).expanduser().absolute())

    @property
    def agreed_cohort(self) -> int:
        """Clients per round, once it is settled (`RunConfig.for_population`).

        Raises:
            ConfigError: it is not settled yet.
        """
        if self.cohort is None:
            raise ConfigError("the cohort's size is not settled before the number of clients is known")
        return self.cohort

    @property
    def agreed_survivors(self) -> int:
        """Fewest survivors of a round whose sum is opened."""
        return self.minimum_survivors or default_threshold(self.agreed_cohort)


class TrainingConfig(Settings):
    """The optimisation, on both sides. None of it changes the privacy."""

    local_steps: Annotated[int, Field(ge=1, le=10_000)] = 1
    """DP-SGD steps a client makes per round."""
    local_learning_rate: Positive = 1.0
    normaliser: Positive = 16.0
    """Public constant that sums of gradients are divided by, whatever the client's record count."""
    layers_per_round: Count | None = None
    """Rounds train the adapted layers in blocks of this many, in turn from the top, and differentiate nothing below the
    block; default: every round trains all."""
    sampled_positions: Count | None = None
    """Most loss tokens of a record that a step looks at, chosen by the client, anew in each; default: all of them."""
    output_classes: Annotated[int, Field(ge=2)] | None = None
    """Classes that a step's softmax is over, beside each token's own: the most frequent half by public text, the rest
    a sample, drawn by the client anew in each step (docs/dp_training.md); default: the whole head."""
    server_optimizer: Literal["average", "momentum", "adam"] = "adam"
    """What the server makes of the mean update (post-processing): FedAvg, FedAvgM or FedAdam (Reddi et al. 2021)."""
    server_learning_rate: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 0.05
    server_warm_up: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Rounds, the first, over which the server's learning rate rises to its value."""
    server_cool_down: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    """Share of the rounds, at the end, over which it falls towards 0."""
    server_momentum: Fraction = 0.9
    average_decay: Fraction = 0.0
    """The released adapter is the exponential moving average of the server's iterates with this decay
    (post-processing); 0 releases the last one."""
    update_bound: Positive = 1.0
    """Each coordinate of a client's update is clipped to this before encoding."""


class ProxyConfig(Settings):
    """How the tuned small LM steers the black box, and FedPT's distillation between rounds."""

    alpha: Alpha = 0.5
    """Weight of the small LM's shift; the default was chosen on public text only (docs/LOG.md)."""
    shares: _Shares = TEXT_SHARES
    """Pairs `[from_place, share]`: from that place of a record's text on, the tuned small LM's own prediction has this
    share of the steered one (`proxy.steering`). Public constants, like alpha."""
    response_shares: _Shares = RESPONSE_SHARES
    """The same for responses to a prompt, which the large model has read, so that it needs the small one less."""
    distill_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of distillation on public text after each round; 0 switches it off."""
    distill_learning_rate: Positive = 1e-3
    distill_temperature: Positive = 1.0
    """Softens teacher and student while distilling."""
    distill_top_k: Count = 128
    """Classes of the black box's answers that are kept a position; the others share what is left."""


class EvaluationConfig(Settings):
    """The held-out report. It chooses nothing."""

    records: Annotated[int, Field(ge=10, le=1_000_000)] = 300
    """Held-out records scored by all four arms (a seeded sample)."""
    bootstrap_samples: Annotated[int, Field(ge=200)] = 2000


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


def require_compatible(aggregator: str, privacy_mode: str) -> None:
    """Accept a way to sum updates and a privacy mode whose proof holds with it.

    Under CKKS only `local` is: each client's update carries its own noise before it is encrypted, so that whatever
    happens to it is post-processing. The noise of the other modes exists in the exact sum in the ring only, and their
    proofs need that nobody, no client either, sees anything but that sum.

    Raises:
        PrivacyError: the proof does not hold.
    """
    if aggregator != "masks" and privacy_mode != "local":
        raise PrivacyError(
            f"privacy mode {privacy_mode!r} cannot go with aggregator {aggregator!r}: its noise is only in exact sums "
            "whose parts nobody sees",
            hint="--privacy local, or --aggregator masks",
        )


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


class GenerateConfig(Settings):
    """What `generate` is asked for."""

    prompt: str
    alpha: Alpha | None = None
    """Weight of the small LM's shift; nothing for the run's."""
    shares: _Shares | None = None
    """The tuned small LM's own share by place; nothing for the run's, an empty list for none."""
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 48
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0
    """0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the fewest most likely tokens with this mass."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from this many most likely tokens; 0 for all."""
    repetition_penalty: Annotated[float, Field(ge=1, le=10, allow_inf_nan=False)] = 1.0
    """Factor on the log-probabilities of tokens that were there before."""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=16, strict=False)] = ()
    """Strings that end the continuation, which does not hold them."""
    speculate: bool = False
    """Guess several tokens per call of the large LM; the output's distribution stays the same."""
    seed: Seed = 0
    """Of the sampling; the choice of a token is no secret."""

    @field_validator("temperature")
    @classmethod
    def _divides(cls, value: float) -> float:
        if 0 < value < 1e-3:
            raise ValueError("temperature must be 0 or from 0.001 to 100")
        return value


def build(settings: type[_SettingsType], values: Mapping[str, Any], *, command: str = "train") -> _SettingsType:
    """Validate settings, reporting every error at once.

    Args:
        settings: the group to build.
        values: nested as in `config.toml`; what is absent takes its default.
        command: whose help the hint names.

    Raises:
        ConfigError: one line naming each bad setting, what was given and the rule.
    """
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_one_line(error), hint=f"`fedpt-secure {command} --help` lists the settings") from None


def withstood(cohort: int) -> int:
    """Most colluding clients with which a malicious server still gets one sum a round (docs/protocol.md)."""
    return 2 * default_threshold(cohort) - cohort - 1


def most_corrupt(fraction: float, cohort: int) -> int:
    """A fraction of a cohort as a number of clients, rounded up."""
    return math.ceil(fraction * cohort - 1e-9)  # less what binary fractions are off by: 0.29 of 100 is 29


def overlay(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with some of them replaced.

    Raises:
        ConfigError: a group of settings in `changes` is something else in `values`.
    """
    merged = dict(values)
    for key, value in changes.items():
        if isinstance(value, Mapping):
            before = merged.get(key, {})
            if not isinstance(before, Mapping):
                raise ConfigError(f"{key}: must be a group of settings, given {_shown(before)}", hint=f"[{key}]")
            merged[key] = overlay(before, value)
        else:
            merged[key] = value
    return merged


def read_settings(path: Path) -> dict[str, Any]:
    """Some settings from a user's TOML file, not validated yet.

    Raises:
        ConfigError: the file cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the settings {str(path)!r}: {error.strerror or error}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"the settings {str(path)!r} are not TOML: {error}", hint="config.toml of a run shows how"
        ) from None


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


def _one_line(error: ValidationError) -> str:
    parts = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        given = "" if isinstance(item["input"], dict | BaseModel) else f", given {_shown(item['input'])}"
        parts.append(f"{where}: {item['msg'].removeprefix('Value error, ')}{given}".removeprefix(": "))
    return "; ".join(parts)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
