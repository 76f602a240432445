"""Storing new tokens in the raw tail."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,valid-type"

import triton
import triton.language as tl

from vllm_kvcrush.ops.triton.config import ANY_ADDRESS


@triton.jit(
    do_not_specialize=["rows", "block_pages", "first_page"],
    do_not_specialize_on_alignment=ANY_ADDRESS,
)
def store_kernel(
    raw, key, value, slots, rows, key_stride, value_stride, block_pages, first_page,
    T: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of T rows, KV heads). slots: int64 [rows], block * block_size + place; negative
    ones skip the row."""
    head = tl.program_id(1)
    i = tl.program_id(0) * T + tl.arange(0, T)
    slot = tl.load(slots + i, mask=i < rows, other=-1)
    size: tl.constexpr = G.k_size + G.v_size
    # Negative slots are masked: that they divide otherwise than in Python does not matter.
    page = slot // G.block_size * block_pages + first_page + head
    at = raw + (page * (G.page_bytes // G.itemsize) + slot % G.block_size * size)[:, None]
    c = tl.arange(0, G.k_pad)[None, :]
    row = i.to(tl.int64)[:, None]
    mask = (slot >= 0)[:, None] & (c < G.k_size)
    tl.store(at + c, tl.load(key + row * key_stride + head * G.k_size + c, mask=mask), mask=mask)
    c = tl.arange(0, G.v_pad)[None, :]
    mask = (slot >= 0)[:, None] & (c < G.v_size)
    x = tl.load(value + row * value_stride + head * G.v_size + c, mask=mask)
    tl.store(at + G.k_size + c, x, mask=mask)
