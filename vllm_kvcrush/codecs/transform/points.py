"""The points between size and loss that transform coding offers. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A request's first tokens draw attention whatever the query: they are always exceptions.
SINKS = 4


class TablesError(ValueError):
    """Tables that cannot be used; the message is one sentence for a user."""


@dataclass(frozen=True)
class Point:
    """One point between size and loss.

    Attributes:
        name: as policies and files call it.
        local: whether keys are coded as seen from the position of their strip's first token: fewer
            bits say as much, and a query is turned anew for every strip.
        key_bits: bits per key component, the mean over all layers and heads.
        value_bits: bits per value channel, likewise, 2 to 4 in each head; the scale comes on top.
        exceptions: share of a page's tokens that are int8 instead.
    """

    name: str
    local: bool
    key_bits: float
    value_bits: float
    exceptions: float


# What there is, those that lose least first.
POINTS = (
    Point("tc4", local=False, key_bits=3.25, value_bits=4.0, exceptions=0.005),
    Point("tc6", local=True, key_bits=1.75, value_bits=2.5, exceptions=0.005),
    Point("tc8", local=True, key_bits=1.375, value_bits=2.25, exceptions=0.005),
)
# Queries are taken at distances up to this from a key: further ones look alike.
HORIZON = 8192


def horizon(config: Mapping[str, Any]) -> int:
    """How far queries can be from a key, for `fit`; `config` is the content of config.json."""
    return min(HORIZON, config.get("max_position_embeddings") or HORIZON)


def even_value_bits(point: Point) -> int:
    """Bits of a value's channel where every head has the same: about what heads share out."""
    return int(point.value_bits + 0.5)


def even_words(point: Point, size: int) -> int:
    """Words of a key's codes where every head has the same number, so that they are known before
    there are any statistics: no fewer than where heads share them out."""
    return math.ceil(point.key_bits * size / 32)
