"""Masked vectors against uniform ones, and the difference of two rounds' masked vectors against uniform.

Statistics cannot prove secrecy: a generator with a short key passes them all. They catch masks that are missing,
narrow, used twice or correlated with what they hide, and every one of these faults is planted here and must be caught.

False alarms: each of the 48 tests of a 32-bit sample (66 of a 50-bit one) rejects a uniform one with probability
1e-7 at most. Fifteen samples of a sound build are tested with fresh keys, so that it fails here by chance with a
probability below 1e-4 a run (a union bound: the tests are not independent).
"""

import warnings

import numpy as np
import pytest
from scipy import stats

from fedpt_secure.crypto import client as client_module
from fedpt_secure.crypto import masks as masks_module
from fedpt_secure.crypto import messages as m
from fedpt_secure.crypto.packing import unpack
from fedpt_secure.crypto.prg import apply_masks

LENGTH = 100_000
FALSE_ALARM = 1e-7


def p_values(sample, plain, bits):
    """By name: p-values of tests that `sample` is uniform in Z_{2^bits} and owes nothing to `plain`."""
    wide = sample.astype(np.uint64)
    top, bottom = wide >> np.uint64(bits - 8), wide & np.uint64(255)
    found = {
        "top byte, chi-square": stats.chisquare(np.bincount(top.astype(int), minlength=256)).pvalue,
        "bottom byte, chi-square": stats.chisquare(np.bincount(bottom.astype(int), minlength=256)).pvalue,
        "distribution, Kolmogorov-Smirnov": stats.kstest(wide / 2.0**bits, "uniform").pvalue,
        "order of the plaintext, Spearman": stats.spearmanr(wide, plain).pvalue,
        "neighbours, Spearman at lag 1": stats.spearmanr(wide[1:], wide[:-1]).pvalue,
        "values seen twice": stats.poisson.sf(wide.size - np.unique(wide).size - 1, wide.size**2 / 2 ** (bits + 1)),
    }
    for bit in range(bits):
        ones = int(np.count_nonzero(wide >> np.uint64(bit) & np.uint64(1)))
        found[f"bit {bit}, binomial"] = stats.binomtest(ones, wide.size).pvalue
    for bit in range(int(plain.max()).bit_length()):
        shifted = (wide ^ plain.astype(np.uint64)) >> np.uint64(bit)
        differ = int(np.count_nonzero(shifted & np.uint64(1)))
        found[f"bit {bit} against the plaintext's, binomial"] = stats.binomtest(differ, wide.size).pvalue
    # A constant sample has no ranks to correlate; SciPy then returns NaN, which must count as an alarm.
    return {name: 0.0 if np.isnan(value) else float(value) for name, value in found.items()}


def alarms(sample, plain, bits=32):
    """The tests that find the sample not to be uniform."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return [name for name, value in p_values(sample, plain, bits).items() if value < FALSE_ALARM]


PLAIN = np.arange(LENGTH, dtype=np.uint32) % np.uint32(1000)
"""Small and very regular: a mask that hides it poorly shows."""


def masked_in_two_rounds(cohort, *, bits=32, degree=None, dropped=()):
    """What client 0 sends in two rounds over the same plain vector, as the server reads it."""
    dtype = np.uint32 if bits <= 32 else np.uint64
    seen = []
    for number in range(2):
        more = {} if degree is None else {"degree": degree, "threshold": degree // 2 + 1, "minimum_survivors": 6}
        context = cohort.context(round_index=number, vector_length=LENGTH, ring_bits=bits, **more)
        a_round = cohort.round(context)
        a_round.vectors = dict.fromkeys(cohort.ids, PLAIN.astype(dtype))
        a_round.advertise().share([name for name in cohort.ids if name not in dropped])
        sent = a_round.clients[cohort.ids[0]].mask(a_round.inboxes[cohort.ids[0]], PLAIN.astype(dtype))
        vector = m.decode(sent, m.MaskedVector, context, body_bytes=9 * LENGTH).vector
        seen.append(unpack(vector, LENGTH, bits))
    return seen


def difference(first, second, bits):
    return (second - first) & second.dtype.type((1 << bits) - 1)


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (3, {}),
        (2, {}),
        (3, {"bits": 20}),
        (3, {"bits": 50}),
        (8, {"degree": 4, "dropped": ("client-05",)}),
    ],
    ids=["three clients", "two clients", "20 bits", "50 bits", "sparse graph with a dropout"],
)
def test_a_masked_vector_and_the_difference_of_two_look_uniform(make_cohort, size, settings):
    bits = settings.get("bits", 32)
    first, second = masked_in_two_rounds(make_cohort(size), **settings)
    assert alarms(first, PLAIN, bits) == []
    assert alarms(second, PLAIN, bits) == []
    assert alarms(difference(first, second, bits), PLAIN, bits) == []


def test_true_uniform_samples_raise_no_alarm():
    """The tests themselves: 8 samples of a good generator, fixed seed."""
    generator = np.random.default_rng(20)
    for _ in range(8):
        assert alarms(generator.integers(0, 2**32, LENGTH, dtype=np.uint32), PLAIN) == []


def _only_masks(monkeypatch, keep):
    """A client that applies only the masks that `keep(position, mask)` lets through; the self mask comes first."""

    def partial(vector, masks, *, workers):
        apply_masks(vector, [mask for place, mask in enumerate(masks) if keep(place, mask)], workers=workers)

    monkeypatch.setattr(client_module, "apply_masks", partial)


def _keys_of_every_round_alike(monkeypatch):
    """Masks that do not depend on the round: the nonce that was forgotten."""

    def repeated(vector, masks, *, workers):
        alike = [(sign, bytes([number]) * 32) for number, (sign, _) in enumerate(masks)]
        apply_masks(vector, alike, workers=workers)

    monkeypatch.setattr(client_module, "apply_masks", repeated)


def test_masks_that_are_used_again_are_caught_by_the_difference_alone(make_cohort, monkeypatch):
    """Each masked vector by itself looks perfect."""
    _keys_of_every_round_alike(monkeypatch)
    first, second = masked_in_two_rounds(make_cohort(3))
    assert alarms(first, PLAIN) == []
    assert "values seen twice" in alarms(difference(first, second, 32), PLAIN)


def test_no_masks_at_all_are_caught(make_cohort, monkeypatch):
    _only_masks(monkeypatch, lambda place, mask: False)
    first, _ = masked_in_two_rounds(make_cohort(3))
    assert len(alarms(first, PLAIN)) > 20


def test_a_missing_self_mask_is_caught_once_the_pairwise_masks_are_known(make_cohort, monkeypatch):
    """The delay attack leaves the server with all pairwise masks of a client. What is left must still look uniform.

    With the self mask in place it does; without, it is the plain vector.
    """
    cohort = make_cohort(3)
    for self_mask_is_there in (True, False):
        known = []

        def recording(vector, masks, *, workers, known=known, self_mask_is_there=self_mask_is_there):
            known[:] = masks[1:]
            apply_masks(vector, masks if self_mask_is_there else masks[1:], workers=workers)

        monkeypatch.setattr(client_module, "apply_masks", recording)
        _, second = masked_in_two_rounds(cohort)
        apply_masks(second, [(-sign, key) for sign, key in known])
        found = alarms(second, PLAIN)
        assert (found == []) if self_mask_is_there else (len(found) > 20)


@pytest.mark.parametrize("bit", [31, 0])
def test_a_mask_of_31_bits_is_caught(make_cohort, monkeypatch, bit):
    """As from a signed generator, or one that never sets its last bit, so that this bit of the vector is in sight."""

    def narrow(vector, masks, *, workers):
        mask = np.zeros_like(vector)
        apply_masks(mask, masks, workers=workers)
        vector += mask & ~np.uint32(1 << bit)

    monkeypatch.setattr(client_module, "apply_masks", narrow)
    first, _ = masked_in_two_rounds(make_cohort(3))
    caught_by = {31: "bit 31, binomial", 0: "bit 0 against the plaintext's, binomial"}
    assert caught_by[bit] in alarms(first, PLAIN)


def test_a_mask_that_repeats_along_the_vector_is_caught(make_cohort, monkeypatch):
    """One block of keystream over and over: a counter that is never advanced."""

    def repeating(vector, masks, *, workers):
        block = np.zeros(4, dtype=vector.dtype)
        apply_masks(block, masks, workers=workers)
        vector += np.resize(block, vector.size)

    monkeypatch.setattr(client_module, "apply_masks", repeating)
    first, _ = masked_in_two_rounds(make_cohort(3))
    assert "values seen twice" in alarms(first, PLAIN)


def test_a_mask_missing_from_one_element_in_twenty_is_caught(make_cohort, monkeypatch):
    def leaky(vector, masks, *, workers):
        plain = vector.copy()
        apply_masks(vector, masks, workers=workers)
        vector[::20] = plain[::20]

    monkeypatch.setattr(client_module, "apply_masks", leaky)
    first, _ = masked_in_two_rounds(make_cohort(3))
    assert "top byte, chi-square" in alarms(first, PLAIN)


def test_masks_of_the_wrong_sign_are_no_matter_of_statistics(make_cohort, monkeypatch):
    """What these tests cannot see, for the record: masks that do not cancel look as uniform as those that do.

    The algebra is tested elsewhere: every round's sum is compared with the plain one.
    """
    monkeypatch.setattr(masks_module, "mask_sign", lambda owner, peer: 1)
    first, _ = masked_in_two_rounds(make_cohort(3))
    assert alarms(first, PLAIN) == []
