"""vLLM's FlashAttention over its own paged cache: what plain vLLM runs on NVIDIA's GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_device.cases import SHAPES, Case
from benchmarks.gpu_device.timing import Call


class Unavailable(RuntimeError):
    """There is no such kernel here; the message says why."""


def load(size: int) -> tuple[Any, int]:
    """Returns the function and the version of FlashAttention that vLLM chooses for a head size."""
    try:
        import vllm.vllm_flash_attn as package
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Unavailable(f"not importable: {reason[0]}") from error
    found = get_flash_attn_version(head_size=size)
    if found is None:
        raise Unavailable("vLLM finds no version of FlashAttention for this device")
    return package.flash_attn_varlen_func, int(found)


class Flash:
    """A batch that holds raw tokens, all of it in vLLM's pages.

    Attributes:
        version: of FlashAttention.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: str, working_set: int):
        heads, kv_heads, size = SHAPES[case.shape]
        self._function, self.version = load(size)
        self._case, self._scale = case, size**-0.5
        blocks = -(-case.context // case.block_size)
        total = blocks * case.batch
        layer_bytes = 2 * total * case.block_size * kv_heads * size * dtype.itemsize
        layers = max(1, min(32, -(-working_set // layer_bytes)))
        shape = (layers, total, case.block_size, kv_heads, size)
        self._key, self._value = (
            torch.empty(shape, dtype=dtype, device=device).normal_() for _ in range(2)
        )
        self._table = torch.randperm(total, device=device).view(case.batch, blocks).int()
        start = torch.arange(case.batch + 1, dtype=torch.int32, device=device)
        self._start = start * case.rows
        self._held = torch.full((case.batch,), case.context, dtype=torch.int32, device=device)
        self.query = torch.randn(case.batch * case.rows, heads, size, device=device).to(dtype)
        self.out = torch.empty_like(self.query)

    def call(self, layer: int) -> None:
        """Computes attention of one layer, into `out`, as vLLM calls it, but for FlashAttention 3's
        schedule, which vLLM makes once a step and this leaves to each call."""
        self._function(
            q=self.query,
            k=self._key[layer],
            v=self._value[layer],
            out=self.out,
            cu_seqlens_q=self._start,
            max_seqlen_q=self._case.rows,
            seqused_k=self._held,
            max_seqlen_k=self._case.context,
            softmax_scale=self._scale,
            causal=True,
            block_table=self._table,
            fa_version=self.version,
        )

    def calls(self) -> list[Call]:
        """Returns one call a layer."""
        return [lambda i=i: self.call(i) for i in range(len(self._key))]  # type: ignore[misc]

    def tokens(self, seq: int) -> tuple[Tensor, Tensor]:
        """Returns float32 keys and values of a sequence in the first layer: [kv_heads, context,
        size]."""
        found = []
        for pool in (self._key, self._value):
            rows = pool[0, self._table[seq].long()].flatten(0, 1)[: self._case.context]
            found.append(rows.transpose(0, 1).float())
        return found[0], found[1]
