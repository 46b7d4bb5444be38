"""The public names of `fedpt_secure.attacks` exist, and are what `__all__` says."""

from __future__ import annotations

from fedpt_secure import attacks


def test_all_names_exist_and_nothing_private_is_exported():
    assert list(attacks.__all__) == sorted(attacks.__all__, key=lambda name: (not name.isupper(), name))
    assert all(hasattr(attacks, name) and not name.startswith("_") for name in attacks.__all__)
