"""Encrypted sums: exact within their bound, and published only with noise that hides the key's traces."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpt_secure.crypto import CkksParameters, CkksUnavailable, EncodingError, KeyRejected, MalformedMessage
from fedpt_secure.crypto import ckks as primitive
from fedpt_secure.crypto.ckks import CkksKey, EncryptedSum, flooded, unflooded

pytest.importorskip("tenseal")

PARAMETERS = CkksParameters.fitted(cohort=5, bound=1.0, length=3000)
NOISE_KEY = b"k" * 32


@pytest.fixture(scope="module")
def key():
    return CkksKey.generate(PARAMETERS)


def vectors(count, seed=1, parameters=PARAMETERS):
    """Test data, nothing secret."""
    generator = np.random.default_rng(seed)
    return generator.uniform(-parameters.bound, parameters.bound, (count, parameters.length))


def encrypted_sum(key, rows, parameters=PARAMETERS):
    total = EncryptedSum(parameters)
    for row in rows:
        total.add(key.encrypt(row))
    return total.to_bytes()


@pytest.mark.parametrize(
    ("degree", "prime_bits"), [(4096, (60, 20)), (4096, (46, 46, 17)), (8192, (60, 40, 40, 60)), (8192, (60, 20))]
)
@pytest.mark.parametrize("bound", [1.0, 0.37, 40.0])
def test_a_sum_is_exact_within_its_error_bound(degree, prime_bits, bound):
    """60 sums in all would pass the bound with probability below 60 * 2^-39."""
    parameters = CkksParameters.fitted(cohort=5, bound=bound, length=2500, degree=degree, prime_bits=prime_bits)
    key = CkksKey.generate(parameters)
    for seed in range(5):
        rows = vectors(5, seed, parameters)
        decrypted = key.decrypt(encrypted_sum(key, rows, parameters))
        scheme = parameters.lattice_error * 12 + parameters.rounding_error
        assert np.abs(decrypted - rows.sum(axis=0)).max() <= scheme
        published = unflooded(flooded(decrypted, parameters, key=bytes([seed]) * 32), parameters)
        assert np.abs(published - rows.sum(axis=0)).max() <= parameters.error_bound


def test_the_bound_itself_may_be_reached_by_everybody(key):
    rows = np.full((5, PARAMETERS.length), -1.0)
    assert np.abs(key.decrypt(encrypted_sum(key, rows)) + 5).max() < 1e-9


def test_one_vector_too_many_wraps():
    """The overflow bound has teeth: past it, the sum is another one."""
    parameters = CkksParameters.fitted(cohort=5, bound=1.0, length=2048)
    key = CkksKey.generate(parameters)
    total = EncryptedSum(parameters)
    ciphertexts = key.encrypt(np.ones(2048))
    for _ in range(20):
        total.add(ciphertexts)
    assert np.abs(key.decrypt(total.to_bytes()) - 20).max() > 1


def test_the_lattice_error_has_the_deviation_that_the_flooding_is_sized_for():
    """10,240 samples: the estimate is within 5 % of 42/4 + 1/12 a coefficient, 7 standard errors; false alarm 3e-12.
    A smaller assumed variance would make the noise too small, a public-key encryption the errors 70 times larger."""
    parameters = CkksParameters(cohort=5, bound=1.0, length=2048, scale_bits=40, flooding_bits=16)
    key = CkksKey.generate(parameters)
    zeros = np.zeros((5, 2048))
    errors = np.concatenate([key.decrypt(encrypted_sum(key, zeros, parameters)) for _ in range(5)])
    measured = errors.std() * parameters.scale
    expected = np.sqrt(parameters.slots * 5 * 42 / 4)
    assert abs(measured / expected - 1) < 0.05
    assert measured < parameters.lattice_error * parameters.scale * 1.05


def test_size_and_memory_of_a_sum_do_not_grow_with_the_vectors_in_it(key):
    sizes = [sum(map(len, encrypted_sum(key, vectors(count)))) for count in (1, 5)]
    assert abs(sizes[0] - sizes[1]) < 200
    total = EncryptedSum(PARAMETERS)
    for row in vectors(5):
        total.add(key.encrypt(row))
        assert len(total._total) == PARAMETERS.ciphertexts


def test_a_key_survives_its_encoding_and_keys_differ(key):
    encoded = key.to_bytes()
    assert len(encoded) <= PARAMETERS.largest_key_bytes
    again = CkksKey.from_bytes(encoded, PARAMETERS)
    (row,) = vectors(1)
    assert (again.decrypt(key.encrypt(row)) == again.decrypt(key.encrypt(row))).mean() < 0.5
    ciphertexts = key.encrypt(row)
    assert (again.decrypt(ciphertexts) == key.decrypt(ciphertexts)).all()
    assert CkksKey.generate(PARAMETERS).to_bytes() != encoded


def test_under_another_key_a_sum_is_noise(key):
    (row,) = vectors(1)
    other = CkksKey.generate(PARAMETERS)
    decrypted = other.decrypt(key.encrypt(row))
    assert np.abs(decrypted).mean() > 1
    with pytest.raises(EncodingError, match="beyond"):
        flooded(decrypted, PARAMETERS, key=NOISE_KEY)


def test_encryption_is_randomised(key):
    (row,) = vectors(1)
    assert key.encrypt(row) != key.encrypt(row)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(2999),
        np.zeros((3000, 1)),
        np.zeros(3000, dtype=np.float32),
        np.full(3000, np.nan),
        np.full(3000, np.inf),
        np.full(3000, 1.0000001),
    ],
)
def test_what_cannot_be_encoded_is_refused(key, values):
    with pytest.raises(EncodingError):
        key.encrypt(values)


def test_ciphertexts_of_other_parameters_are_refused(key):
    (row,) = vectors(1)
    for changes in ({"scale_bits": PARAMETERS.scale_bits - 1}, {"prime_bits": (58, 20), "scale_bits": 40}):
        settings_ = {
            "cohort": 5,
            "bound": 1.0,
            "length": 3000,
            "scale_bits": PARAMETERS.scale_bits,
            "flooding_bits": 16,
        }
        other = CkksParameters(**settings_ | changes)
        with pytest.raises(MalformedMessage):
            EncryptedSum(PARAMETERS).add(CkksKey.generate(other).encrypt(row))


def test_too_few_or_too_many_ciphertexts_are_refused(key):
    ciphertexts = key.encrypt(vectors(1)[0])
    for wrong in (ciphertexts[:1], ciphertexts * 2, []):
        with pytest.raises(MalformedMessage, match="a vector has 2"):
            EncryptedSum(PARAMETERS).add(wrong)
        with pytest.raises(MalformedMessage, match="a vector has 2"):
            key.decrypt(wrong)


def test_a_refused_vector_leaves_the_sum_unchanged(key):
    rows = vectors(2)
    total = EncryptedSum(PARAMETERS)
    total.add(key.encrypt(rows[0]))
    before = total.to_bytes()
    with pytest.raises(MalformedMessage):
        total.add([key.encrypt(rows[1])[0], b"garbage"])
    assert total.to_bytes() == before


def test_tensesals_own_fields_around_a_ciphertext_are_checked(key):
    """TenSEAL reads memory by the sizes it is told, and believes the scale it is told."""
    (first, _) = key.encrypt(vectors(1)[0])
    # A later field overrules an earlier one, and lists go on: sizes (1), ciphertexts (2), scale (3).
    for tail in (b"\x08\x01", b"\x0a\x02\x80\x10", b"\x12\x00", b"\x19" + b"\0" * 8, b"\x20\x01"):
        with pytest.raises(MalformedMessage):
            EncryptedSum(PARAMETERS).add([first + tail, first])


@pytest.fixture(scope="module")
def encodings(key):
    """A ciphertext and a key in their wire form, with what reads each and writes it again."""

    def read_ciphertext(encoded):
        total = EncryptedSum(PARAMETERS)
        total.add([encoded, ciphertexts[1]])
        return total.to_bytes()[0]

    ciphertexts = key.encrypt(vectors(1)[0])
    read_key = lambda encoded: CkksKey.from_bytes(encoded, PARAMETERS).to_bytes()  # noqa: E731
    return ((ciphertexts[0], read_ciphertext), (key.to_bytes(), read_key))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_corrupted_bytes_give_typed_errors_or_are_the_one_encoding_of_something_else(data, encodings):
    """CKKS ciphertexts are malleable: another word below the prime is another ciphertext. Signatures see to that."""
    good, read = data.draw(st.sampled_from(encodings))
    place = data.draw(st.one_of(st.integers(0, 80), st.integers(0, len(good) - 1)))
    bad = bytearray(good)
    bad[place] ^= data.draw(st.integers(1, 255))
    bad = bytes(bad)[: data.draw(st.sampled_from([None, place]))]
    try:
        again = read(bad)
    except (MalformedMessage, KeyRejected):
        return
    assert again == bad


@pytest.mark.parametrize("content", [b"", b"\0", b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", bytes(70000)])
def test_garbage_is_no_ciphertext_and_no_key(key, content):
    with pytest.raises(MalformedMessage):
        EncryptedSum(PARAMETERS).add([content, content])
    with pytest.raises(MalformedMessage):
        key.decrypt([content, content])
    with pytest.raises(KeyRejected):
        CkksKey.from_bytes(content, PARAMETERS)


def test_a_dealt_key_cannot_bring_parameters_of_its_own(key):
    """Only the key's bytes get into the context: fields that follow them would overrule the receiver's own."""
    foreign = CkksKey.generate(CkksParameters.fitted(cohort=5, bound=1.0, length=3000, degree=8192))
    for content in (foreign.to_bytes(), foreign._context.serialize(save_secret_key=True), key._context.serialize()):
        with pytest.raises(KeyRejected):
            CkksKey.from_bytes(content, PARAMETERS)


def test_flooding_is_the_same_for_the_same_key_and_another_for_another(key):
    values = vectors(1)[0]
    first = flooded(values, PARAMETERS, key=NOISE_KEY)
    assert first.dtype == np.int32
    assert (first == flooded(values.copy(), PARAMETERS, key=NOISE_KEY)).all()
    assert (first != flooded(values, PARAMETERS, key=b"l" * 32)).mean() > 0.9


def test_flooding_noise_is_gaussian_with_the_stated_deviation():
    """2^18 samples: mean, deviation, kurtosis and 3-sigma tail within 5 standard errors; false alarm 3e-6 in all."""
    parameters = CkksParameters.fitted(cohort=5, bound=1.0, length=1 << 18)
    noise = unflooded(flooded(np.zeros(1 << 18), parameters, key=NOISE_KEY), parameters) / parameters.flooding_deviation
    count = noise.size
    assert abs(noise.mean()) < 5 / np.sqrt(count)
    assert abs(noise.std() - 1) < 5 / np.sqrt(2 * count) + 1 / 16**2
    assert abs((noise**4).mean() - 3) < 5 * np.sqrt(96 / count) + 0.02
    assert abs((np.abs(noise) > 3).mean() - 0.0027) < 5 * np.sqrt(0.0027 / count) + 0.0002


def _solve_for_key(ciphertext_error, published, noise_free):
    """How well the published values tell the lattice error: correlation with what was taken off."""
    return np.corrcoef(ciphertext_error, published - noise_free)[0, 1]


def test_an_unflooded_decryption_gives_the_errors_away_and_a_flooded_one_does_not(key):
    """What Li and Micciancio (2020) start from. 3,000 samples: by chance a correlation stays below 0.1, 5.5 standard
    errors, false alarm 4e-8."""
    parameters = CkksParameters(cohort=5, bound=1.0, length=3000, scale_bits=42, flooding_bits=16)
    key = CkksKey.generate(parameters)
    rows = vectors(5, parameters=parameters)
    exact = rows.sum(axis=0)
    decrypted = key.decrypt(encrypted_sum(key, rows, parameters))
    errors = decrypted - exact
    published = unflooded(flooded(decrypted, parameters, key=NOISE_KEY), parameters)
    assert _solve_for_key(errors, decrypted, exact) > 0.99
    assert abs(_solve_for_key(errors, published, exact)) < 0.1


def test_without_tenseal_there_is_one_line_and_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(CkksUnavailable) as caught:
        primitive.require_tenseal()
    assert "\n" not in caught.value.message
    assert caught.value.hint == 'pip install "fedpt-secure[ckks]"'


def test_importing_the_package_does_not_import_require_tenseal():
    import subprocess

    program = "import sys, fedpt_secure.crypto; sys.exit('tenseal' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
