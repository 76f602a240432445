"""Cosines of keys of a head with others, compared where they are made."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type,assignment"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.kernels.tiles import dot


@triton.jit
def _load(unit, head, slot, n, SIZE: tl.constexpr, PADDED: tl.constexpr):
    c = tl.arange(0, PADDED)
    at = unit + (head.to(tl.int64) * n + slot)[:, None] * SIZE + c[None, :]
    return tl.load(at, mask=(slot < n)[:, None] & (c < SIZE)[None, :], other=0.0)


@triton.jit(do_not_specialize=("n",))
def nearest_kernel(
    target, cosine, unit, gone, kept, n,
    SIZE: tl.constexpr, PADDED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of R rows, heads). Writes dropped rows only, where a head keeps something.

    Args:
        target: int64 [heads, n]. cosine: float32 [heads, n].
        unit: float32 [heads, n, SIZE]. gone, kept: uint8 [heads, n].
    """
    head = tl.program_id(1)
    row = tl.program_id(0) * R + tl.arange(0, R)
    wanted = tl.load(gone + head.to(tl.int64) * n + row, mask=row < n, other=0) != 0
    if tl.max(wanted.to(tl.int32), 0) == 0:
        return
    rows = _load(unit, head, row, n, SIZE, PADDED)
    best = tl.full([R], -2.0, tl.float32)
    nearest = row.to(tl.int64)
    for start in range(0, n, C):
        column = start + tl.arange(0, C)
        there = tl.load(kept + head.to(tl.int64) * n + column, mask=column < n, other=0) != 0
        if tl.max(there.to(tl.int32), 0) != 0:
            columns = _load(unit, head, column, n, SIZE, PADDED)
            found = dot(rows, tl.trans(columns), tl.zeros([R, C], tl.float32))
            found = tl.where(there[None, :], found, -2.0)
            top = tl.max(found, 1)
            first = tl.min(tl.where(found == top[:, None], column[None, :], n), 1)
            better = top > best
            best = tl.where(better, top, best)
            nearest = tl.where(better, first.to(tl.int64), nearest)
    at = head.to(tl.int64) * n + row
    written = wanted & (best > -2.0)
    tl.store(target + at, nearest, mask=written)
    tl.store(cosine + at, best, mask=written)


@triton.jit(do_not_specialize=("n", "threshold"))
def latest_kernel(
    latest, cosine, unit, counts, n, threshold,
    SIZE: tl.constexpr, PADDED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of R rows, heads). Columns are read from the newest on, until all rows have found
    a similar one.

    Args:
        latest: int64 [heads, n], receives the last other key whose cosine with a key is above the
            threshold, or -1. cosine: float32 [heads, n], receives that cosine, or 0.
        unit: float32 [heads, n, SIZE]. counts: int32 [heads], keys of each head.
    """
    head = tl.program_id(1)
    row = tl.program_id(0) * R + tl.arange(0, R)
    count = tl.load(counts + head)
    rows = _load(unit, head, row, n, SIZE, PADDED)
    place = tl.where(row < count, -1, n)  # n: nothing to search for
    value = tl.zeros([R], tl.float32)
    start = (count + C - 1) // C * C - C
    while (start >= 0) & (tl.min(place, 0) < 0):
        column = start + tl.arange(0, C)
        columns = _load(unit, head, column, n, SIZE, PADDED)
        found = dot(rows, tl.trans(columns), tl.zeros([R, C], tl.float32))
        other = (column < count)[None, :] & (column[None, :] != row[:, None])
        similar = other & (found > threshold)
        last = tl.max(tl.where(similar, column[None, :], -1), 1)
        now = place < 0
        own = tl.sum(tl.where(similar & (column[None, :] == last[:, None]), found, 0.0), 1)
        value = tl.where(now, own, value)
        place = tl.where(now, last, place)
        start -= C
    at = head.to(tl.int64) * n + row
    tl.store(latest + at, tl.where(place < n, place, -1).to(tl.int64), mask=row < n)
    tl.store(cosine + at, value, mask=row < n)
