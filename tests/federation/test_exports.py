"""The public names of `fedpt_secure.federation` exist, and are what `__all__` says."""

from __future__ import annotations

from fedpt_secure import federation


def test_all_names_exist_and_nothing_private_is_exported():
    assert list(federation.__all__) == sorted(federation.__all__, key=lambda name: (not name.isupper(), name))
    assert all(hasattr(federation, name) and not name.startswith("_") for name in federation.__all__)
