"""Paged attention over mixed pages: what a step calls."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vllm_kvcrush.ops.triton.cache import DTYPES, Batch, Layer
from vllm_kvcrush.ops.triton.codecs import RUNS
from vllm_kvcrush.ops.triton.codecs.traits import Loop, Traits
from vllm_kvcrush.ops.triton.config import (
    MERGE_TILE,
    MOST_SPLITS,
    Tiles,
    attention_tiles,
    product_options,
    splits,
)
from vllm_kvcrush.ops.triton.kernels.attention import attention_kernel, merge_kernel


def tiles_for(
    layer: Layer, longest: int, tables: bool = False, crowded: bool = False
) -> tuple[Tiles, bool]:
    """The tiles of a step whose sequences have up to `longest` query rows, with `tables` and
    `crowded` as `attention_tiles` takes them; and whether they are those of decode, in which a
    program has a whole sequence. Only these two kinds are ever compiled, whatever `longest` is."""
    geometry = layer.geometry
    shape = (layer.group, geometry.k_pad, geometry.v_pad, geometry.itemsize, layer.block_size)
    tiles = attention_tiles(*shape, True, layer.wave, tables, crowded)
    if longest <= tiles.queries:
        return tiles, True
    return attention_tiles(*shape, False, layer.wave, tables, crowded), False


@functools.lru_cache(maxsize=1024)
def loops_of(
    variants: tuple[tuple[Traits, ...], ...], capacities: tuple[int, ...], most: int
) -> dict[str, tuple[Loop, ...]]:
    """The kernel's FOUR, TWO and ONE.

    Args:
        variants: of each of RUNS those that there may be.
        capacities: of pages of each of RUNS.
        most: of `Tiles`.
    """
    found: dict[int, list[Loop]] = {4: [], 2: [], 1: []}
    for run, (codecs, capacity) in enumerate(zip(variants, capacities, strict=True)):
        for i, codec in enumerate(codecs):
            tokens = codec.tile(capacity, most)
            for attend, planes, every in codec.loops:
                if every or i == 0:
                    found[planes].append(Loop(codec, attend, run, tokens))
    return {name: tuple(found[planes]) for name, planes in (("FOUR", 4), ("TWO", 2), ("ONE", 1))}


def attention(
    layer: Layer,
    batch: Batch,
    query: Tensor,
    out: Tensor | None,
    lse: Tensor | None = None,
    parts: int | None = None,
) -> None:
    """Paged attention of decode and prefill rows, into `out`.

    A row sees all of its sequence's compressed pages and the tail up to its own token. Nothing
    waits for the device, and the grid depends on the shapes of the arguments alone, so the launch
    can be captured in a graph; rows of no sequence stay as they are.

    Args:
        query: [rows, heads, k_size], unscaled, rows may be strided.
        out: [rows, heads, v_size], rows may be strided; None: only `lse` is wanted.
        lse: None, or float32 [rows, heads]: receives log Σ exp(logit).
        parts: programs that share a row's context, up to 64; None: as many as fill the device.
    """
    rows, geometry = len(query), layer.geometry
    if query.shape[1:] != (layer.heads, layer.k_size) or query.stride()[1:] != (layer.k_size, 1):
        raise ValueError(f"query {tuple(query.shape)} does not fit the layer")
    if out is not None and (
        out.shape != (rows, layer.heads, layer.v_size) or out.stride()[1:] != (layer.v_size, 1)
    ):
        raise ValueError(f"out {tuple(out.shape)} does not fit the layer")
    if rows == 0 or batch.seqs == 0:
        return
    device, directory = query.device, batch.directory
    present = (False,) * len(RUNS) if directory is None else directory.present
    there = {run for run, any_pages in zip(RUNS, present, strict=True) if any_pages}
    variants = tuple(layer.variants(run) if run in there else () for run in RUNS)
    tables = any(codec.needs_tables for codecs in variants for codec in codecs)
    bias = None if directory is None else directory.bias
    crowded = len(there) > 2 and (bias is not None or geometry.padded)
    tiles, uniform = tiles_for(layer, batch.longest, tables, crowded)
    capacities = tuple(
        layer.most(run) if codecs else 0 for run, codecs in zip(RUNS, variants, strict=True)
    )
    blocks = batch.seqs if uniform else rows // tiles.queries + batch.seqs
    if parts is None:
        parts = splits(blocks, layer.kv_heads, _processors(query.device))
    shape = (rows, layer.heads, parts)
    if lse is None:
        lse = torch.empty(shape[:2], dtype=torch.float32, device=device)
    to, sums = out, lse
    if parts > 1:
        sums = torch.empty(shape, dtype=torch.float32, device=device)
        if out is not None:
            to = torch.empty((*shape, layer.v_size), dtype=torch.float32, device=device)
    attention_kernel[(blocks, layer.kv_heads, parts)](
        to if to is not None else lse,
        sums,
        query,
        *layer.views(),
        batch.query_start,
        batch.length,
        batch.table,
        batch.states,
        # Arguments that a variant does not read still need an address.
        batch.states if directory is None else directory.blocks,
        batch.states if directory is None else directory.runs,
        batch.states if directory is None else directory.page,
        batch.states if directory is None else directory.count,
        batch.states if bias is None else bias,
        *layer.tables(),
        layer.scale,
        parts,
        batch.seqs,
        layer.block_pages,
        layer.first_page,
        query.stride(0),
        layer.heads * layer.v_size if out is None else out.stride(0),
        batch.table.stride(0),
        0 if directory is None else directory.runs.stride(0),
        0 if directory is None else directory.shift,
        HEADS=layer.heads,
        GROUP=layer.group,
        G=geometry,
        TILES=tiles,
        DTYPE=DTYPES[layer.dtype],
        UNIFORM=uniform,
        SPLIT=parts > 1,
        PAGED=directory is not None,
        RUNS=len(RUNS),
        **loops_of(variants, capacities, tiles.most),
        BIAS=bias is not None,
        VALUES=out is not None,
        PTX=layer.ptx,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **product_options(layer.wave),
    )
    if parts > 1:
        merge_kernel[(rows, layer.heads)](
            out if out is not None else lse,
            lse,
            to if to is not None else lse,
            sums,
            batch.query_start,
            parts,
            batch.seqs,
            0 if out is None else out.stride(0),
            HEADS=layer.heads,
            SIZE=layer.v_size,
            PAD=geometry.v_pad,
            MOST=MOST_SPLITS,
            TILE=MERGE_TILE,
            VALUES=out is not None,
            num_warps=1,
        )


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
