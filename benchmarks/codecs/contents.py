"""The page contents that the study compares: each turns a cache into what its pages would give
back, and counts their bytes."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.codecs.model import Cache, Coded
from vllm_kvcrush.codecs import CODECS, chunk, layout
from vllm_kvcrush.codecs.layout import SINKS
from vllm_kvcrush.codecs.reference import token_grids
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.codecs.transform.tables import HeadTables, Tables
from vllm_kvcrush.plan import Packing

DIRECTORY = 7  # bytes of a page in its request's directory

# A block size and the bytes of a raw channel.
Size = tuple[int, int]


@dataclass(frozen=True)
class Setting:
    """What contents may need besides the cache.

    Attributes:
        tables: transform tables, by the name of their operating point.
        rope: the model's rotary embedding.
        scale: factor of q·k.
        sizes: the sizes for which bytes are counted; the first one also decides which tokens share
            a page.
    """

    tables: dict[str, Tables]
    rope: Rope
    scale: float
    sizes: tuple[Size, ...]


Encode = Callable[[Cache, Setting], Coded]
Kept = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


# -- bytes ----------------------------------------------------------------------------------------


def _page_bytes(cache: Cache, block: int, itemsize: int) -> int:
    return block * (cache.keys.shape[-1] + cache.values.shape[-1]) * itemsize


def raw_bytes(cache: Cache, block: int, itemsize: int) -> int:
    """Returns the bytes of whole blocks of raw tokens."""
    layers, heads, n, _ = cache.keys.shape
    return -(-n // block) * layers * heads * _page_bytes(cache, block, itemsize)


def _bytes(cache: Cache, size: Size, rooms: Tensor, tokens: int) -> int:
    """Returns the bytes of whole blocks and the directory for `tokens` tokens in each head, whose
    pages hold as many as `rooms` [L, H] says."""
    held = rooms.flatten().tolist()
    packing = Packing("", (tuple(Counter(held).items()),))
    owned = sum(-(-tokens // room) for room in held)
    return packing.blocks(tokens) * len(held) * _page_bytes(cache, *size) + owned * DIRECTORY


# -- calibration-free contents --------------------------------------------------------------------


def raw(cache: Cache, setting: Setting) -> Coded:
    """Returns the cache as it is."""
    sizes = {at: raw_bytes(cache, *at) for at in setting.sizes}
    return Coded(cache.keys, cache.values, sizes)


def _by_page(
    cache: Cache,
    rooms: Tensor,
    kept: Callable[[int, int, slice], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Returns what all pages give back; `kept` gives it for a layer, a head and some tokens."""
    layers, heads, n, _ = cache.keys.shape
    keys, values = torch.empty_like(cache.keys), torch.empty_like(cache.values)
    for layer in range(layers):
        for head in range(heads):
            room = int(rooms[layer, head])
            for start in range(0, n, room):
                here = slice(start, min(start + room, n))
                k, v = kept(layer, head, here)
                keys[layer, head, here], values[layer, head, here] = k, v
    return keys, values


def _alike(room: Callable[[int, int, int, int], int], kept_page: Kept) -> Encode:
    """Returns a content: pages that are alike in all heads.

    Args:
        room: tokens of a page, of its bytes, both head sizes and an element's bytes.
        kept_page: what one gives back of keys and values.
    """

    def encode(cache: Cache, setting: Setting) -> Coded:
        layers, heads, n, size = cache.keys.shape
        rooms = {
            at: torch.full(
                (layers, heads),
                room(_page_bytes(cache, *at), size, cache.values.shape[-1], at[1]),
            )
            for at in setting.sizes
        }

        def kept(layer: int, head: int, here: slice) -> tuple[Tensor, Tensor]:
            return kept_page(cache.keys[layer, head, here], cache.values[layer, head, here])

        keys, values = _by_page(cache, rooms[setting.sizes[0]], kept)
        return Coded(keys, values, {at: _bytes(cache, at, r, n) for at, r in rooms.items()})

    return encode


def flat(codec: str) -> Encode:
    """Returns a content: pages of a codec without tables."""
    record = CODECS[codec]
    return _alike(record.capacity, lambda k, v: record.kept(k, v, k.dtype))


def _chunk_room(pages: Callable[[layout.Chunk, int, int, int], layout.FlatLayout]) -> Any:
    def room(own: layout.Chunk, page_bytes: int, k_size: int, v_size: int, itemsize: int) -> int:
        left = page_bytes - layout.HEADER
        return layout.most_tokens(lambda tokens: pages(own, tokens, k_size, v_size).end, left)

    return room


def tada(own: layout.Chunk) -> Encode:
    """Returns a content: pages as "tada" makes them, with other bits."""
    return _alike(
        functools.partial(_chunk_room(layout.tada_pages), own),
        lambda k, v: (chunk.tada_kept(k, own), chunk.tada_kept(v, own)),
    )


def gear(own: layout.Chunk) -> Encode:
    """Returns a content: pages as "gear" makes them, with other bits, ranks and single channels."""
    return _alike(
        functools.partial(_chunk_room(layout.gear_pages), own),
        lambda k, v: (chunk.gear_keys(k, own)[0], chunk.gear_values(v, own)),
    )


def tada_over_heads(bits: int) -> Encode:
    """Returns a content as TaDA's paper has it: of each token the mean over its KV heads in 16
    bits, and what each head adds in `bits` bits with a float16 scale a side."""

    def side(x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True).half().float()
        rest = (x - mean).flatten(0, 2)
        codes, scale = token_grids(rest, bits)
        return mean + ((codes - (2**bits - 1) / 2) * scale).view(x.shape)

    def encode(cache: Cache, setting: Setting) -> Coded:
        layers, heads, n, size = cache.keys.shape
        channels = size + cache.values.shape[-1]
        token = channels * (bits / 8 + 2 / heads) + 2 * 2 + 2  # mean, scales, position
        rooms = {
            at: torch.full((layers, heads), int((_page_bytes(cache, *at) - layout.HEADER) / token))
            for at in setting.sizes
        }
        held = {at: _bytes(cache, at, room, n) for at, room in rooms.items()}
        return Coded(side(cache.keys), side(cache.values), held)

    return encode


# -- transform coding -----------------------------------------------------------------------------


def _fitted(cache: Cache, tables: Tables, setting: Setting, tokens: int) -> Coded:
    """Returns what pages of a fitted codec give back, and the bytes of `tokens` tokens."""
    layers, heads = cache.keys.shape[:2]
    rooms, exact = {}, {}
    for at in setting.sizes:
        both = [
            tables.capacity(layer, head, _page_bytes(cache, *at), cache.values.shape[-1])
            for layer in range(layers)
            for head in range(heads)
        ]
        rooms[at], exact[at] = (
            torch.tensor(x).view(layers, heads) for x in zip(*both, strict=True)
        )
    first = setting.sizes[0]

    def kept(layer: int, head: int, here: slice) -> tuple[Tensor, Tensor]:
        own = HeadTables(tables, layer, head, int(exact[first][layer, head]))
        k, v = cache.keys[layer, head, here], cache.values[layer, head, here]
        return CODECS[tables.point.name].kept(k, v, k.dtype, cache.positions[here], own)

    keys, values = _by_page(cache, rooms[first], kept)
    return Coded(keys, values, {at: _bytes(cache, at, r, tokens) for at, r in rooms.items()})


def transform(point: str, keep: float = 1.0) -> Encode:
    """Returns a content: transform coding with the tables of `point`, after evicting all but
    the share `keep`."""

    def encode(cache: Cache, setting: Setting) -> Coded:
        coded = _fitted(cache, setting.tables[point], setting, round(cache.length * keep))
        if keep < 1:
            coded.kept = evict(cache, setting, keep)
        return coded

    return encode


# -- eviction -------------------------------------------------------------------------------------


def evict(cache: Cache, setting: Setting, keep: float) -> Tensor:
    """Marks in each head the tokens with most (expected attention + 0.01) · |v|: bool [L, H, n].
    Queries are expected to be as the newest ones were, at the next 512 positions."""
    layers, heads, n, size = cache.keys.shape
    places = cache.positions[-cache.queries.shape[2] :]
    q = setting.rope.rotate(cache.queries, -places).double()
    ahead = torch.arange(n, n + 512)
    mean, second = setting.rope.spread(q.mean(2), q.mT @ q / q.shape[2], ahead)
    spread = (second - mean[..., :, None] * mean[..., None, :]).float()
    keys = cache.keys[:, :, None]
    mean = mean.float().view(layers, heads, -1, size, 1)
    logits = (keys @ mean)[..., 0] * setting.scale
    spread = spread.view(layers, heads, -1, size, size)
    logits = logits + ((keys @ spread) * keys).sum(-1) * setting.scale**2 / 2
    attention = logits.softmax(-1).mean(2)
    scores = (attention + 0.01) * cache.values.norm(dim=-1)
    scores[:, :, :SINKS] = torch.inf
    best = scores.topk(round(n * keep), -1).indices
    return torch.zeros(layers, heads, n, dtype=torch.bool).scatter_(2, best, True)


def evicted(keep: float) -> Encode:
    """Returns a content: raw tokens, after evicting all but the share `keep`."""

    def encode(cache: Cache, setting: Setting) -> Coded:
        share = {at: round(raw_bytes(cache, *at) * keep) for at in setting.sizes}
        return Coded(cache.keys, cache.values, share, kept=evict(cache, setting, keep))

    return encode
