"""The samples of test matrices have every pair of values, and few combinations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests import pairwise

DIMENSIONS: dict[str, Any] = {
    "codec": ["raw", "int8", "int4", "tc4", "tc6", "tc8"],
    "size": [32, 64, 80, 128],
    "group": (1, 3, 4),
    "dtype": ("float32", "bfloat16"),
    "options": [{}, {"bias": True}, ["unhashable"]],
}


@pytest.fixture(autouse=True)
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "FULL", False)


def pairs(found: list[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    return {
        pair
        for combination in found
        for pair in itertools.combinations(enumerate(map(repr, combination)), 2)
    }


def test_every_pair_occurs_in_a_small_sample() -> None:
    found = pairwise.pairwise(**DIMENSIONS)
    product = list(itertools.product(*DIMENSIONS.values()))
    assert pairs(found) == pairs(product)
    assert all(combination in product for combination in found)
    assert 6 * 4 <= len(found) <= 30 and len(product) == 432
    assert found == pairwise.pairwise(**DIMENSIONS), "another run draws the same"


def test_full_runs_are_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "FULL", True)
    assert pairwise.pairwise(**DIMENSIONS) == list(itertools.product(*DIMENSIONS.values()))


@pytest.mark.parametrize("full", [False, True])
def test_what_is_not_allowed_is_left_out(monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    monkeypatch.setattr(pairwise, "FULL", full)

    def allowed(codec: str, size: int, **_: Any) -> bool:
        return not codec.startswith("tc") or size == 64

    found = pairwise.pairwise(allowed, **DIMENSIONS)
    product = [c for c in itertools.product(*DIMENSIONS.values()) if allowed(c[0], c[1])]
    assert pairs(found) == pairs(product)
    assert all(combination in product for combination in found)


def test_few_dimensions() -> None:
    assert pairwise.pairwise(a=[1, 2, 3]) == [(1,), (2,), (3,)]
    assert pairwise.pairwise(a=[1, 2], b="xy") == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    assert pairwise.pairwise(a=[1, 2], b=[]) == []


def test_the_decorator_runs_a_test_for_each_combination() -> None:
    mark = pairwise.parametrize(a=[1, 2], b=[3, 4], c=[5, 6]).mark
    assert mark.name == "parametrize"
    assert mark.args == (("a", "b", "c"), pairwise.pairwise(a=[1, 2], b=[3, 4], c=[5, 6]))
