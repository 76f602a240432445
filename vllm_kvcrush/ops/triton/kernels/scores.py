"""How much attention a window of queries pays to each slot."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.config import ANY_ADDRESS
from vllm_kvcrush.ops.triton.kernels.tiles import LOG2E, dot
from vllm_kvcrush.ops.triton.kernels.tokens import keys_of, reads


@triton.jit(
    do_not_specialize=("candidates", "tail_length", "window", "block_pages", "first_page"),
    do_not_specialize_on_alignment=ANY_ADDRESS,
)
def scores_kernel(
    out, query, lse, raw, grid, half, words,
    heads, pages, counts, codecs, firsts, tail_slot, tail_table,
    tail_length, candidates, scale, window, block_pages, first_page,
    T: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    TAIL: tl.constexpr, CODEC: tl.constexpr, DTYPE: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Grid (entries, tiles of CODEC's pages), or with TAIL (tiles of the tail, KV heads).

    Args:
        out: float32 [HEADS, candidates], receives the sum over the window of softmax weights.
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
        entry = tl.program_id(0)
        n = tl.load(counts + entry) - tl.program_id(1) * T
        if (n <= 0) | (reads(tl.load(codecs + entry), CODEC) == 0):
            return
        head = tl.load(heads + entry)
        index = tl.program_id(1) * T + t
        slot = tl.load(firsts + entry) + index
        place = tl.zeros([T], tl.int32) - 1
        page = tl.zeros([T], tl.int64) + tl.load(pages + entry)
    mask = (t < n) & (slot < candidates)
    k = tl.trans(keys_of(raw, grid, half, words, page, index, mask, T, CODEC, G).to(DTYPE))
    c = tl.arange(0, G.k_pad)[None, :]
    for g in range(GROUP):
        q_head = head * GROUP + g
        sums = tl.zeros([T], tl.float32)
        for start in range(0, window, W):
            row = start + tl.arange(0, W)
            at = (row * HEADS + q_head)[:, None] * G.k_size + c
            inside = row < window
            q = tl.load(query + at, mask=inside[:, None] & (c < G.k_size), other=0.0).to(DTYPE)
            logits = dot(q, k, tl.zeros([W, T], tl.float32)) * (scale * LOG2E)
            total = tl.load(lse + row * HEADS + q_head, mask=inside, other=float("inf")) * LOG2E
            seen = place[None, :] <= (tail_length - window + row)[:, None]
            sums += tl.sum(tl.where(seen, tl.exp2(logits - total[:, None]), 0.0), 0)
        tl.store(out + q_head.to(tl.int64) * candidates + slot, sums, mask=mask)
