"""A validated, frozen group of settings: its base class, how it is built, and how TOML becomes one."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedpt_secure.errors import ConfigError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
_SettingsType = TypeVar("_SettingsType", bound="Settings")

_SHOWN_CHARACTERS = 80


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
