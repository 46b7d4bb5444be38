"""A malicious server that remembers everything, and opens whatever that allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from fedpt_secure.attacks.protocol.cohort import Round
from fedpt_secure.crypto import RingVector, Roster, ring_dtype
from fedpt_secure.crypto import messages as m
from fedpt_secure.crypto.directory import Directory
from fedpt_secure.crypto.key_agreement import pair_mask_key, self_mask_key, shared_secret
from fedpt_secure.crypto.neighbours import mask_sign, share_point
from fedpt_secure.crypto.packing import unpack
from fedpt_secure.crypto.prg import apply_masks
from fedpt_secure.crypto.shamir import SHARE_BYTES, reconstruct


class Adversary:
    """A server that keeps everything it sees and computes whatever that allows."""

    def __init__(self, a_round: Round, roster: Roster) -> None:
        self.round = a_round
        self.context = a_round.context
        self.directory = Directory.from_bytes(a_round.directory, self.context, roster)
        self.seed_shares: dict[int, dict[int, bytes]] = {owner: {} for owner in self.directory.members}
        self.key_shares: dict[int, dict[int, bytes]] = {owner: {} for owner in self.directory.members}

    def survivor_list(self, names: Iterable[str]) -> bytes:
        positions = [self.context.index_of(name) for name in names]
        return m.encode(
            m.Survivors(session=self.context.session_digest, survivors=m.encode_set(positions, self.context))
        )

    def confirmations(self, signatures: Mapping[str, bytes]) -> bytes:
        positions = sorted(self.context.index_of(name) for name in signatures)
        return m.encode(
            m.Confirmations(
                session=self.context.session_digest,
                confirmed=m.encode_set(positions, self.context),
                signatures=b"".join(signatures[self.context.cohort[position]] for position in positions),
            )
        )

    def confirm(self, name: str, names: Iterable[str]) -> bytes:
        """Show `name` a list of survivors and take its signature."""
        answer = self.round.clients[name].confirm(self.survivor_list(names))
        return m.decode(answer, m.Confirmation, self.context).signature

    def unmask(self, name: str, names: Iterable[str], signatures: Mapping[str, bytes]) -> None:
        """Show `name` signatures on the list it saw and file the shares it releases."""
        answer = self.round.clients[name].unmask(self.confirmations(signatures))
        shares = m.decode(answer, m.Unmasking, self.context, body_bytes=1 << 16).shares
        records = m.split_records(shares, count=len(self.directory.members), size=SHARE_BYTES, what="shares")
        for owner, share in zip(self.directory.members, records, strict=True):
            kind = self.seed_shares if self.context.cohort[owner] in names else self.key_shares
            kind[owner][share_point(self.context.index_of(name))] = share

    def open(self, names: Sequence[str]) -> RingVector:
        """The sum over `names` from what was filed; needs their seeds and everybody else's mask keys."""
        chosen = {self.context.index_of(name) for name in names}
        bits, length = self.context.ring_bits, self.context.vector_length
        common = {
            "session_digest": self.context.session_digest,
            "directory_digest": self.directory.digest,
            "model_digest": self.context.model_digest,
        }
        total: RingVector = np.zeros(length, dtype=ring_dtype(bits))
        masks: list[tuple[Literal[1, -1], bytes]] = []
        for name in names:
            sent = m.decode(self.round.sent["mask"][name], m.MaskedVector, self.context, body_bytes=1 << 20)
            total = total + unpack(sent.vector, length, bits)
            owner = self.context.index_of(name)
            seed = reconstruct(self.seed_shares[owner], threshold=self.context.threshold)
            masks.append((-1, self_mask_key(seed, owner=name, **common)))
        for other in self.directory.members:
            if other in chosen:
                continue
            private = reconstruct(self.key_shares[other], threshold=self.context.threshold)
            for owner in chosen:
                secret = shared_secret(private, self.directory.advertisements[owner].mask_key)
                one, two = self.context.cohort[other], self.context.cohort[owner]
                masks.append((mask_sign(other, owner), pair_mask_key(secret, one=one, other=two, **common)))
        apply_masks(total, masks)
        return total
