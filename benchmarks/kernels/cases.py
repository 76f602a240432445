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
FLUSH = 2  # times the last-level cache that is read to be rid of what is in it
SHARE = 0.5  # of the free memory that a measurement may take
QUICK_WORKING_SET = 128 * 2**20  # making copies would take longer than timing them


@dataclass(frozen=True)
class Shape:
    """Heads of one layer: query heads, KV heads, head size."""

    heads: int
    kv_heads: int
    head_size: int

    @property
    def scale(self) -> float:
        """Returns the factor of q·k."""
        return self.head_size**-0.5


SHAPES = {"smol": Shape(9, 3, 64), "llama": Shape(32, 8, 128)}


def cache_bytes() -> int:
    """Returns the size of the last-level cache."""
    largest = 0
    for size in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        largest = max(largest, int(size.read_text().strip().removesuffix("K")) * 1024)
    return largest


def free_bytes() -> int:
    """Returns the memory that this process may still take: the machine's, or what its control group
    is left."""
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        group = pathlib.Path("/sys/fs/cgroup")
        if (group / most).exists() and (limit := (group / most).read_text().strip()) != "max":
            free = min(free, max(0, int(limit) - int((group / used).read_text())))
    return free


@dataclass(frozen=True)
class Sizes:
    """How much memory a measurement takes.

    Attributes:
        copies: bytes over which the calls of each candidate are spread.
        read: bytes of the read benchmark.
        flush: `copies` do not outgrow the cache: before each burst it is filled with other data, of
            which there are `read` bytes, and a burst reads no copy twice.
        cut: bytes that the copies would have had if there were more memory, or None.
    """

    copies: int
    read: int
    flush: bool
    cut: int | None = None


class TooLarge(Exception):
    """A measurement that does not fit the memory even with one copy of everything."""


def sizes(once: Sequence[int], quick: bool = False) -> Sizes:
    """Returns the sizes for a measurement whose candidates need so many bytes for one copy each;
    together they take up to SHARE of the memory that is free. Raises TooLarge."""
    cache, room = cache_bytes(), int(SHARE * free_bytes())
    wanted = max(MIN_WORKING_SET, CACHES * cache)
    read = max(MIN_WORKING_SET, FLUSH * cache) if quick else wanted
    if quick:
        wanted = min(wanted, QUICK_WORKING_SET)
    read = min(read, room // 4)
    # Copies are whole, so a candidate may take one more than asked for.
    each = (room - read - sum(once)) // len(once)
    if each < 0:
        raise TooLarge(
            f"needs {(sum(once) + read) / 1e9:.1f} GB, and may take {room / 1e9:.1f} GB, "
            f"{SHARE:.0%} of what is free"
        )
    copies = max(1, min(wanted, each))
    return Sizes(copies, read, copies < CACHES * cache, wanted if copies < wanted else None)


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
        """Returns the number of sequences."""
        return len(self.lengths)

    @property
    def float32_bytes(self) -> int:
        """Bytes of K and V of one copy in float32."""
        return sum(self.lengths) * self.shape.kv_heads * 2 * self.shape.head_size * 4

    def contents(self, sets: int) -> Tensor:
        """Returns which of the distinct pages each page of each sequence holds, for `sets`
        independent copies of the batch: int64 [sets, batch, pages of the longest sequence]."""
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
