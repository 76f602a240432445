"""What kernels hand on together: the pool in all types in which they read it, and tables."""

from __future__ import annotations

from typing import Any, NamedTuple


class Pool(NamedTuple):
    """One storage: as the model's dtype, that of int4's grids, float16, int16, int32 and bytes."""

    raw: Any
    grid: Any
    half: Any
    words: Any
    wide: Any
    codes: Any


class Tables(NamedTuple):
    """The tables of `codecs.fitted.tables.Fitted`, which only codecs that need tables read."""

    info: Any
    fields: Any
    inverse: Any
    base: Any
    coarse: Any
    fine: Any
    limit: Any


class Entries(NamedTuple):
    """A head's part of a directory: where each of its runs begins and ends, `table`, the region's
    blocks, with each of which lie the 2^shift next entries, and of each entry its page, how many
    tokens are in it and the address of their log biases."""

    runs: Any
    table: Any
    shift: Any
    pages: Any
    counts: Any
    bias: Any


class Rows(NamedTuple):
    """Query rows of a program: their elements, where each row begins, and which rows there are."""

    query: Any
    at: Any
    mask: Any
