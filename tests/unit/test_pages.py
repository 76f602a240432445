"""Page sizes: the Python description against the compiled library's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcrush import pages
from vllm_kvcrush.ops import cpu

SIZES = st.integers(1, 32).map(lambda eighths: 8 * eighths)


@given(
    codec=st.sampled_from(list(pages.CODECS)),
    block_size=st.integers(1, 40).map(lambda strips: 16 * strips),
    k_size=SIZES,
    v_size=SIZES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_capacity_is_what_the_library_says(
    codec: str, block_size: int, k_size: int, v_size: int, dtype: torch.dtype
) -> None:
    page_bytes = block_size * (k_size + v_size) * dtype.itemsize
    tokens = pages.capacity(codec, page_bytes, k_size, v_size, dtype.itemsize)
    assert tokens == cpu.capacity(codec, page_bytes, k_size, v_size, dtype)
    assert tokens % pages.STRIP == 0
    room = page_bytes - (0 if codec == "raw" else pages.HEADER)
    used = pages.layout(codec, tokens, k_size, v_size, dtype.itemsize).end
    more = pages.layout(codec, tokens + pages.STRIP, k_size, v_size, dtype.itemsize).end
    assert used <= room < more or tokens == 65520
    if codec == "raw":
        assert tokens == block_size


@pytest.mark.parametrize(
    ("codec", "dtype", "tokens"),
    [
        ("raw", torch.bfloat16, 128),
        ("exact", torch.bfloat16, 112),
        ("int8", torch.bfloat16, 240),
        ("int4", torch.bfloat16, 448),
        ("int8", torch.float32, 480),
        ("int4", torch.float32, 896),
    ],
)
def test_pages_of_128_tokens(codec: str, dtype: torch.dtype, tokens: int) -> None:
    assert pages.capacity(codec, 128 * 128 * dtype.itemsize, 64, 64, dtype.itemsize) == tokens
