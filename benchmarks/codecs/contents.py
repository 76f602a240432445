"""Page contents that the study compares: each turns a cache into what its pages would give back,
and counts their bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.codecs.model import Cache, Coded
from vllm_kvcrush import transform as tc

HEADER = 32  # bytes of a page
DIRECTORY = 7  # bytes of a page in its request's directory
POSITION = 2  # bytes of a slot where positions are listed
SCALE = 2  # bytes of a float16


@dataclass(frozen=True)
class Setting:
    """What contents may need besides the cache.

    Attributes:
        tables: transform tables by name of their point.
        rope: the model's.
        scale: factor of q·k.
        horizon: longest distance of a query.
        sizes: block sizes and bytes of a raw channel for which bytes are counted; the first one
            also decides which tokens share a page.
    """

    tables: dict[str, tc.Tables]
    rope: tc.Rope
    scale: float
    horizon: int
    sizes: tuple[tuple[int, int], ...]


Encode = Callable[[Cache, Setting], Coded]


# -- bytes ----------------------------------------------------------------------------------------


def raw_bytes(cache: Cache, block: int, itemsize: int) -> int:
    """Whole blocks of raw tokens."""
    layers, heads, n, size = cache.keys.shape
    page = block * (size + cache.values.shape[-1]) * itemsize
    return -(-n // block) * layers * heads * page


def _page_bytes(cache: Cache, block: int, itemsize: int) -> int:
    return block * (cache.keys.shape[-1] + cache.values.shape[-1]) * itemsize


def _flat(cache: Cache, setting: Setting, token_bytes: float, group: int) -> dict[Any, int]:
    """Bytes of pages with `token_bytes` a token, filled by multiples of `group` tokens."""
    layers, heads, n = cache.keys.shape[:3]
    out = {}
    for block, itemsize in setting.sizes:
        page = _page_bytes(cache, block, itemsize)
        held = int((page - HEADER) // (token_bytes * group)) * group
        pages = -(-n // held) * layers * heads
        out[block, itemsize] = pages * (page + DIRECTORY)
    return out


# -- calibration-free contents --------------------------------------------------------------------


def raw(cache: Cache, setting: Setting) -> Coded:
    """Nothing changed."""
    sizes = {at: raw_bytes(cache, *at) for at in setting.sizes}
    return Coded(cache.keys, cache.values, sizes)


def int8(cache: Cache, setting: Setting) -> Coded:
    """int8 with one scale a token, head and side."""
    size = cache.keys.shape[-1] + cache.values.shape[-1] + 2 * SCALE + POSITION
    return Coded(tc.to_int8(cache.keys), tc.to_int8(cache.values), _flat(cache, setting, size, 16))


def _even(x: Tensor, bits: int, dim: int) -> Tensor:
    """Evenly spaced levels from the least to the greatest along `dim`."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(x.dtype).tiny)
    return ((x - low) / step).round() * step + low


def by_channel(keys: Tensor, bits: int, group: int) -> Tensor:
    """Keys with a scale and a zero per channel and `group` tokens."""
    return torch.cat([_even(part, bits, 2) for part in keys.split(group, 2)], 2)


def rotated_values(values: Tensor, bits: int) -> Tensor:
    """Values turned by signs and Hadamard, then with a scale and a zero per token."""
    signs = tc.signs(values.shape[-1]).to(values)
    return tc.hadamard(_even(tc.hadamard(values * signs), bits, -1)) * signs


def even(key_bits: int, value_bits: int, group: int) -> Encode:
    """Keys per channel, values rotated; the sinks stay as they are (they fill a page's header)."""

    def encode(cache: Cache, setting: Setting) -> Coded:
        keys = by_channel(cache.keys, key_bits, group)
        values = rotated_values(cache.values, value_bits)
        size = cache.keys.shape[-1] * (key_bits / 8 + 2 * SCALE / group)
        size += cache.values.shape[-1] * value_bits / 8 + 2 * SCALE + POSITION
        return Coded(keys, values, _flat(cache, setting, size, group))

    return encode


# -- transform coding -----------------------------------------------------------------------------


def _pages(
    cache: Cache, tables: tc.Tables, setting: Setting
) -> tuple[Tensor, Tensor, Tensor, dict[Any, int]]:
    """Keys and values as pages give them back, which tokens are exceptions [L, H, n], bytes."""
    layers, heads, n, _ = cache.keys.shape
    size = cache.values.shape[-1]
    held = {at: tc.capacities(tables, size, _page_bytes(cache, *at)) for at in setting.sizes}
    first = held[setting.sizes[0]]
    keys, values = torch.empty_like(cache.keys), torch.empty_like(cache.values)
    exact = torch.zeros(layers, heads, n, dtype=torch.bool)
    for layer in range(layers):
        for head in range(heads):
            index = layer * heads + head
            step, slots = first.tokens[index], first.slots[index]
            for start in range(0, n, step):
                here = slice(start, min(start + step, n))
                page = tc.encode_page(
                    cache.keys[layer, head, here],
                    cache.values[layer, head, here],
                    cache.positions[here],
                    tables,
                    layer,
                    head,
                    slots,
                )
                keys[layer, head, here], values[layer, head, here] = tc.decode_page(
                    page, tables, layer, head, cache.keys.dtype
                )
                exact[layer, head, start + page.slots] = True
    return keys, values, exact, {at: c.bytes(n) for at, c in held.items()}


def _with_bias(
    tables: tc.Tables, keys: Tensor, values: Tensor, exact: Tensor, size: Any, setting: Setting
) -> Coded:
    lost = tables.lost(setting.horizon)
    coded = (~exact).float()

    def bias(layer: int, queries: Tensor, places: Tensor) -> Tensor:
        heads, m, channels = queries.shape
        if tables.point.frame != "rotated":
            queries = setting.rope.rotate(queries, -places)
        groups = queries.reshape(lost.shape[1], -1, channels)
        each = tc.mass_bias(groups, lost[layer], setting.scale)
        return (each[..., None] * coded[layer][:, None]).view(heads, m, -1)

    return Coded(keys, values, size, bias)


def transform(point: str, bias: bool = True, keep: float = 1.0) -> Encode:
    """Transform coding with the tables of `point`; `keep` < 1 evicts the rest first."""

    def encode(cache: Cache, setting: Setting) -> Coded:
        tables = setting.tables[point]
        keys, values, exact, size = _pages(cache, tables, setting)
        coded = Coded(keys, values, size)
        if bias:
            coded = _with_bias(tables, keys, values, exact, size, setting)
        if keep < 1:
            coded.kept = evict(cache, setting, keep)
            # Positions are no run any more: every slot lists its own.
            n = round(cache.length * keep)
            for at in setting.sizes:
                pages = tc.capacities(
                    tables, cache.values.shape[-1], _page_bytes(cache, *at), listed=True
                )
                coded.bytes[at] = pages.bytes(n)
        return coded

    return encode


def online(point: tc.Point) -> Encode:
    """The same without a file: each channel is a component, statistics are the context's own."""

    def encode(cache: Cache, setting: Setting) -> Coded:
        queries, places = cache.queries, cache.positions[-cache.queries.shape[2] :]
        tables = tc.online(cache.keys, queries, cache.positions, places, point, setting.rope)
        keys, values, exact, size = _pages(cache, tables, setting)
        # float16 mean, sigma and weight, and the channel's place and bits.
        side = tables.bits.numel() * (3 * SCALE + 2)
        size = {at: count + side for at, count in size.items()}
        return _with_bias(tables, keys, values, exact, size, setting)

    return encode


# -- eviction -------------------------------------------------------------------------------------


def evict(cache: Cache, setting: Setting, keep: float) -> Tensor:
    """Marks, per head, the tokens with most (expected attention + 0.01) · |v|: bool [L, H, n].
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
    scores[:, :, : tc.SINKS] = torch.inf
    best = scores.topk(round(n * keep), -1).indices
    return torch.zeros(layers, heads, n, dtype=torch.bool).scatter_(2, best, True)


def evicted(keep: float) -> Encode:
    """Raw tokens, the rest evicted."""

    def encode(cache: Cache, setting: Setting) -> Coded:
        share = {at: round(raw_bytes(cache, *at) * keep) for at in setting.sizes}
        return Coded(cache.keys, cache.values, share, kept=evict(cache, setting, keep))

    return encode
