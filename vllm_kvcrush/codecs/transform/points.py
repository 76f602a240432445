"""The operating points of transform coding, from large to small pages. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class TablesError(ValueError):
    """Transform tables cannot be made or used; the message is one sentence for a user."""


@dataclass(frozen=True)
class OperatingPoint:
    """One trade of size against loss, and the codec that makes it.

    Attributes:
        name: the codec's name.
        local: whether keys are coded relative to the position of their strip's first token. They
            take fewer bits then, but queries must be rotated for every strip.
        key_bits: bits of a key component, the mean over all layers and heads.
        value_bits: bits of a value channel, the same mean, 2 to 4 in each head, beside the scale.
        exceptions: least share of a page's tokens that are int8 instead.
    """

    name: str
    local: bool
    key_bits: float
    value_bits: float
    exceptions: float


# The points that lose least come first.
POINTS = (
    OperatingPoint("tc4", local=False, key_bits=3.25, value_bits=4.0, exceptions=0.005),
    OperatingPoint("tc6", local=True, key_bits=1.75, value_bits=2.5, exceptions=0.005),
    OperatingPoint("tc8", local=True, key_bits=1.375, value_bits=2.25, exceptions=0.005),
)
# Queries are taken at distances up to this from a key: farther ones are alike.
HORIZON = 8192


def horizon(config: Mapping[str, Any]) -> int:
    """Returns how far queries can be from a key, in tokens, for `fit`.

    Args:
        config: content of the model's config.json.
    """
    return min(HORIZON, config.get("max_position_embeddings") or HORIZON)


def even_value_bits(point: OperatingPoint) -> int:
    """Returns the bits of a value channel where every head has the same number: about the point's
    mean."""
    return int(point.value_bits + 0.5)


def even_words(point: OperatingPoint, size: int) -> int:
    """Returns the number of 32-bit words of a key's codes where every head has the same number, so
    that page sizes are known before there are any statistics. It is no less than the point's mean.

    Args:
        size: head size of keys.
    """
    return math.ceil(point.key_bits * size / 32)
