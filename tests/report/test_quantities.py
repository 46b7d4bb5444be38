"""Amounts as people write them: what is meant is understood, what is doubtful is refused."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedpt_secure.errors import ConfigError
from fedpt_secure.report.quantities import BYTE_UNITS, PERIODS, format_bytes, parse_bytes, parse_rate


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("512MB", 512_000_000),
        ("512MiB", 536_870_912),
        (" 1.5 GB ", 1_500_000_000),
        ("0.5kB", 500),
        ("1B", 1),
        ("10KB", 10_000),
    ],
)
def test_amounts(text, amount):
    assert parse_bytes(text) == amount


@pytest.mark.parametrize(("text", "daily"), [("10MB/day", 1e7), ("1kB/s", 86_400_000), ("70MB/week", 1e7)])
def test_rates(text, daily):
    assert parse_rate(text).bytes_per_day == pytest.approx(daily)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("512", "a number and a unit"),
        ("MB", "a number and a unit"),
        ("", "a number and a unit"),
        ("-5MB", "a number and a unit"),
        ("1e3MB", "a number and a unit"),
        ("nanMB", "a number and a unit"),
        ("5 MB extra", "a number and a unit"),
        ("٥MB", "a number and a unit"),
        ("5Mb", "is bits"),
        ("5mb", "is bits"),
        ("5XB", "'XB' is not one of"),
        ("0MB", "1 byte"),
        ("0.1B", "1 byte"),
        ("999999999999999999TB", "2^60"),
    ],
)
def test_what_is_no_amount_is_refused_with_the_rule(text, says):
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text)
    assert says in caught.value.message


@pytest.mark.parametrize("text", ["10MB", "10MB/", "10MB/year", "10MB/day/day", "/day", "10MB per day"])
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(ConfigError):
        parse_rate(text)


@given(st.integers(1, 10**6), st.sampled_from(sorted(BYTE_UNITS)), st.sampled_from(sorted(PERIODS)))
def test_whole_numbers_of_every_unit_are_exact(number, unit, period):
    amount = number * BYTE_UNITS[unit]
    if amount > 2**60:
        return
    assert parse_bytes(f"{number}{unit}") == parse_bytes(f" {number} {unit} ") == amount
    rate = parse_rate(f"{number}{unit}/{period}")
    assert (rate.bytes, rate.seconds) == (amount, PERIODS[period])


@given(st.text(max_size=30))
@example("1MB\n")
@example("１MB")
def test_any_text_gives_an_amount_or_a_config_error(text):
    for parse in (parse_bytes, parse_rate):
        with suppress(ConfigError):  # any other error fails the test
            parse(text)


@given(st.integers(1, 2**59))
def test_what_is_printed_as_enough_is_enough_and_within_one_per_cent(amount):
    printed = parse_bytes(format_bytes(amount))
    assert amount <= printed <= amount * 1.0101 + 1
