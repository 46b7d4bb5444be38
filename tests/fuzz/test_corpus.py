"""The fuzz targets on their committed inputs, without a fuzzer: every input is canonical or refused with a typed error.

Each input is also changed a few hundred times by a seeded generator. Planted bugs show that the replay would notice.
"""

from __future__ import annotations

import importlib
import random
import sys
import time
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from fedpt_secure.crypto import ParameterError, ckks_messages, context, identities, messages, packing, shamir

ROOT = Path(__file__).resolve().parents[2]
MUTATIONS = 250
FEWER = {"ckks-key": 40, "ckks-ciphertext": 150}
"""Where one input takes milliseconds: TenSEAL makes a context for every key."""
LARGEST_CORPUS = 200_000


def _fuzz(name):
    """`fuzz` is not installed; it lies at the root of the repository, which is not on the path of every runner."""
    sys.path.append(str(ROOT))
    try:
        return importlib.import_module(f"fuzz.{name}")
    finally:
        sys.path.remove(str(ROOT))


replaying, target_module = _fuzz("replay"), _fuzz("target")
TARGETS, Finding = replaying.TARGETS, target_module.Finding


@pytest.mark.parametrize("name", TARGETS)
def test_every_input_is_canonical_or_refused_with_a_typed_error(name):
    mutations = FEWER.get(name, MUTATIONS)
    result = replaying.replay(name, TARGETS[name], mutations=mutations)
    assert result.inputs == (mutations + 1) * len(replaying.inputs_of(name, TARGETS[name]))


@pytest.mark.parametrize("name", TARGETS)
def test_some_input_is_accepted(name):
    """Else the replay tests the refusal alone."""
    assert any(target_module.accepts(TARGETS[name], data) for data in replaying.inputs_of(name, TARGETS[name]))


def test_the_corpus_holds_the_seeds_of_the_golden_vectors():
    """After a change of formats: `python -m fuzz.replay`."""
    for name, target in _fuzz("protocol_targets").TARGETS.items():
        there = {path.name for path in (replaying.CORPUS / name).iterdir()}
        assert {replaying.file_name(seed) for seed in target.seeds()} <= there, name


def test_every_message_of_the_protocol_has_a_target():
    covered = {kind for kind, _ in _fuzz("protocol_targets").MESSAGES.values()}
    assert covered == set(get_args(messages.Message))
    kinds = {data[0] for data in _fuzz("ckks_targets").TARGETS["ckks-messages"].seeds()}
    assert kinds == set(range(len(get_args(ckks_messages.CkksMessage))))


def test_the_corpus_belongs_to_targets_and_is_small():
    committed = {name for name, target in TARGETS.items() if not target.seeds_change}
    assert {path.name for path in replaying.CORPUS.iterdir() if any(path.iterdir())} == committed
    assert sum(path.stat().st_size for path in replaying.CORPUS.rglob("*") if path.is_file()) < LARGEST_CORPUS


def test_mutations_repeat_themselves_and_change_something():
    mutate = _fuzz("mutations").mutate
    seeds = [path.read_bytes() for path in sorted(replaying.CORPUS.rglob("*")) if path.is_file()]
    once, again = ([mutate(seed, random.Random(5)) for seed in seeds] for _ in range(2))
    assert once == again
    assert sum(before != after for before, after in zip(seeds, once, strict=True)) > 0.9 * len(seeds)


def _takes_trailing_bytes(monkeypatch):
    strict = messages.decode

    def lax(encoded, *arguments, **settings):
        try:
            return strict(encoded, *arguments, **settings)
        except messages.MalformedMessage:
            return strict(encoded[:-1], *arguments, **settings)

    monkeypatch.setattr(messages, "decode", lax)


def _forgets_invalid_text(monkeypatch):
    """The first finding of this fuzzer, undone: `except UnicodeDecodeError` catches something else."""
    monkeypatch.setattr(context, "UnicodeDecodeError", KeyError, raising=False)


def _ignores_unused_bits(monkeypatch):
    strict = packing.unpack

    def lax(packed, length, ring_bits):
        used = length * ring_bits % 8
        if used and packed:
            packed = packed[:-1] + bytes([packed[-1] & (1 << used) - 1])
        return strict(packed, length, ring_bits)

    monkeypatch.setattr(packing, "unpack", lax)


def _takes_a_share_at_zero(monkeypatch):
    monkeypatch.setattr(shamir, "_check_points", lambda _points: None)


def _reduces_shares(monkeypatch):
    monkeypatch.setattr(shamir, "decode_share", lambda share: int.from_bytes(share, "big") % shamir.PRIME)


def _takes_any_json(monkeypatch):
    def lax(content, kinds, *, largest):
        (kind,) = kinds.values()
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise ParameterError("no JSON") from None

    monkeypatch.setattr(identities.strict_files, "from_json", lax)


def _takes_its_time(monkeypatch):
    strict = shamir.decode_share

    def slow(share):
        until = time.process_time() + 0.02
        while time.process_time() < until:
            pass
        return strict(share)

    monkeypatch.setattr(shamir, "decode_share", slow)
    monkeypatch.setattr(replaying, "SECONDS_AN_INPUT", 0.01)


@pytest.mark.parametrize(
    ("name", "plant", "said"),
    [
        ("survivors", _takes_trailing_bytes, "canonical"),
        ("masked-vector", _takes_trailing_bytes, "canonical"),
        ("context", _forgets_invalid_text, "UnicodeDecodeError"),
        ("packing", _ignores_unused_bits, "something else"),
        ("shamir", _takes_a_share_at_zero, "another secret|invertible"),
        ("share", _reduces_shares, "OverflowError|canonical"),
        ("roster", _takes_any_json, "canonical"),
        ("share", _takes_its_time, "processor time"),
    ],
)
def test_a_planted_bug_is_found(name, plant, said, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(Finding, match=said) as caught:
        replaying.replay(name, TARGETS[name], mutations=MUTATIONS)
    assert "input " in str(caught.value)
