"""The page contents that the study compares: each turns a cache into what its pages would give
back, and counts their bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.codecs.model import Cache, Coded
from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.codecs.transform.points import SINKS
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


def flat(codec: str) -> Encode:
    """Returns a content: pages of a codec without tables."""

    def encode(cache: Cache, setting: Setting) -> Coded:
        layers, heads, n, size = cache.keys.shape
        rooms = {
            (block, itemsize): torch.full(
                (layers, heads),
                CODECS[codec].capacity(
                    _page_bytes(cache, block, itemsize),
                    size,
                    cache.values.shape[-1],
                    itemsize,
                ),
            )
            for block, itemsize in setting.sizes
        }

        def kept(layer: int, head: int, here: slice) -> tuple[Tensor, Tensor]:
            k, v = cache.keys[layer, head, here], cache.values[layer, head, here]
            return CODECS[codec].kept(k, v, cache.keys.dtype)

        keys, values = _by_page(cache, rooms[setting.sizes[0]], kept)
        return Coded(keys, values, {at: _bytes(cache, at, r, n) for at, r in rooms.items()})

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
