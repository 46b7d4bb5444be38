"""The public names are those of `__all__`."""

from __future__ import annotations

import fedpt_secure.serving as package


def test_every_public_name_is_there_and_sorted():
    assert list(package.__all__) == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
