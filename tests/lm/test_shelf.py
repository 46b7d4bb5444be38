"""Shelves under one bound: what is kept is what was given, and never more than the bound."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fedpt_secure.lm.shelf import MemoryBound, Shelf

LIMIT = 100
keys = st.integers(0, 4)


@dataclass(frozen=True)
class Lump:
    nbytes: int


class Shelves(RuleBasedStateMachine):
    """Two shelves beside a model of them: what each key should hold."""

    def __init__(self):
        super().__init__()
        self.bound = MemoryBound(LIMIT)
        self.shelves = [Shelf(self.bound), Shelf(self.bound)]
        self.model: list[dict[int, Lump]] = [{}, {}]

    @rule(which=st.integers(0, 1), key=keys, size=st.integers(1, 70))
    def keep(self, which, key, size):
        without = sum(lump.nbytes for shelf in self.model for lump in shelf.values())
        without -= self.model[which].get(key, Lump(0)).nbytes
        value = Lump(size)
        self.shelves[which].keep(key, value)
        if without + size <= LIMIT:
            self.model[which][key] = value

    @rule(which=st.integers(0, 1), key=keys)
    def drop(self, which, key):
        self.shelves[which].drop(key)
        self.model[which].pop(key, None)

    @rule(which=st.integers(0, 1))
    def clear(self, which):
        self.shelves[which].clear()
        self.model[which].clear()

    @invariant()
    def holds_what_the_model_holds(self):
        for shelf, model in zip(self.shelves, self.model, strict=True):
            assert {key: shelf.get(key) for key in shelf} == model
            assert len(shelf) == len(model)
        assert self.bound.held == sum(lump.nbytes for model in self.model for lump in model.values()) <= LIMIT


TestShelves = Shelves.TestCase


def test_without_room_nothing_is_kept():
    shelf = Shelf(MemoryBound(0))
    shelf.keep("a", Lump(1))
    assert shelf.get("a") is None


def test_where_a_larger_value_has_no_room_the_one_before_stays():
    bound = MemoryBound(LIMIT)
    shelf = Shelf(bound)
    shelf.keep("a", Lump(60))
    shelf.keep("a", Lump(101))
    assert shelf.get("a") == Lump(60)
    assert bound.held == 60
