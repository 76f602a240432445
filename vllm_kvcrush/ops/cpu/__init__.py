"""The CPU kernels of csrc/, on torch tensors; importing this package loads the library."""

from vllm_kvcrush.ops.cpu.cache import Batch, Directory, Layer, Source
from vllm_kvcrush.ops.cpu.kernels import (
    attention,
    compact,
    decode,
    encode,
    fill,
    gather,
    positions,
    read,
    store,
)
from vllm_kvcrush.ops.cpu.layer_kv import LayerKV
from vllm_kvcrush.ops.cpu.library import (
    DTYPES,
    VERSION,
    capacity,
    isa,
    scratch_peak,
    threads,
    use_isa,
)
from vllm_kvcrush.ops.cpu.merge import merge, nearest_kept, redundancy, spread
from vllm_kvcrush.ops.cpu.select import REDUCTIONS, mask_slots, represent, top_mask, window_scores
from vllm_kvcrush.ops.cpu.tables import LayerTable

__all__ = [
    "DTYPES",
    "REDUCTIONS",
    "VERSION",
    "Batch",
    "Directory",
    "Layer",
    "LayerKV",
    "LayerTable",
    "Source",
    "attention",
    "capacity",
    "compact",
    "decode",
    "encode",
    "fill",
    "gather",
    "isa",
    "mask_slots",
    "merge",
    "nearest_kept",
    "positions",
    "read",
    "redundancy",
    "represent",
    "scratch_peak",
    "spread",
    "store",
    "threads",
    "top_mask",
    "use_isa",
    "window_scores",
]
