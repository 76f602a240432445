"""What a kernel is asked to compute: shapes, lengths, and the same float32 data for everyone."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 128  # tokens; what vLLM's CPU build takes by default
DISTINCT = 32  # pages with contents of their own; all others are copies of them
MIN_WORKING_SET = 192 * 2**20
# More than this many times the last-level cache: none of a call's data is left from earlier ones.
CACHES = 4


@dataclass(frozen=True)
class Shape:
    """Heads of one layer: query heads, KV heads, head size."""

    heads: int
    kv_heads: int
    head_size: int

    @property
    def scale(self) -> float:
        """Factor of q·k."""
        return self.head_size**-0.5


SHAPES = {"smol": Shape(9, 3, 64), "llama": Shape(32, 8, 128)}


def working_set() -> int:
    """Bytes over which repeated calls must be spread for every call to read from memory."""
    largest = 0
    for size in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        largest = max(largest, int(size.read_text().strip().removesuffix("K")) * 1024)
    return max(MIN_WORKING_SET, CACHES * largest)


class Case:
    """One attention call of one layer over a batch of sequences with paged K and V.

    Attributes:
        shape: the heads.
        lengths: tokens of each sequence, those of its queries included.
        query_len: newest tokens of each sequence that attend, 1 for decode; causal.
        keys, values: float32 [DISTINCT, kv_heads, PAGE, head_size], the pages' contents.
        queries: float32 [batch * query_len, heads, head_size].
    """

    def __init__(self, shape: Shape, lengths: Sequence[int], query_len: int = 1, seed: int = 0):
        assert min(lengths) >= query_len >= 1
        self.shape, self.lengths, self.query_len = shape, tuple(lengths), query_len
        draw = torch.Generator().manual_seed(seed)
        page = (DISTINCT, shape.kv_heads, PAGE, shape.head_size)
        self.keys = torch.randn(page, generator=draw)
        self.values = torch.randn(page, generator=draw)
        rows = (len(lengths) * query_len, shape.heads, shape.head_size)
        self.queries = torch.randn(rows, generator=draw)
        self._seed = seed

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.lengths)

    @property
    def float32_bytes(self) -> int:
        """Bytes of K and V of one copy in float32."""
        return sum(self.lengths) * self.shape.kv_heads * 2 * self.shape.head_size * 4

    def contents(self, sets: int) -> Tensor:
        """Which of the distinct pages each page of each sequence holds, for `sets` independent
        copies of the batch: int64 [sets, batch, pages of the longest sequence]."""
        draw = torch.Generator().manual_seed(self._seed + 1)
        pages = -(-max(self.lengths) // PAGE)
        return torch.randint(DISTINCT, (sets, self.batch, pages), generator=draw)

    def tokens(self, distinct: Tensor, contents: Tensor, length: int) -> Tensor:
        """Tokens of one sequence in order.

        Args:
            distinct: [DISTINCT, kv_heads, PAGE, head_size], `keys` or `values` in any form.
            contents: int64 [pages], a row of `contents`.
            length: tokens wanted.

        Returns:
            [kv_heads, length, head_size].
        """
        rows = distinct[contents].transpose(0, 1)
        return rows.reshape(self.shape.kv_heads, -1, self.shape.head_size)[:, :length]
