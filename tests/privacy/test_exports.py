"""The public names of `fedpt_secure.privacy` exist, and are what `__all__` says."""

from __future__ import annotations

from fedpt_secure import privacy


def test_all_names_exist_and_nothing_private_is_exported():
    assert list(privacy.__all__) == sorted(privacy.__all__, key=lambda name: (not name.isupper(), name))
    assert all(hasattr(privacy, name) and not name.startswith("_") for name in privacy.__all__)
