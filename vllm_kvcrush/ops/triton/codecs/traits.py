"""What kernels and launchers must know of a codec, as one record: its traits on the device.

The record is a compile-time constant of every kernel that reads or writes pages, so `CODEC.scores`
in a kernel is a call of that codec's function: no kernel asks which codec it has.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type,untyped-decorator"

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.ops.triton.config import SCORES_STAGES, SCORES_WARPS, tile_tokens
from vllm_kvcrush.ops.triton.kernels.tokens import section
from vllm_kvcrush.ops.triton.layout import Geometry


@triton.jit
def _own_number(codec, CODEC: tl.constexpr):
    return codec == CODEC.number


@triton.jit
def _same_tables(tables, head, CODEC: tl.constexpr, G: tl.constexpr):
    return tables


@triton.jit
def _always(_, CODEC: tl.constexpr):
    yes: tl.constexpr = True
    return yes


@triton.jit
def _capacity(tables, CODEC: tl.constexpr, G: tl.constexpr):
    AT: tl.constexpr = section(G, CODEC.name)
    n: tl.constexpr = AT.capacity
    return n


def _scores_tiles(geometry: Geometry) -> tuple[int, int, int]:
    return 64, SCORES_WARPS, SCORES_STAGES


@dataclass(frozen=True, eq=False, repr=False)
class Traits:
    """One codec on the device. Functions of the device are triton.jit functions; all of them take
    the record itself as `CODEC` and the page's `Geometry` as `G`, and pointers as `Pool` and
    `Tables`, those of the head.

    Attributes:
        name: in `vllm_kvcrush.codecs.CODECS`.
        pages: names of the codecs whose pages it reads; two where one keeps positions, and comes
            last.
        tail: whether it also reads and writes raw tails.
        tile: tokens of a tile of attention, from a page's capacity and the most that registers
            allow.
        scores_tiles: tokens, warps and stages of a program of window scores.
        encode_pages: the launch that fills pages, if `kernels.compaction.encode_kernel` does not,
            with `encode_keys` and `encode_values`: of (layer, codec, target, key, value,
            positions).
        share: writes what the tokens of each page share, before `encode_pages` fills them: of
            (layer, codec, target, key, value).
        own: what this codec's functions know besides.
        loops: attention's loops over its pages: each a function as `pages.page_loop`, in how many
            planes it adds up values (see `kernels.attention`), and whether every variant of the
            codec needs one of its own.

    Functions of a head:
        head(tables, head): the tables of one head among a layer's.
        serves(tables): whether this variant reads that head's pages.
        capacity(tables): tokens of a page.

    Functions of single tokens, T of any of a head's pages; `page` int64 [T], `index` [T] their
    places in them, `mask` bool [T]:
        reads(codec): whether pages of codec numbers [T] are its own.
        expand_keys(pool, tables, page, index, mask, T, EXACT, DTYPE): a tuple of float32 tiles that
            share the channels out in order; with EXACT as exactly as pages tell.
        expand_values(pool, tables, page, index, mask, T): float32 [T, v_pad].
        keeps_positions(codec): whether pages of a codec number know positions.
        positions(pool, tables, page, index, mask, codec): int32 [T], -1 where they do not.
        encode_keys(x, pool, page, group, start, n, T), encode_values(x, pool, page, start, n, T):
            store float32 rows of a page from token `start`, of which `n` are left.

    Functions of attention's tiles, T tokens of a page from `first`, of which `n` are left:
        query(rows, tables, DTYPE): what `scores` wants of the query, once for all pages.
        prepare(q, pool, tables, page, first, n, scale, T, VALUES, DTYPE): which tokens count, bool
            [T], and a tuple of what `scores` and `values` want of the page.
        scores(q, tile, pool, page, first, n, scale, M, T, DTYPE, PTX): logits, float32 [M, T].
        values(acc, weights, factor, tile, pool, page, first, n, T, DTYPE, PTX): the sums `acc`, a
            tuple of planes, times factor, plus weights times values.
    """

    name: str
    pages: tuple[str, ...]
    expand_keys: Any
    expand_values: Any
    positions: Any
    query: Any
    prepare: Any
    scores: Any
    values: Any
    loops: tuple[tuple[Any, int, bool], ...]
    encode_keys: Any = None
    encode_values: Any = None
    reads: Any = _own_number
    head: Any = _same_tables
    serves: Any = _always
    keeps_positions: Any = _always
    capacity: Any = _capacity
    tail: bool = False
    tile: Callable[[int, int], int] = tile_tokens
    scores_tiles: Callable[[Geometry], tuple[int, int, int]] = _scores_tiles
    encode_pages: Callable[..., None] | None = None
    share: Callable[..., None] | None = None
    own: Any = None

    @property
    def number(self) -> int:
        """In `vllm_kvcrush.codecs.CODECS`."""
        return CODECS[self.name].number

    @property
    def needs_tables(self) -> bool:
        """Whether it needs a model's tables."""
        return CODECS[self.name].needs_tables

    def with_own(self, own: Any) -> Traits:
        """This codec with other `own`: for equal ones the same object."""
        return _with_own(self, own)

    def __repr__(self) -> str:
        # Triton's caches tell constants apart by this, so a function's source must be in it.
        return self._text

    @functools.cached_property
    def _text(self) -> str:
        functions = (getattr(self, field.name) for field in dataclasses.fields(self))
        keys = [getattr(f, "cache_key", "") for f in functions]
        keys += [getattr(loop, "cache_key", "") for loop, *_ in self.loops]
        digest = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
        return f"{self.name}:{self.own}:{digest}"


@functools.cache
def _with_own(codec: Traits, own: Any) -> Traits:
    return dataclasses.replace(codec, own=own)


@dataclass(frozen=True)
class Loop:
    """One loop of attention: a compile-time constant.

    Attributes:
        run: place of the codec's entries among those of a directory.
        tokens: of a tile.
    """

    codec: Traits
    attend: Any
    run: int
    tokens: int

    def __repr__(self) -> str:
        name = self.attend.__name__
        return f"{name}({self.codec}, {self.run}, {self.tokens})"
