"""The public names of `fedpt_secure.evaluation` exist and are listed."""

from __future__ import annotations

import fedpt_secure.evaluation as package


def test_every_listed_name_exists_and_the_list_is_sorted():
    assert package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
