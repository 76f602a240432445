"""Storing new tokens in the raw tail: what a step calls before attention."""

from __future__ import annotations

import triton
from torch import Tensor

from vllm_kvcrush.ops.triton.cache import Layer
from vllm_kvcrush.ops.triton.kernels.store import store_kernel

ROWS = 4  # of a program


def store(layer: Layer, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Writes new tokens into raw slots of the tail. Can be captured in a graph.

    Args:
        key, value: [rows, kv_heads, size] in the layer's dtype, rows may be strided.
        slots: int64 [rows], block * block_size + place; negative: skip the row. Later rows of
            key and value than slots has are skipped too.
    """
    if key.dtype != layer.dtype or value.dtype != layer.dtype:
        raise ValueError(f"keys are {key.dtype} and values {value.dtype}, the cache {layer.dtype}")
    for name, x, size in (("key", key, layer.k_size), ("value", value, layer.v_size)):
        if x.shape[1:] != (layer.kv_heads, size) or x.stride()[1:] != (size, 1):
            raise ValueError(f"{name} {tuple(x.shape)} does not fit the layer")
    rows = len(slots)
    if rows > min(len(key), len(value)):
        raise ValueError(f"{rows} slots for {min(len(key), len(value))} rows")
    if rows:
        store_kernel[(triton.cdiv(rows, ROWS), layer.kv_heads)](
            layer.raw, key, value, slots, rows, key.stride(0), value.stride(0),
            layer.block_pages, layer.first_page, T=ROWS, G=layer.geometry, num_warps=2,
        )  # fmt: skip
