"""`RunConfig`: one validated, frozen description of a run; TOML in, TOML out.

Settings are checked once, here; the inside of the package trusts them. All errors are reported together.
"""

from fedpt_secure.config.data import DataConfig
from fedpt_secure.config.federation import (
    SMALLEST_COHORT,
    ClassesBy,
    FederationConfig,
    Tier,
    TrainingConfig,
    most_corrupt,
    withstood,
)
from fedpt_secure.config.models import ApiConfig, LoraSettings, ModelConfig
from fedpt_secure.config.privacy import SMALLEST_DELTA, PrivacyConfig, require_compatible
from fedpt_secure.config.proxy import (
    RESPONSE_SHARES,
    TEXT_SHARES,
    Alpha,
    EvaluationConfig,
    GenerateConfig,
    ProxyConfig,
    Shares,
    require_shares,
)
from fedpt_secure.config.run import AuditConfig, RunConfig, load, save
from fedpt_secure.config.settings import Count, Fraction, Positive, Seed, Settings, build, overlay, read_settings

__all__ = [
    "RESPONSE_SHARES",
    "SMALLEST_COHORT",
    "SMALLEST_DELTA",
    "TEXT_SHARES",
    "Alpha",
    "ApiConfig",
    "AuditConfig",
    "ClassesBy",
    "Count",
    "DataConfig",
    "EvaluationConfig",
    "FederationConfig",
    "Fraction",
    "GenerateConfig",
    "LoraSettings",
    "ModelConfig",
    "Positive",
    "PrivacyConfig",
    "ProxyConfig",
    "RunConfig",
    "Seed",
    "Settings",
    "Shares",
    "Tier",
    "TrainingConfig",
    "build",
    "load",
    "most_corrupt",
    "overlay",
    "read_settings",
    "require_compatible",
    "require_shares",
    "save",
    "withstood",
]
