"""Sizes of tiles, warps, stages and splits: everything that is a choice, not a format."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_kvcrush.codecs.layout import GROUP

# Of scores. With 4 warps or a third tile on its way, ptxas spills a register at some head sizes, in
# order to fit one block more.
SCORES_WARPS, SCORES_STAGES = 8, 2
# Kernels' arguments that point to small tables, slices of which start anywhere. Triton compiles a
# kernel anew for each kind of number or address that it may look at: what differs from step to
# step, layer to layer or request to request is kept from it, or it would compile while serving.
ANY_ADDRESS = (
    *("query_start", "lengths", "table", "states", "region_blocks", "runs", "pages", "counts"),
    *("bias", "log_bias", "info", "slots", "tail_table", "tail_slot", "begins", "ends", "heads"),
    *("codecs", "firsts", "candidates"),
)
MOST_SPLITS = 64
MERGE_TILE = 8  # splits that are merged at a time: with 64 at once, heads of 128 spill
SLACK = 1.15  # slots of a page's tiles over its capacity that are worth larger tiles


def tile_tokens(capacity: int, most: int) -> int:
    """Tokens of the tiles that a page is read in: the largest power of two up to `most` whose tiles
    do not reach far past the page's end. 16 where nothing fits."""
    tokens = most
    while tokens > 16 and -(-capacity // tokens) * tokens > SLACK * max(capacity, 1):
        tokens //= 2
    return tokens


@dataclass(frozen=True)
class Tiles:
    """How the attention kernel cuts its work: a compile-time constant.

    Attributes:
        rows: query rows times query heads of a KV head in a program, a power of two.
        queries: query rows in a program.
        most: tokens of a codec's tile, if its pages hold as many.
        tail: tokens of a tile of the tail.
        warps, stages: of the compiled kernel.
    """

    rows: int
    queries: int
    most: int
    tail: int
    warps: int
    stages: int


def attention_tiles(
    group: int,
    k_pad: int,
    v_pad: int,
    itemsize: int,
    block_size: int,
    decode: bool,
    wave: int = 32,
    tables: bool = False,
    crowded: bool = False,
) -> Tiles:
    """Tiles of the attention kernel: of a layer one choice for decode and one for prefill, however
    long a chunk is.

    Args:
        group: query heads of a KV head.
        k_pad, v_pad: padded head sizes.
        itemsize: bytes of the model's dtype.
        block_size: tokens of a raw page.
        decode: every sequence has one query row, or as few as fit the same tiles; else prefill.
        wave: threads of a warp; 64 on AMD.
        tables: there may be pages of codecs with tables, whose loop needs most registers.
        crowded: there may be pages of three kinds, and log biases or padded heads besides. With a
            third tile on its way ptxas then spills a register or two to fit one block more.
    """
    size = max(k_pad, v_pad)
    rows = max(16, 1 << (group - 1).bit_length())
    prefill = not decode or rows > 64
    if prefill:
        least = 32 if size * itemsize > 256 else 64
        rows = max(rows, least // 2 if tables and size > 64 else least)
    warps = 8 if rows * size > 64 * 128 else 4
    columns = v_pad // 4
    if rows == 16 and (wave == 64 or columns == 16):
        # Products of 16 rows are divided by columns, 16 to a warp: more warps than int4's planes
        # have would all do the same.
        warps = min(4, columns // 16)
    if tables:
        warps = max(warps, 4)  # keys are made by all of them
    # What a program adds up, [rows, v_pad], and a tile's weights share the registers of its warps:
    # larger tiles than these spill.
    most = 32 if warps == 1 or size * itemsize > (128 if prefill else 256) else 64
    return Tiles(
        rows=rows,
        queries=rows // group,
        most=most,
        tail=tile_tokens(block_size, most),
        warps=warps,
        stages=2 if prefill or crowded or size * itemsize > 256 else 3,
    )


def gather_warps(k_pad: int, v_pad: int) -> int:
    """Warps of a program that gathers: a thread's share of its tokens' keys, or values, is its
    registers."""
    return 8 if max(k_pad, v_pad) > 128 else 4


def encode_tiles(k_pad: int, v_pad: int) -> tuple[int, int]:
    """Tokens whose values a program encodes, and its warps. Int4's values need the most registers:
    with more than 32 of them a thread, or with 16 warps, which have half the registers, they
    spill."""
    return min(GROUP, GROUP * 128 // v_pad), min(8, max(k_pad, v_pad) // 16)


def product_options(wave: int) -> dict[str, int]:
    """What kernels that multiply are compiled with besides, by threads of a warp. On AMD: matrix
    instructions of 16 rows, not 32. With 32, int8's prefill at 64, which reads tiles of 64 tokens
    ahead, ends in an error of Triton 3.9's LLVM ("Bad machine code: Virtual register defs don't
    dominate all uses"), and scores and prefill at 256 spill; with 16, scores need a third of the
    registers and no prefill needs more than before."""
    return {"matrix_instr_nonkdim": 16} if wave == 64 else {}


def splits(sequences: int, kv_heads: int, processors: int) -> int:
    """Programs that share one decode row's context: enough to fill the processors about twice.

    Depends on nothing that changes between steps of a captured graph.
    """
    wanted = 2 * processors // max(1, sequences * kv_heads)
    return max(1, min(MOST_SPLITS, 1 << max(0, wanted.bit_length() - 1)))
