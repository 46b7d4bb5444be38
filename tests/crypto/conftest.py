"""A cohort to test with, and the means to take one check out of the package."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

from fedpt_secure.attacks.protocol.cohort import Cohort, cohorts


@pytest.fixture(scope="session")
def make_cohort() -> Callable[[int], Cohort]:
    """Cohorts by size, made once: identities cost time and hold no state."""
    return cohorts()


@pytest.fixture
def without_check(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, str], None]:
    """Take one check out of a function of the package, for the length of a test.

    `without_check(owner, name, condition)` makes `if condition:` in `owner.name` never true. That the condition is
    there, once, is asserted: a check that is rewritten must be rewritten in the tests of what it defeats.
    """

    def remove(owner: Any, name: str, condition: str) -> None:
        function = inspect.unwrap(inspect.getattr_static(owner, name))
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        tree.body[0].decorator_list = []  # type: ignore[attr-defined]
        wanted = ast.unparse(ast.parse(condition, mode="eval"))
        found = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == wanted]
        assert len(found) == 1, f"{len(found)} checks `{condition}` in {name}"
        found[0].test = ast.Constant(False)
        made: dict[str, Any] = {}
        namespace = vars(sys.modules[function.__module__])
        exec(compile(ast.fix_missing_locations(tree), f"<{name} without a check>", "exec"), namespace, made)  # noqa: S102
        monkeypatch.setattr(owner, name, made[name])

    return remove
