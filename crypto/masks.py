"""The keys of a round's masks, for the client that adds them and for the server that takes the rest of them off."""

from __future__ import annotations

from fedpt_secure.crypto.context import RoundContext
from fedpt_secure.crypto.directory import Directory
from fedpt_secure.crypto.key_agreement import pair_mask_key, self_mask_key, shared_secret
from fedpt_secure.crypto.neighbours import mask_sign
from fedpt_secure.crypto.prg import SignedKey
from fedpt_secure.crypto.wiping import wipe


def self_mask(seed: bytearray, *, owner: int, directory: Directory, context: RoundContext) -> bytes:
    """The key of the mask that `owner` adds for itself, from its seed b_u."""
    return self_mask_key(
        seed,
        session_digest=context.session_digest,
        directory_digest=directory.digest,
        model_digest=context.model_digest,
        owner=context.cohort[owner],
    )


def pair_mask(private: bytearray, *, owner: int, peer: int, directory: Directory, context: RoundContext) -> SignedKey:
    """Sign and key of the mask that `owner` applies for `peer`, from its private key. The peer applies the opposite.

    Raises:
        UnsafePublicKey: the peer's public key has low order.
    """
    secret = shared_secret(private, directory.advertisements[peer].mask_key)
    key = pair_mask_key(
        secret,
        session_digest=context.session_digest,
        directory_digest=directory.digest,
        model_digest=context.model_digest,
        one=context.cohort[owner],
        other=context.cohort[peer],
    )
    wipe(secret)
    return mask_sign(owner, peer), key
