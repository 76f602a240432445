"""How much attention a window of queries pays to each slot."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type,assignment"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.config import ANY_ADDRESS
from vllm_kvcrush.ops.triton.kernels.tiles import LOG2E, dot
from vllm_kvcrush.ops.triton.kernels.views import Pool, Tables


@triton.jit
def _transposed(parts, DTYPE: tl.constexpr):
    turned = (tl.trans(parts[0].to(DTYPE)),)
    for part in tl.static_range(1, len(parts)):
        turned = turned + (tl.trans(parts[part].to(DTYPE)),)  # noqa: RUF005 (Triton has no *)
    return turned


@triton.jit
def _weights(
    query, lse, k, added, place, row, q_head, first_row, window, scale,
    W: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, TAIL: tl.constexpr, BIAS: tl.constexpr,
    DTYPE: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Weights [W, T] of rows of one query head; 0 in rows past the window."""
    PARTS: tl.constexpr = len(k)
    SIZE: tl.constexpr = G.k_size // PARTS
    inside = row < window
    logits = tl.zeros([W, T], tl.float32)
    for part in tl.static_range(PARTS):
        c = tl.arange(0, k[part].shape[0])[None, :]
        at = query + (row * HEADS + q_head)[:, None] * G.k_size + (c + part * SIZE)
        q = tl.load(at, mask=inside[:, None] & (c < SIZE), other=0.0).to(DTYPE)
        logits = dot(q, k[part], logits)
    total = tl.load(lse + row * HEADS + q_head, mask=inside, other=float("inf")) * LOG2E
    logits = logits * (scale * LOG2E)
    if BIAS and not TAIL:
        logits += added[None, :]
    weights = tl.exp2(logits - total[:, None])
    if TAIL:
        seen = place[None, :] <= (first_row + row)[:, None]
        weights = tl.where(seen, weights, 0.0)
    return weights


@triton.jit(
    do_not_specialize=("width", "tail_length", "window", "block_pages", "first_page", "limit"),
    do_not_specialize_on_alignment=ANY_ADDRESS,
)
def scores_kernel(
    out, query, lse, raw, grid, half, words, wide, codes,
    heads, pages, counts, codecs, firsts, tail_slot, tail_table, candidates, bias, log_bias,
    info, fields, inverse, base, coarse, fine, limit,
    width, tail_length, scale, window, block_pages, first_page,
    T: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    TAIL: tl.constexpr, CODEC: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr,
    G: tl.constexpr, GREATEST: tl.constexpr,
):  # fmt: skip
    """Grid (entries, tiles of CODEC's pages), or with TAIL (tiles of the tail, KV heads).

    Args:
        out: float32 [HEADS, width], receives the sum over the window of softmax weights; with
            GREATEST [KV heads, width], of the greatest of each query among the heads of a group.
        candidates: int32 [KV heads], how many of a head's slots are wanted.
        query: [window, HEADS, k_size], rows of the newest tokens. lse: float32 [window, HEADS].
        heads, pages, counts, codecs, firsts: int32 [entries]. W: query rows of a product.
    """
    t = tl.arange(0, T)
    if TAIL:
        head = tl.program_id(1)
        place = tl.program_id(0) * T + t
        n = tail_length - tl.program_id(0) * T
        slot = tl.load(tail_slot + head) + place
        block = tl.load(tail_table + place // G.block_size, mask=t < n, other=0).to(tl.int64)
        page = block * block_pages + first_page + head
        index = place % G.block_size
    else:
        place = t
        entry = tl.program_id(0)
        n = tl.load(counts + entry) - tl.program_id(1) * T
        if (n <= 0) | (CODEC.reads(tl.load(codecs + entry), CODEC) == 0):
            return
        head = tl.load(heads + entry)
        index = tl.program_id(1) * T + t
        slot = tl.load(firsts + entry) + index
        page = tl.zeros([T], tl.int64) + tl.load(pages + entry)
    mask = (t < n) & (slot < tl.load(candidates + head))
    added = tl.zeros([T], tl.float32)
    if BIAS and not TAIL:
        start = tl.load(bias + entry)
        added = tl.load(log_bias + start + index, mask=mask & (start >= 0), other=0.0) * LOG2E
    pool = Pool(raw, grid, half, words, wide, codes)
    tables = Tables(info, fields, inverse, base, coarse, fine, limit)
    tables = CODEC.head(tables, head, CODEC, G)
    k = _transposed(
        CODEC.expand_keys(pool, tables, page, index, mask, T, False, CODEC, G, DTYPE), DTYPE
    )
    first_row = tail_length - window
    if GREATEST:
        sums = tl.zeros([T], tl.float32)
        for start in range(0, window, W):
            row = start + tl.arange(0, W)
            best = tl.zeros([W, T], tl.float32)
            for g in range(GROUP):
                weights = _weights(
                    query, lse, k, added, place, row, head * GROUP + g, first_row, window, scale,
                    W, T, HEADS, TAIL, BIAS, DTYPE, G,
                )  # fmt: skip
                best = tl.maximum(best, weights)
            sums += tl.sum(best, 0)
        tl.store(out + head.to(tl.int64) * width + slot, sums, mask=mask)
    else:
        for g in range(GROUP):
            q_head = head * GROUP + g
            sums = tl.zeros([T], tl.float32)
            for start in range(0, window, W):
                row = start + tl.arange(0, W)
                weights = _weights(
                    query, lse, k, added, place, row, q_head, first_row, window, scale,
                    W, T, HEADS, TAIL, BIAS, DTYPE, G,
                )  # fmt: skip
                sums += tl.sum(weights, 0)
            tl.store(out + q_head.to(tl.int64) * width + slot, sums, mask=mask)
