"""What parameters promise and cost, in numbers for people: the failure probabilities they reach, and bytes a client."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import comb, log2

from fedpt_secure.crypto import messages
from fedpt_secure.crypto.errors import ParameterError
from fedpt_secure.crypto.identities import SIGNATURE_BYTES
from fedpt_secure.crypto.key_agreement import PUBLIC_KEY_BYTES
from fedpt_secure.crypto.labels import DIGEST_BYTES
from fedpt_secure.crypto.packing import LARGEST_RING_BITS, SMALLEST_RING_BITS, packed_size
from fedpt_secure.crypto.parameters import GRINDING_BITS, SecureAggregationParameters, split_probability
from fedpt_secure.crypto.sealing import SEALED_BYTES
from fedpt_secure.crypto.shamir import SHARE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureProbabilities:
    """Upper bounds, as logarithms to base 2; None where the event cannot happen within the stated numbers.

    Attributes:
        split_log2: the server finds a graph on which it sees more than one sum over honest clients, in
            2^grinding_bits tries.
        neighbourhood_log2: it finds one on which some client's share holders give up both kinds of shares.
        lost_round_log2: a round has to be abandoned though no more clients vanished than stated, independently of the
            graph. Nothing is revealed.
    """

    split_log2: float | None
    neighbourhood_log2: float | None
    lost_round_log2: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientBytes:
    """Bytes of one client's messages in a round in which nobody drops out, by phase: up and down.

    Exact for the client with the highest position; others save up to four bytes a message.
    """

    up: dict[str, int]
    down: dict[str, int]

    @property
    def total_up(self) -> int:
        """All that the client sends."""
        return sum(self.up.values())

    @property
    def total_down(self) -> int:
        """All that it receives."""
        return sum(self.down.values())


def failure_probabilities(
    parameters: SecureAggregationParameters, *, dropouts: int, grinding_bits: int = GRINDING_BITS
) -> FailureProbabilities:
    """What `parameters` reach, from the same exact hypergeometric tails that chose them (bounds 1 to 3 there).

    Args:
        dropouts: d, clients that vanish or that the server calls lost.
        grinding_bits: log2 of the graphs that the server tries out; in the security bounds, not in correctness.
    """
    if parameters.degree is None:
        return FailureProbabilities(split_log2=None, neighbourhood_log2=None, lost_round_log2=None)
    n, k, t = parameters.cohort, parameters.degree, parameters.threshold
    corrupt = parameters.tolerated_corrupt_clients
    split = split_probability(n, corrupt, dropouts, k, t)
    neighbourhood = n * _tail(n - dropouts - 1, corrupt, k, parameters.tolerated_corruptions + 1, k)
    lost = n * _tail(n - 1, n - 1 - dropouts, k, 0, t - 1)
    return FailureProbabilities(
        split_log2=_log2(split, grinding_bits),
        neighbourhood_log2=_log2(neighbourhood, grinding_bits),
        lost_round_log2=_log2(lost, 0),
    )


def client_bytes(parameters: SecureAggregationParameters, *, elements: int, ring_bits: int = 32) -> ClientBytes:
    """What one client sends and receives, counted as `messages.encode` writes it.

    Args:
        elements: d of the vector.
        ring_bits: b.

    Raises:
        ParameterError: there is no such vector.
    """
    if elements < 1 or not SMALLEST_RING_BITS <= ring_bits <= LARGEST_RING_BITS:
        raise ParameterError(
            f"a vector of {elements} elements of {ring_bits} bits; it has at least one, "
            f"of {SMALLEST_RING_BITS} to {LARGEST_RING_BITS} bits"
        )
    n = parameters.cohort
    neighbours = n - 1 if parameters.degree is None else parameters.degree
    session, signature, members = bytes(DIGEST_BYTES), bytes(SIGNATURE_BYTES), bytes((n + 7) // 8)
    key, last = bytes(PUBLIC_KEY_BYTES), n - 1
    advertisement = messages.Advertisement(session, last, key, key, bytes(DIGEST_BYTES), signature)
    shares = messages.SealedShares(session, last, b"", signature)
    masked = messages.MaskedVector(session, last, members, memoryview(b""), signature)
    confirmation = messages.Confirmation(session, last, signature)
    unmasking = messages.Unmasking(session, last, b"", signature)
    up = {
        "advertise": _size(advertisement),
        "share": _size(shares, neighbours * SEALED_BYTES),
        "mask": _size(masked, packed_size(elements, ring_bits)),
        "confirm": _size(confirmation),
        "unmask": _size(unmasking, (neighbours + 1) * SHARE_BYTES),
    }
    down = {
        "share": _size(messages.KeyDirectory(session, members, b""), n * messages.ENTRY_BYTES),
        "mask": _size(messages.ShareInbox(session, members, b""), neighbours * SEALED_BYTES),
        "confirm": _size(messages.Survivors(session, members)),
        "unmask": _size(messages.Confirmations(session, members, b""), n * SIGNATURE_BYTES),
    }
    return ClientBytes(up=up, down=down)


def _size(message: messages.Message, body: int = 0) -> int:
    """Bytes of a message whose empty field will hold `body` bytes; MessagePack's length takes 1, 2 or 4 bytes."""
    growth = 0 if body < 1 << 8 else 1 if body < 1 << 16 else 3
    return len(messages.encode(message)) + body + growth


def _tail(population: int, marked: int, drawn: int, least: int, most: int) -> Fraction:
    """P[least <= X <= most] for X hypergeometric: marked members among `drawn` of `population`."""
    ways = sum(comb(marked, hits) * comb(population - marked, drawn - hits) for hits in range(least, most + 1))
    return Fraction(ways, comb(population, drawn))


def _log2(probability: Fraction, tries_log2: int) -> float | None:
    # Numerator and denominator are far beyond what a float holds; their logarithms are not.
    return log2(probability.numerator) - log2(probability.denominator) + tries_log2 if probability else None
