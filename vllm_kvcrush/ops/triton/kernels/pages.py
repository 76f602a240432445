"""Attention's loop over the pages of a codec, and what codecs share in reading tiles of pages.

A tile is T tokens of one page. `page` is a page index as int64, `first` the tile's first token and
`n` how many of the page's tokens are left from there. What lies past `n` is read as zero.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.kernels.tiles import LOG2E, rotation_sign, softmax_step


@triton.jit
def page_loop(
    rows, pool, tables, entries, head, scale, split, splits, acc, peak, total,
    LOOP: tl.constexpr, G: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr,
    BIAS: tl.constexpr, VALUES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Adds a head's pages of one codec to the sums; `entries.runs` points to the head's runs.

    Args:
        scale: of q·k, times log2(e).
        acc: the sums of weighted values, a tuple of as many planes as the codec says.
        peak, total: of the online softmax.
        LOOP: a `codecs.traits.Loop`.
    """
    T: tl.constexpr = LOOP.tokens
    tables = LOOP.codec.head(tables, head, LOOP.codec, G)
    begin = tl.load(entries.runs + LOOP.run * 2)
    end = tl.load(entries.runs + LOOP.run * 2 + 1)
    end = tl.where(LOOP.codec.serves(tables, LOOP.codec), end, begin)
    q = LOOP.codec.query(rows, tables, LOOP.codec, G, DTYPE)
    # A loop for each codec, since loads under a run-time branch are not made asynchronous.
    each = (LOOP.codec.capacity(tables, LOOP.codec, G) + T - 1) // T
    for i in range(begin * each + split, end * each, splits):
        entry = i // each
        first = i % each * T
        at = entry_at(entries, entry, tl.load(entries.table + (entry >> entries.shift)))
        page = tl.load(entries.pages + at).to(tl.int64)
        n = tl.load(entries.counts + at) - first
        seen, tile = LOOP.codec.prepare(
            q, pool, tables, page, first, n, scale, T, VALUES, LOOP.codec, G, DTYPE
        )
        logits = LOOP.codec.scores(
            q, tile, pool, page, first, n, scale, TILES.rows, T, LOOP.codec, G, DTYPE, PTX
        )
        if BIAS:
            logits += entry_bias(entries, at, first, n, T)[None, :] * LOG2E
        logits = tl.where(seen[None, :], logits, float("-inf"))
        weights, factor, peak, total = softmax_step(logits, peak, total)
        if VALUES:
            acc = LOOP.codec.values(
                acc, weights, factor, tile, pool, page, first, n, T, LOOP.codec, G, DTYPE, PTX
            )
    return acc, peak, total


@triton.jit
def entry_at(entries, entry, block):
    """Where a directory has an entry of a region, which lies with `block`: int64."""
    return (block.to(tl.int64) << entries.shift) + (entry & ((1 << entries.shift) - 1))


@triton.jit
def entry_bias(entries, at, first, n, T: tl.constexpr):
    """float32 [T], what is added to the logits of an entry's tokens from `first`."""
    t = tl.arange(0, T)
    address = tl.load(entries.bias + at)
    biased = tl.where(address != 0, n, 0)
    log_bias = address.to(tl.pointer_type(tl.float32))
    return tl.load(log_bias + first + t, mask=t < biased, other=0.0)


@triton.jit
def token_mask(n, T: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr):
    """bool [T, PAD]: tokens below `n`, channels below SIZE."""
    mask = (tl.arange(0, T) < n)[:, None]
    if SIZE != PAD:
        mask = mask & (tl.arange(0, PAD) < SIZE)[None, :]
    return mask


@triton.jit
def token_scales(half, page, first, n, OFFSET: tl.constexpr, T: tl.constexpr, G: tl.constexpr):
    """float32 [T], one scale per token from a section at byte OFFSET."""
    t = tl.arange(0, T)
    base = half + page * (G.page_bytes // 2) + OFFSET // 2 + first
    return tl.load(base + t, mask=t < n, other=0.0).to(tl.float32)


@triton.jit
def code_words(
    words, page, first, n, OFFSET: tl.constexpr, ROW: tl.constexpr, PAD: tl.constexpr,
    T: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """int16 [T, PAD]: rows of ROW words of a section at byte OFFSET."""
    base = words + page * (G.page_bytes // 2) + OFFSET // 2 + first * ROW
    at = tl.arange(0, T)[:, None] * ROW + tl.arange(0, PAD)[None, :]
    return tl.load(base + at, mask=token_mask(n, T, ROW, PAD), other=0)


@triton.jit
def query_row(rows, G: tl.constexpr, DTYPE: tl.constexpr):
    """The query: DTYPE [M, k_pad]."""
    c = tl.arange(0, G.k_pad)
    inside = rows.mask[:, None] & (c < G.k_size)[None, :]
    return tl.load(rows.query + rows.at[:, None] + c[None, :], mask=inside, other=0.0).to(DTYPE)


@triton.jit
def query_pairs(rows, G: tl.constexpr, DTYPE: tl.constexpr):
    """The query's even and odd channels: each DTYPE [M, k_pad / 2]."""
    c = tl.arange(0, G.k_pad // 2) * 2
    inside = rows.mask[:, None] & (c < G.k_size)[None, :]
    at = rows.query + rows.at[:, None] + c[None, :]
    even = tl.load(at, mask=inside, other=0.0).to(DTYPE)
    odd = tl.load(at + 1, mask=inside, other=0.0).to(DTYPE)
    return even, odd


@triton.jit
def query_planes(rows, G: tl.constexpr, DTYPE: tl.constexpr):
    """The query's channels 4i + s for s = 0 .. 3: each DTYPE [M, k_pad / 4]."""
    c = tl.arange(0, G.k_pad // 4) * 4
    inside = rows.mask[:, None] & (c < G.k_size)[None, :]
    at = rows.query + rows.at[:, None] + c[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(DTYPE)
    b = tl.load(at + 1, mask=inside, other=0.0).to(DTYPE)
    d = tl.load(at + 2, mask=inside, other=0.0).to(DTYPE)
    e = tl.load(at + 3, mask=inside, other=0.0).to(DTYPE)
    return a, b, d, e


@triton.jit
def plane_signs(S: tl.constexpr, G: tl.constexpr):
    """float32 [v_pad / 4], rotation_sign of plane S's channels."""
    return rotation_sign(tl.arange(0, G.v_pad // 4) * 4 + S)
