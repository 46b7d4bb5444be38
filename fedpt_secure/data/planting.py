"""Records that an auditor plants among the clients' own: canaries with a coin each, and secrets that repeat.

A canary is one unit of the privacy statement: whether it is among its client's training records is decided by a fair
coin that nothing else depends on (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846). A secret is a number behind
a personal sentence, told once or several times (Carlini et al. 2019, "The Secret Sharer").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedpt_secure.data.records import FederatedText, Record
from fedpt_secure.errors import ConfigError, DataError

CANARY_WORDS = 16
"""Words of a canary: as long as a usual chat record."""
REPETITIONS = (1, 4, 16)
"""How often a secret stands in its client's records."""
SECRET_DIGITS = 4
"""Digits of a planted number; the space that a guess is drawn from has 10^4 of them."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A planted record and its coin.

    Attributes:
        client_id: whose record it is, if it is there.
        included: the coin.
    """

    client_id: str
    text: str
    included: bool


@dataclass(frozen=True, slots=True)
class Secret:
    """A planted personal record.

    Attributes:
        prefix: the sentence up to the number; what an extractor knows.
        number: `SECRET_DIGITS` random digits.
        copies: how often the record stands among its client's.
    """

    client_id: str
    prefix: str
    number: str
    copies: int

    @property
    def text(self) -> str:
        """The record."""
        return self.prefix + self.number


@dataclass(frozen=True, slots=True)
class Planted:
    """All that was planted into one run."""

    canaries: tuple[Canary, ...] = ()
    secrets: tuple[Secret, ...] = ()

    @property
    def items(self) -> tuple[Canary | Secret, ...]:
        """Everything, whatever its coin says."""
        return (*self.canaries, *self.secrets)


def make_canaries(
    count: int, client_ids: Sequence[str], words: Sequence[str], *, below: Callable[[int], int]
) -> tuple[Canary, ...]:
    """Draw canaries of random words, dealt to the clients in turn, each with a fair coin.

    Args:
        client_ids: of clients that are asked in some round.
        words: public ones.
        below: uniform random numbers below a bound; a cryptographic generator in every run that promises something.

    Raises:
        DataError: too few words for canaries that differ.
    """
    distinct = sorted(set(words))
    if len(distinct) < 100:
        raise DataError(f"{len(distinct)} different words are too few to make canaries of; 100 are needed")
    made: dict[str, Canary] = {}
    while len(made) < count:
        text = " ".join(distinct[below(len(distinct))] for _ in range(CANARY_WORDS))
        if text not in made:
            made[text] = Canary(client_ids[len(made) % len(client_ids)], text, included=bool(below(2)))
    return tuple(made.values())


def make_secrets(
    count: int, client_ids: Sequence[str], *, below: Callable[[int], int], seed: int
) -> tuple[Secret, ...]:
    """Invent people, `count` for each of `REPETITIONS`, with a random number each.

    Args:
        below: draws the numbers, as for canaries.
        seed: of the invented names; they are no secret.

    Raises:
        ConfigError: the package that invents people is not installed.
    """
    try:
        from faker import Faker
    except ImportError:
        raise ConfigError("planted secrets need the package faker", hint='pip install "fedpt-secure[audit]"') from None
    faker = Faker("en_US")
    faker.seed_instance(seed)
    made: dict[str, Secret] = {}
    for copies in REPETITIONS:
        wanted = len(made) + count
        while len(made) < wanted:
            prefix = f"my name is {faker.name()}, i live in {faker.city()} and my door code is "
            number = f"{below(10**SECRET_DIGITS):0{SECRET_DIGITS}d}"
            if prefix not in made:
                made[prefix] = Secret(client_ids[len(made) % len(client_ids)], prefix, number, copies)
    return tuple(made.values())


def plant(text: FederatedText, planted: Planted) -> FederatedText:
    """The text with the included canaries and all copies of the secrets at the end of their clients' training records.

    Raises:
        DataError: a planted record is one of the text's own, so that its coin would say nothing, or names no client.
    """
    added: dict[str, list[Record]] = {client_id: [] for client_id in text.client_ids}
    for owner in {item.client_id for item in planted.items} - added.keys():
        raise DataError(f"a planted record is for {owner!r}, who is no client of {text.name}")
    for canary in planted.canaries:
        if canary.included:
            added[canary.client_id].append(Record(canary.text))
    for secret in planted.secrets:
        added[secret.client_id] += [Record(secret.text)] * secret.copies
    _check_apart(text, planted)
    return FederatedText.of(
        text.name,
        f"{text.description}; with planted records for an audit",
        (dataclasses.replace(client, train=(*client.train, *added[client.client_id])) for client in text.clients),
        preparation=text.preparation,
    )


def _check_apart(text: FederatedText, planted: Planted) -> None:
    own = {record.key for client in text.clients for record in (*client.train, *client.held_out)}
    for item in planted.items:
        if Record(item.text).key in own:
            raise DataError("a planted record is already among the text's own; a new run draws new ones")


def by_client(planted: Planted) -> Mapping[str, tuple[Canary, ...]]:
    """Each client's canaries, in the order they were made."""
    found: dict[str, list[Canary]] = {}
    for canary in planted.canaries:
        found.setdefault(canary.client_id, []).append(canary)
    return {client_id: tuple(canaries) for client_id, canaries in found.items()}
