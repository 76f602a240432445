"""Samples of test matrices in which every pair of values still occurs.

Most faults need no more than two particular values to come together, and a sample that has every
pair is far smaller than the product. `make test` runs such samples; `make test-all` sets
KVCRUSH_FULL=1, with which the same tests run the whole product.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest

FULL = os.environ.get("KVCRUSH_FULL", "0") not in ("", "0")


def pairwise(
    allowed: Callable[..., bool] | None = None, /, **dimensions: Iterable[Any]
) -> list[tuple[Any, ...]]:
    """Returns combinations, one value of each dimension, such that each pair of values occurs.

    The result is always the same for the same arguments. It is greedy: the next combination is the
    first in the product's order that has the most pairs that none before it had. Its size is a
    little above the product of the two longest dimensions.

    Args:
        allowed: called with a combination's values as keyword arguments; combinations for which it
            returns False are left out, and so are pairs that occur in no other combination.
        **dimensions: values by name. They need not be hashable, but must be few, because the whole
            product is built.

    Returns:
        Tuples in the order of the keyword arguments, in the product's order. The whole product
        (without what is not allowed) if KVCRUSH_FULL=1.
    """
    names = list(dimensions)
    values = [list(dimension) for dimension in dimensions.values()]
    product = [
        chosen
        for chosen in itertools.product(*(range(len(v)) for v in values))
        if allowed is None
        or allowed(**{n: v[i] for n, v, i in zip(names, values, chosen, strict=True)})
    ]
    if FULL:
        sample = product
    else:
        together = min(2, len(names))
        pairs = {
            chosen: frozenset(itertools.combinations(enumerate(chosen), together))
            for chosen in product
        }
        missing = set().union(*pairs.values())
        taken = set()
        while missing:
            best = max(product, key=lambda chosen: len(pairs[chosen] & missing))
            taken.add(best)
            missing -= pairs[best]
        sample = sorted(taken)
    return [tuple(v[i] for v, i in zip(values, chosen, strict=True)) for chosen in sample]


def parametrize(
    allowed: Callable[..., bool] | None = None, /, **dimensions: Iterable[Any]
) -> pytest.MarkDecorator:
    """Returns the decorator that runs a test for each combination of `pairwise`."""
    return pytest.mark.parametrize(
        tuple(dimensions), pairwise(allowed, **dimensions), ids=_name_in_ids
    )


def _name_in_ids(value: Any) -> str | None:
    # pytest would name an object by a number, which says nothing.
    if value is None or isinstance(value, str | int | float):
        return None
    return getattr(value, "name", None) or getattr(value, "__name__", None) or str(value)
