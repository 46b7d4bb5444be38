"""Amounts as people write them: `512MB`, `1.5 GiB`, `10MB/day`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from fedpt_secure.errors import ConfigError

BYTE_UNITS = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
"""Bytes of a unit. A lower-case b is a bit elsewhere, so `Mb` is refused rather than guessed."""
PERIODS = {"s": 1, "min": 60, "h": 3600, "hour": 3600, "day": 86_400, "week": 604_800, "month": 2_592_000}
"""Seconds of a period; a month has 30 days."""

_LARGEST_BYTES = 2**60
_AMOUNT = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]{1,3})\s*", re.ASCII)
_SHOWN = 40


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes in a period.

    Attributes:
        bytes: in the period.
        seconds: of the period.
    """

    bytes: int
    seconds: int

    @property
    def bytes_per_day(self) -> float:
        """The same by day."""
        return self.bytes * PERIODS["day"] / self.seconds


def parse_bytes(text: str) -> int:
    """An amount of bytes, rounded down: `512MB` (10^6), `512MiB` (2^20).

    Raises:
        ConfigError: not a positive number followed by one of `BYTE_UNITS`, or more than 2^60 bytes.
    """
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"{_shown(text)} is not an amount of bytes: a number and a unit", hint="such as 512MB, 1.5GB or 256MiB"
        )
    number, unit = match.groups()
    if unit not in BYTE_UNITS:
        bits = f"; {unit} is bits, 8 to a byte" if unit.endswith("b") and unit[:-1].upper() + "B" in BYTE_UNITS else ""
        raise ConfigError(
            f"{_shown(text)}: {unit!r} is not one of {', '.join(BYTE_UNITS)}{bits}", hint="such as 512MB or 256MiB"
        )
    amount = int(Decimal(number) * BYTE_UNITS[unit])
    if not 1 <= amount <= _LARGEST_BYTES:
        raise ConfigError(f"{_shown(text)} is not from 1 byte to 2^60 bytes")
    return amount


def parse_rate(text: str) -> Rate:
    """Bytes in a period: `10MB/day`, `64kB/s`.

    Raises:
        ConfigError: not an amount of bytes, a slash and one of `PERIODS`.
    """
    amount, slash, period = text.partition("/")
    if not slash or period.strip() not in PERIODS:
        raise ConfigError(
            f"{_shown(text)} is not bytes in a period: an amount, a slash and one of {', '.join(PERIODS)}",
            hint="such as 10MB/day",
        )
    return Rate(parse_bytes(amount), PERIODS[period.strip()])


def format_bytes(amount: float) -> str:
    """Three digits and a decimal unit, rounded up: what is printed as enough is enough."""
    unit = next((unit for unit in ("TB", "GB", "MB", "kB") if amount >= BYTE_UNITS[unit]), "B")
    scaled = amount / BYTE_UNITS[unit]
    factor = 10 ** max(0, 3 - len(str(int(scaled)))) if unit != "B" else 1
    return f"{math.ceil(scaled * factor) / factor:g}{unit}"


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
