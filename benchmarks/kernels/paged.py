"""vLLM's paged KV cache on the CPU, written by vLLM's own store."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels.cases import PAGE, Case


class PagedCache:
    """One layer's cache.

    Attributes:
        blocks: [blocks, kv_heads, PAGE, 2 * head_size]; K's order inside a block is the kernel's.
        isa: the kernel that vLLM chooses for this dtype and head size.
    """

    def __init__(self, case: Case, dtype: torch.dtype, contents: Tensor):
        """Gives block i the contents of the case's distinct page `contents[i]`."""
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        heads, size = case.shape.kv_heads, case.shape.head_size
        self.isa: str = _get_attn_isa(dtype, PAGE, size)
        distinct = torch.empty(len(case.keys), heads, PAGE, 2 * size, dtype=dtype)
        keys, values = (
            part.to(dtype).transpose(1, 2).reshape(-1, heads, size)
            for part in (case.keys, case.values)
        )
        store(keys, values, distinct, torch.arange(len(keys)), self.isa)
        self.blocks = distinct[contents]


def split(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a layer's cache as vLLM's ops take it, K and V."""
    blocks, heads, page, double = cache.shape
    key, value = cache.view(blocks, heads, 2 * page, double // 2).chunk(2, dim=2)
    return key, value


def store(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor, isa: str) -> None:
    """vLLM's store: K and V `[tokens, kv_heads, head_size]` into `slots` of `cache`."""
    from vllm import _custom_ops as ops

    ops.cpu_attn_reshape_and_cache(keys, values, *split(cache), slots, isa)
