"""Compactions of several layers at once leave what those of each layer alone leave."""

from __future__ import annotations

import random
import types

import numpy as np
import pytest
import torch

from tests.gpu.cache import CHUNKS, POSITIONS, tables_of
from vllm_kvcrush.codecs import FITTED
from vllm_kvcrush.engine.worker.backends.triton import TritonCacheLayer, TritonCacheLayers
from vllm_kvcrush.engine.worker.region import Region
from vllm_kvcrush.ops.angles import Angles
from vllm_kvcrush.ops.triton.codecs.fitted.tables import LayerTable

LAYERS, HEADS, GROUP, SIZE, BLOCK, BLOCKS = 3, 2, 2, 32, 32, 26
TAIL = [3, 9, 4, 20, 11]
TOKENS = 150  # in TAIL


def cache(content: torch.Tensor, fitted: bool) -> list[TritonCacheLayer]:
    """Returns the layers of a cache in vLLM's layout; with tables, of which no two layers in a row
    have the same."""
    layers = []
    page_bytes = BLOCK * 2 * SIZE * content.itemsize
    tables = tables_of(SIZE, HEADS) if fitted else {}
    for i in range(LAYERS):
        own = {}
        for codec, t in tables.items():
            angles = Angles(t.rope, POSITIONS)
            own[codec] = LayerTable(t, i % 2, range(HEADS), page_bytes, SIZE, angles)
        impl = types.SimpleNamespace(head_size=SIZE, scale=SIZE**-0.5, num_heads=GROUP * HEADS)
        attention = types.SimpleNamespace(kv_cache=content[:, i], impl=impl)
        layers.append(TritonCacheLayer(attention, LAYERS, own))
    return layers


def regions(
    draw: random.Random,
    layers: list[TritonCacheLayer],
    blocks: list[int],
    codecs: list[str],
    held: np.ndarray,
    old: Region | None,
) -> tuple[Region, list[int], list[torch.Tensor]]:
    """Returns pages for some of the tokens held by each layer and head, the layers' order, and the
    slots of each layer in order of their positions, -1 past a head's own. Heads have unequal
    numbers, and some none of a codec."""
    tokens = np.zeros((len(codecs), *held.shape), dtype=np.int64)
    for part, codec in enumerate(codecs):
        for layer in range(LAYERS):
            for head in range(HEADS):
                room = layers[layer].pages.capacity(codec, head)
                most = held[layer, head] // len(codecs)
                tokens[part, layer, head] = draw.choice([0, min(room, most), draw.randrange(most)])
    region, order = Region.of(blocks, codecs, tokens, [layer.pages for layer in layers], TAIL, old)
    chosen = []
    for layer in range(LAYERS):
        counts = tokens[:, layer].sum(0)
        own = torch.full((HEADS, int(counts.max())), -1)
        for head, n in enumerate(counts.tolist()):
            own[head, :n] = torch.tensor(sorted(draw.sample(range(held[layer, head]), n))).long()
        chosen.append(own)
    return region, order, chosen


ALL, SOME = [range(LAYERS)], [range(1), range(1, LAYERS)]


@pytest.mark.parametrize(
    ("codecs", "together"),
    [
        (["raw"], ALL),
        (["int8", "int4"], SOME),
        (["tc4"], ALL),
        (["int4", "tc6", "tc8", "exact"], SOME),
        (["tada", "gear"], ALL),
    ],
    ids=lambda x: "+".join(map(str, x)),
)
def test_layers_together(draw: random.Random, codecs: list[str], together: list[range]) -> None:
    fitted = any(codec in FITTED for codec in codecs)
    content = torch.full((BLOCKS, LAYERS, HEADS, BLOCK, 2 * SIZE), torch.nan)
    content[TAIL] = torch.randn(len(TAIL), *content.shape[1:])
    pools = content, content.clone()
    alone, joined = (cache(pool, fitted) for pool in pools)
    both = TritonCacheLayers(joined)
    tail = torch.tensor(TAIL, dtype=torch.int32)
    held = np.full((LAYERS, HEADS), TOKENS)
    old: Region | None = None
    free = [b for b in range(BLOCKS) if b not in TAIL]
    # Into fresh blocks, and then into some of these and others, all of which are read first.
    for position, blocks, parts in (
        (100, free[:8], together),
        (100 + TOKENS, free[4:12], [range(LAYERS)]),
    ):
        new, order, chosen = regions(draw, alone, blocks, codecs, held, old)
        counts = new.tokens.tolist()
        for i in order:
            source = alone[i].source(old, tail, TOKENS, position)
            alone[i].compact(source, chosen[i].clamp(min=0), counts[i], new)
        new.uploaded = None
        most = int(new.tokens.max())
        for layers in parts:
            slots = torch.cat(
                [torch.nn.functional.pad(chosen[i], (0, most - chosen[i].shape[1])) for i in layers]
            )
            alike = bool((new.tokens[layers.start : layers.stop] == most).all())
            both.compact(layers, old, tail, TOKENS, position, slots.clamp(min=0), alike, new)
        # What the tokens of a page share is found in torch, whose sums may differ by batches.
        chunks = any(codec in CHUNKS for codec in codecs)
        assert chunks or torch.equal(*(pool.view(torch.uint8) for pool in pools))
        for mine, other in zip(alone, joined, strict=True):
            sources = (x.source(new, tail, TOKENS, position) for x in (mine, other))
            tokens = (np.array(counts[mine.index]) + TOKENS).tolist()
            a, b = (x.held(s, tokens) for x, s in zip((mine, other), sources, strict=True))
            for x, y in ((a.keys, b.keys), (a.values, b.values)):
                assert (x - y).abs().mean() <= (1e-3 * y.abs().mean() if chunks else 0)
        held, old = new.tokens.numpy() + TOKENS, new


@pytest.mark.parametrize("layers", [2, 40])
def test_as_many_layers_as_fit(layers: int) -> None:
    """What is on its way into new pages at once stays within `STAGING`."""
    from vllm_kvcrush.engine.worker import memory

    content = torch.full((2, LAYERS, HEADS, BLOCK, 2 * SIZE), torch.nan)
    both = TritonCacheLayers(cache(content, False))
    tokens = memory.STAGING // (layers * HEADS * 2 * SIZE * 4)
    assert both.at_once(tokens, ["int8"]) == layers
    assert both.at_once(tokens * layers * 2, ["int8"]) == 1, "one at least"
    assert both.at_once(tokens, ["gear"]) == max(1, layers // memory.copies(True))
