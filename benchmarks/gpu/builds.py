"""Which kernels are compiled, in which variants, and for which devices."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Multiplications and additions are fused on purpose; Triton 3.9 warns where nobody says so.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu.model import BLOCK_SIZE
from vllm_kvcrush.codecs import FITTED
from vllm_kvcrush.codecs.transform.bits import quantiser
from vllm_kvcrush.codecs.transform.points import POINTS
from vllm_kvcrush.ops.triton.attention import loops_of
from vllm_kvcrush.ops.triton.codecs import BY_NAME, RUNS
from vllm_kvcrush.ops.triton.codecs.fitted import encoding as fitted_encoding
from vllm_kvcrush.ops.triton.codecs.fitted import launch as fitted_launch
from vllm_kvcrush.ops.triton.codecs.fitted.tables import Variant
from vllm_kvcrush.ops.triton.compaction import SLOTS
from vllm_kvcrush.ops.triton.config import (
    MERGE_TILE,
    MOST_SPLITS,
    attention_tiles,
    encode_tiles,
    gather_warps,
    product_options,
)
from vllm_kvcrush.ops.triton.kernels import attention as attention_kernels
from vllm_kvcrush.ops.triton.kernels import compaction as compaction_kernels
from vllm_kvcrush.ops.triton.kernels import scores as scores_kernels
from vllm_kvcrush.ops.triton.kernels import store as store_kernels
from vllm_kvcrush.ops.triton.layout import Geometry

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16}
PRODUCTS = ("decode", "prefill", "scores")  # kernels that multiply matrices
PLAIN = ("int4", "int8", "raw")
# Pointers whose type is not the model's dtype.
POINTERS = {
    **dict.fromkeys(("lse", "partial", "partial_lse", "log_bias"), "*fp32"),
    **dict.fromkeys(("query_start", "lengths", "table", "states", "region_blocks"), "*i32"),
    **dict.fromkeys(("tail_table", "runs", "pages"), "*i32"),
    **dict.fromkeys(("counts", "begins", "ends", "codecs", "firsts", "heads"), "*i32"),
    **dict.fromkeys(("tail_slot", "position", "wide", "candidates"), "*i32"),
    **dict.fromkeys(("bias", "slots"), "*i64"),
    **{"half": "*fp16", "words": "*i16", "codes": "*u8", "info": "*i32", "fields": "*i32"},
    **dict.fromkeys(("base", "mean", "forward", "cost", "top", "coarse", "fine", "loss"), "*fp32"),
    **{"numbers": "*i32", "component": "*u8"},
}
MODEL = ("query", "raw", "key", "value", "out", "inverse")
# Strides that are multiples of 16 wherever head sizes are: Triton's JIT sees and uses that.
ALIGNED = ("query_stride", "out_stride", "key_stride", "value_stride")


KV_HEADS = 8
# Of a layer that has tables of all fitted codecs. Any head's values can have 2 to 4 bits: one each.
RECORDS = BY_NAME | {
    point.name: BY_NAME[point.name].with_own(Variant(i, KV_HEADS, point.local, 4 - i))
    for i, point in enumerate(POINTS)
}


@dataclass(frozen=True)
class Build:
    """One kernel in one variant.

    Attributes:
        kernel: what the variant does, for tables.
        codec: of the pages, "mixed" for all, "-" where that makes no difference.
        size: head size; group: query heads of a KV head.
        constants: values of the kernel's compile-time arguments.
        types: of pointers that differ from the rule.
        tile: tokens that one pass of the main loop reads, if there is one.
    """

    kernel: str
    codec: str
    size: int
    group: int
    dtype: str
    function: Any
    constants: dict[str, Any]
    warps: int
    stages: int
    types: dict[str, str] = dataclasses.field(default_factory=dict)
    tile: int = 0

    @property
    def name(self) -> str:
        """Returns a name that is unique among all builds."""
        return f"{self.kernel} {self.codec} {self.size}/{self.group} {self.dtype}"

    def compile(self, target: str) -> Any:
        """Triton's compiled kernel for a name in TARGETS."""
        names = list(inspect.signature(self.function.fn).parameters)
        grid = "bf16" if self.dtype == "bf16" else "fp16"
        signature, hints = {}, {}
        for i, name in enumerate(names):
            kind = self.types.get(name) or POINTERS.get(name)
            if name.isupper():
                kind = "constexpr"
            elif name == "grid":
                kind = "*" + grid
            elif kind is None:
                kind = "*" + self.dtype if name in MODEL else "fp32" if name == "scale" else "i32"
            signature[name] = kind
            if kind.startswith("*") or name in ALIGNED:
                hints[(i,)] = [["tt.divisibility", 16]]
        constants = dict(self.constants)
        if "PTX" in names:
            constants["PTX"] = target != "gfx942"
        source = ASTSource(self.function, signature, constants, hints)
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if self.kernel in (*PRODUCTS, "gather"):
            options |= product_options(TARGETS[target].warp_size)
        return triton.compile(source, target=TARGETS[target], options=options)


def attention(codec: str, size: int, group: int, dtype: str, decode: bool, target: str) -> Build:
    """Yields the attention kernel. Codec "raw" is a tail alone, as before any compaction, and
    "int8+tc4" what `auto` makes of most budgets."""
    parts = set(PLAIN if codec == "mixed" else () if codec == "raw" else codec.split("+"))
    wave = TARGETS[target].warp_size
    page = Geometry.of(BLOCK_SIZE, size, size, DTYPES[dtype].primitive_bitwidth // 8)
    shape = (group, page.k_pad, page.v_pad, page.itemsize, BLOCK_SIZE)
    if len(parts) > 1:
        parts.add("raw")
    tables = any(RECORDS[c].needs_tables for c in parts)
    crowded = len(parts) > 2 and page.padded
    tiles = attention_tiles(*shape, decode, wave, tables, crowded)
    records = tuple((RECORDS[run],) if run in parts else () for run in RUNS)
    sections = dict(page.sections)
    room = tuple(sections[run].capacity if run in sections else 0 for run in RUNS)
    loops = loops_of(records, room, tiles.most)
    constants = {
        **{"HEADS": KV_HEADS * group, "GROUP": group, "G": page, "TILES": tiles},
        **{"DTYPE": DTYPES[dtype], "UNIFORM": decode, "SPLIT": decode},
        **{"RUNS": len(RUNS), **loops, "BIAS": False, "VALUES": True},
        "PAGED": bool(parts),
    }
    first = next((loop for kind in loops.values() for loop in kind), None)
    tile = first.tokens if first and codec != "mixed" else tiles.tail
    return Build(
        "decode" if decode else "prefill", codec, size, group, dtype,
        attention_kernels.attention_kernel, constants, tiles.warps, tiles.stages,
        {"out": "*fp32"} if decode else {}, tile,
    )  # fmt: skip


def others(size: int, group: int, dtype: str) -> Iterator[Build]:
    """Yields everything but attention, for codecs without tables."""
    page = Geometry.of(BLOCK_SIZE, size, size, DTYPES[dtype].primitive_bitwidth // 8)
    same = (size, group, dtype)
    yield Build(
        "merge", "-", *same, attention_kernels.merge_kernel,
        {"HEADS": KV_HEADS * group, "SIZE": size, "PAD": page.v_pad, "MOST": MOST_SPLITS}
        | {"TILE": MERGE_TILE, "VALUES": True},
        1, 3,
    )  # fmt: skip
    yield Build("store", "raw", *same, store_kernels.store_kernel, {"T": 4, "G": page}, 2, 3)
    yield from _tokens(PLAIN, *same)
    tokens, encode_warps = encode_tiles(page.k_pad, page.v_pad)
    for codec in PLAIN:
        yield Build(
            "encode", codec, *same, compaction_kernels.encode_kernel,
            {"T": 64, "V": tokens, "POSITIONS": True, "G": page, "CODEC": RECORDS[codec]},
            encode_warps, 3, {"key": "*fp32", "value": "*fp32"},
        )  # fmt: skip


def _tokens(codecs: tuple[str, ...], size: int, group: int, dtype: str) -> Iterator[Build]:
    """Yields what reads single tokens of codecs."""
    page = Geometry.of(BLOCK_SIZE, size, size, DTYPES[dtype].primitive_bitwidth // 8)
    same = (size, group, dtype)
    for codec in codecs:
        own = {"CODEC": RECORDS[codec], "DTYPE": DTYPES[dtype], "G": page}
        yield Build(
            "gather", codec, *same, compaction_kernels.gather_kernel,
            {"T": SLOTS, "KEYS": True, "VALUES": True, "POSITIONS": True, **own},
            gather_warps(page.k_pad, page.v_pad), 3, {"key": "*fp32", "value": "*fp32"},
        )  # fmt: skip
        slots, warps, stages = RECORDS[codec].scores_tiles(page)
        yield Build(
            "scores", codec, *same, scores_kernels.scores_kernel,
            {"T": slots, "W": 32, "GROUP": group, "HEADS": KV_HEADS * group}
            | {"TAIL": codec == "raw", "BIAS": False, "GREATEST": False, **own},
            warps, stages, {"out": "*fp32"},
        )  # fmt: skip


def fitted(size: int, group: int, dtype: str) -> Iterator[Build]:
    """Yields everything but attention for fitted codecs."""
    page = Geometry.of(BLOCK_SIZE, size, size, DTYPES[dtype].primitive_bitwidth // 8)
    same = (size, group, dtype)
    yield from _tokens(FITTED, *same)
    for codec in FITTED:
        variant, warps = RECORDS[codec].own, fitted_launch.warps(page)
        pages = {"CODEC": RECORDS[codec].number, "G": page}
        yield Build(
            "encode: codes", codec, *same, fitted_encoding.fitted_components_kernel,
            {"T": fitted_launch.TOKENS, "LOCAL": variant.local, **pages},
            warps, fitted_launch.STAGES, {"key": "*fp32"},
        )  # fmt: skip
        yield Build(
            "encode: keys", codec, *same, fitted_encoding.fitted_keys_kernel,
            {"T": fitted_launch.TOKENS, **pages}, fitted_launch.KEYS_WARPS, 3,
            {"key": "*fp32", "component": "*i32"},
        )  # fmt: skip
        step = quantiser(variant.bits).step
        yield Build(
            "encode: values", codec, *same, fitted_encoding.fitted_values_kernel,
            {"T": fitted_launch.VALUES, "BITS": variant.bits, "STEP": step, **pages},
            warps, 3, {"value": "*fp32"},
        )  # fmt: skip


def builds(quick: bool, target: str) -> list[Build]:
    """Returns all variants for a target, or a sample."""
    if quick:
        # What is hardest to compile: these have spilled, or ended in an error of AMD's compiler.
        found = [
            attention("int4", 128, 4, "bf16", True, target),
            attention("mixed", 128, 4, "bf16", False, target),
            attention("int8", 64, 3, "bf16", False, target),
            attention("tc6", 128, 4, "bf16", True, target),
        ]
        codec = {"gather": "int4", "encode": "int4", "scores": "int8", "merge": "-", "store": "raw"}
        found += [b for b in others(256, 8, "bf16") if b.codec == codec[b.kernel]]
        return found + [b for b in fitted(256, 8, "bf16") if b.codec == "tc6"]
    codecs = ("raw", "int8", "int4", *FITTED, "mixed")
    found = [
        attention(codec, size, group, "bf16", True, target)
        for size, group in ((64, 3), (96, 8), (128, 4), (256, 8))
        for codec in codecs
    ]
    found.append(attention("mixed", 128, 4, "fp16", True, target))
    found += [
        attention(codec, size, group, "bf16", False, target)
        for size, group in ((64, 3), (128, 4))
        for codec in codecs
    ]
    found += [attention("mixed", 256, 8, "bf16", False, target)]
    found += [attention("int8+tc4", 128, 4, "bf16", d, target) for d in (True, False)]
    for size, group in ((64, 3), (128, 4), (256, 8)):
        found += others(size, group, "bf16")
        found += fitted(size, group, "bf16")
    return found
