"""The public names of `fedpt_secure.report` exist, and are what `__all__` says."""

from __future__ import annotations

from fedpt_secure import report


def test_all_names_exist_and_nothing_private_is_exported():
    assert list(report.__all__) == sorted(report.__all__, key=lambda name: (not name.isupper(), name))
    assert all(hasattr(report, name) and not name.startswith("_") for name in report.__all__)
