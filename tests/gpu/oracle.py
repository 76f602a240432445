"""Pages as vllm_kvcrush/ops/triton/layout.py describes them, written and read by plain torch. The
kernels are tested against this; only the byte offsets are common code."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_kvcrush.codecs import CODECS, layout, reference
from vllm_kvcrush.codecs.layout import GROUP, STRIP
from vllm_kvcrush.codecs.transform.bits import pieces
from vllm_kvcrush.codecs.transform.reference import Page, decode_page, encode_page
from vllm_kvcrush.codecs.transform.tables import Tables
from vllm_kvcrush.ops.triton.codecs.fitted.layout import FittedSection
from vllm_kvcrush.ops.triton.layout import NEVER, STEPS, Geometry, Section


def grid_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def _put(page: Tensor, at: int, values: Tensor) -> None:
    content = values.contiguous().view(-1).view(torch.uint8)
    page[at : at + len(content)] = content


def _get(page: Tensor, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return page[at : at + size].clone().view(dtype).view(shape)


def _rows(page: Tensor, at: int, row: int, values: Tensor) -> None:
    for i, value in enumerate(values):
        _put(page, at + i * row, value)


def _planes(x: Tensor, planes: int) -> Tensor:
    """Returns `x` [..., channels] with its channels in the order of `planes` planes."""
    return torch.cat([x[..., s::planes] for s in range(planes)], -1)


def _natural(x: Tensor, planes: int) -> Tensor:
    parts = x.view(*x.shape[:-1], planes, x.shape[-1] // planes)
    return parts.transpose(-1, -2).reshape(x.shape)


def key_grids(key: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the codes [n, D] of int4 keys, and the half scales and middles [n, D] that are
    stored."""
    codes, scales, zeros = reference.int4_keys(key)
    half = (0.5 * scales).to(grid_dtype(dtype))
    middle = (zeros + 7.5 * scales).clamp(-reference.HALF_MAX, reference.HALF_MAX)
    return codes, half, middle.to(grid_dtype(dtype))


def kept(codec: str, key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns what is read back from a page, float64: the same as on a CPU, but for the rounding of
    int4's grids."""
    if not len(key):
        return key.double(), value.double()
    k, v = CODECS[codec].kept(key, value, dtype)
    if codec == "int4":
        codes, half, middle = key_grids(key, dtype)
        k = middle.double() + half.double() * (2 * codes.double() - 15)
    return k, v


def encode(
    page: Tensor, codec: str, geometry: Geometry, key: Tensor, value: Tensor,
    positions: Tensor | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Fills a page's bytes, uint8 [page_bytes], from float32 K and V [n, D] and positions [n]."""
    at, n = geometry.section(codec), len(key)
    if n == 0:
        return
    if codec in ("raw", "exact"):
        _rows(page, at.k, at.k_row, key.to(dtype))
        _rows(page, at.v, at.v_row, value.to(dtype))
    elif codec == "int8":
        for x, codes_at, row, scale_at in (
            (key, at.k, at.k_row, at.k_scale),
            (value, at.v, at.v_row, at.v_scale),
        ):
            codes, scale = reference.int8(x)
            _rows(page, codes_at, row, codes.to(torch.int8))
            _put(page, scale_at, scale[:, 0].half())
    else:
        codes, half, middle = key_grids(key, dtype)
        _rows(page, at.k, at.k_row, _nibbles(codes))
        for group in range(-(-n // GROUP)):
            for grid, grid_at in ((half, at.k_scale), (middle, at.k_middle)):
                _put(page, grid_at + group * 2 * key.shape[1], _planes(grid[group * GROUP], 4))
        codes, scale = reference.int4_values(value)
        _rows(page, at.v, at.v_row, _nibbles(codes))
        _put(page, at.v_scale, scale[:, 0].half())
    if positions is not None and codec != "raw":
        _put_positions(page, at.positions, geometry, positions)


def _put_positions(page: Tensor, at: int, geometry: Geometry, positions: Tensor) -> None:
    _put(page, at, (positions % 65536).to(torch.uint16))
    base = int(positions[0]) // 65536 * 65536
    steps = (positions - base) // 65536
    first = [int((steps <= j).sum()) for j in range(STEPS)]
    first = [NEVER if f == len(positions) else f for f in first]
    _put(page, geometry.header, torch.tensor([base], dtype=torch.int32))
    _put(page, geometry.header + 4, torch.tensor(first).to(torch.uint16))


def _get_positions(page: Tensor, at: int, geometry: Geometry, n: int) -> Tensor:
    low = _get(page, at, (n,), torch.uint16).int()
    base = _get(page, geometry.header, (1,), torch.int32)
    first = _get(page, geometry.header + 4, (STEPS,), torch.uint16).int()
    steps = (first.unsqueeze(0) <= torch.arange(n).unsqueeze(1)).sum(1)
    return base + low + 65536 * steps.int()


def _nibbles(codes: Tensor) -> Tensor:
    codes = codes.to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def _codes(nibbles: Tensor) -> Tensor:
    return torch.stack([nibbles & 15, nibbles >> 4], -1).flatten(-2).double()


def _read_rows(page: Tensor, at: int, row: int, n: int, size: int, dtype: torch.dtype) -> Tensor:
    rows = [_get(page, at + i * row, (size,), dtype) for i in range(n)]
    return torch.stack(rows) if rows else torch.empty(0, size, dtype=dtype)


def decode(
    page: Tensor, codec: str, geometry: Geometry, n: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns K and V, float64 [n, D], and positions that a page's bytes hold."""
    at: Section = geometry.section(codec)
    k_size, v_size = geometry.k_size, geometry.v_size
    if codec in ("raw", "exact"):
        key = _read_rows(page, at.k, at.k_row, n, k_size, dtype).double()
        value = _read_rows(page, at.v, at.v_row, n, v_size, dtype).double()
    elif codec == "int8":
        key = _read_rows(page, at.k, at.k_row, n, k_size, torch.int8).double()
        value = _read_rows(page, at.v, at.v_row, n, v_size, torch.int8).double()
        key *= _get(page, at.k_scale, (n, 1), torch.float16).double()
        value *= _get(page, at.v_scale, (n, 1), torch.float16).double()
    elif codec in ("tada", "gear"):
        key, value = (_decode_tada if codec == "tada" else _decode_gear)(page, at, geometry, n)
    else:
        key = _codes(_read_rows(page, at.k, at.k_row, n, k_size // 2, torch.uint8))
        groups = -(-n // GROUP)
        grids = []
        for grid_at in (at.k_scale, at.k_middle):
            grid = _get(page, grid_at, (groups, k_size), grid_dtype(dtype)).double()
            grids.append(_natural(grid, 4).repeat_interleave(GROUP, 0)[:n])
        key = grids[1] + grids[0] * (2 * key - 15)
        value = _codes(_read_rows(page, at.v, at.v_row, n, v_size // 2, torch.uint8)) - 7.5
        value = value * _get(page, at.v_scale, (n, 1), torch.float16).double()
        value = value @ reference.rotation(v_size)
    if codec == "raw":
        return key, value, None
    return key, value, _get_positions(page, at.positions, geometry, n)


def _columns(page: Tensor, low: int, high: int, n: int, size: int, bits: int) -> Tensor:
    """Returns codes [n, size] less their middle."""
    row = size * (4 if bits == 4 else 2) // 8
    found = _read_rows(page, low, row, n, row, torch.uint8)
    if bits == 4:
        return _codes(found) - 7.5
    codes = (found.long().unsqueeze(-1) >> 2 * torch.arange(4) & 3).flatten(1)
    if bits == 3:
        top = _read_rows(page, high, size // 8, n, size // 8, torch.uint8).long()
        codes += 4 * (top.unsqueeze(-1) >> torch.arange(8) & 1).flatten(1)
    return codes - (2**bits - 1) / 2


def _decode_tada(page: Tensor, at: Section, geometry: Geometry, n: int) -> tuple[Tensor, Tensor]:
    found, mean_at = [], at.shared
    for codes, high, scale, size in (
        (at.k, at.k_high, at.k_scale, geometry.k_size),
        (at.v, at.v_high, at.v_scale, geometry.v_size),
    ):
        y = _columns(page, codes, high, n, size, layout.TADA.bits)
        y = y * _get(page, scale, (n, 1), torch.float16).double()
        y = y + _get(page, mean_at, (size,), torch.float16).double()
        found.append(y @ reference.rotation(size))
        mean_at += 2 * size
    return found[0], found[1]


def _decode_gear(page: Tensor, at: Section, geometry: Geometry, n: int) -> tuple[Tensor, Tensor]:
    k_size, v_size, own = geometry.k_size, geometry.v_size, layout.GEAR
    shape = ((2, k_size), (own.rank, k_size), (own.rank, v_size))
    parts, start = [], at.shared
    for rows, size in shape:
        parts.append(_get(page, start, (rows, size), torch.float16).double())
        start += 2 * rows * size
    grid, k_factor, v_factor = parts
    weights = _get(page, at.weights, (2, own.rank, at.capacity), torch.float16).double()
    weights = weights[..., :n].mT
    key = _columns(page, at.k, at.k_high, n, k_size, own.bits) + (2**own.bits - 1) / 2
    key = key * grid[0] + grid[1] + weights[0] @ k_factor
    count = k_size // own.per_single
    for strip in range(-(-n // STRIP)):
        singles = at.singles + strip * 4 * count
        places = _get(page, singles, (count,), torch.int16).tolist()
        rests = _get(page, singles + 2 * count, (count,), torch.float16).tolist()
        for place, rest in zip(places, rests, strict=True):
            token = strip * STRIP + place // 256
            if token < n:
                key[token, place % 256] += rest
    value = _columns(page, at.v, at.v_high, n, v_size, own.bits)
    value = value * _get(page, at.v_scale, (n, 1), torch.float16).double() + weights[1] @ v_factor
    return key, value @ reference.rotation(v_size)


# -- fitted codecs ---------------------------------------------------------------------------------


def encode_fitted(
    page: Tensor, at: FittedSection, geometry: Geometry, key: Tensor, value: Tensor,
    positions: Tensor, tables: Tables, layer: int, head: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fills a page's bytes from float32 K and V [n, D] and positions [n], and returns what is read
    back from the page, float64."""
    n = len(key)
    kept = encode_page(key, value, positions, tables, layer, head, at.exceptions)
    back = decode_page(kept, tables, layer, head)
    if n == 0:
        return back
    words = torch.zeros(n, at.words, 4, dtype=torch.long)
    codes = kept.key_codes.long().view(n, -1, 4)
    for p in pieces(tables.bits[layer, head]):
        words[:, p.word] |= (codes[:, p.quad] >> p.weight & (1 << p.bits) - 1) << p.first
    scales = kept.value_scales.clone()
    scales[kept.slots] = torch.arange(len(kept.slots), dtype=torch.uint8)
    codes = kept.value_codes.clone()
    # The codes of a token that is an exception are not used.
    words[kept.slots] = torch.randint(256, words[kept.slots].shape)
    codes[kept.slots] = torch.randint(1 << at.v_bits, codes[kept.slots].shape).to(torch.uint8)
    _rows(page, 0, 4 * at.words, words.to(torch.uint8))
    columns = codes.long().view(n, -1, 4)
    half = columns.shape[1] // 2
    if at.v_bits == 4:
        _rows(page, at.v, geometry.v_size // 2, _nibbles(codes))
    else:
        low = ((columns & 3) << 2 * torch.arange(4)).sum(-1)
        _rows(page, at.v, geometry.v_size // 4, _pairs(low, half).to(torch.uint8))
    if at.v_bits == 3:
        high = ((columns >> 2) << torch.arange(4)).sum(-1)
        high = high[:, :half] | high[:, half:] << 4
        _rows(page, at.v_high, half, high.to(torch.uint8))
    _put(page, at.v_scale, scales)
    for rows, codes_at, side in ((key, at.x_k, 0), (value, at.x_v, 1)):
        codes, scale = reference.int8(rows[kept.slots])
        _rows(page, codes_at, rows.shape[1], codes.to(torch.int8))
        for i, one in enumerate(scale.half()):
            _put(page, at.x_scale + 4 * i + 2 * side, one)
    bits = torch.zeros(-(-n // STRIP) * STRIP, dtype=torch.int32)
    bits[kept.slots] = 1
    bits = (bits.view(-1, STRIP) << torch.arange(STRIP)).sum(1)
    _put(page, at.bits, bits.to(torch.uint16))
    _put_positions(page, at.positions, geometry, positions[::STRIP])
    return back


def _pairs(columns: Tensor, half: int) -> Tensor:
    return torch.stack([columns[:, :half], columns[:, half:]], -1).flatten(1)


def decode_fitted(
    page: Tensor, at: FittedSection, geometry: Geometry, n: int, tables: Tables,
    layer: int, head: int,
) -> tuple[Page, Tensor]:  # fmt: skip
    """Returns the content of a page, and the positions of its tokens."""
    words = _read_rows(page, 0, 4 * at.words, n, 4 * at.words, torch.uint8).long()
    words = words.view(n, at.words, 4)
    codes = torch.zeros(n, geometry.k_size // 4, 4, dtype=torch.long)
    for p in pieces(tables.bits[layer, head]):
        codes[:, p.quad] |= (words[:, p.word] >> p.first & (1 << p.bits) - 1) << p.weight
    size = geometry.v_size
    row = size * (4 if at.v_bits == 4 else 2) // 8
    value = _read_rows(page, at.v, row, n, row, torch.uint8)
    if at.v_bits == 4:
        value = _codes(value).long()
    else:
        value = torch.cat([value[:, ::2], value[:, 1::2]], 1).long()
        value = (value.unsqueeze(-1) >> 2 * torch.arange(4) & 3).flatten(1)
    if at.v_bits == 3:
        high = _read_rows(page, at.v_high, size // 8, n, size // 8, torch.uint8).long()
        high = torch.cat([high & 15, high >> 4], 1)
        value |= (high.unsqueeze(-1) >> torch.arange(4) & 1).flatten(1) << 2
    strips = -(-n // STRIP)
    bits = _get(page, at.bits, (strips, 1), torch.uint16).int() >> torch.arange(STRIP) & 1
    slots = bits.flatten()[:n].nonzero()[:, 0]
    assert bits.sum() == len(slots)
    scales = _get(page, at.v_scale, (n,), torch.uint8)
    assert torch.equal(scales[slots].long(), torch.arange(len(slots)))
    count = len(slots)
    factor = _get(page, at.x_scale, (count, 2), torch.float16).double()
    keys = _read_rows(page, at.x_k, geometry.k_size, count, geometry.k_size, torch.int8)
    values = _read_rows(page, at.x_v, size, count, size, torch.int8)
    strip = _get_positions(page, at.positions, geometry, strips)
    positions = (strip.unsqueeze(1) + torch.arange(STRIP)).flatten()[:n].int()
    found = Page(
        strip.repeat_interleave(STRIP)[:n], codes.flatten(1).to(torch.uint8),
        value.to(torch.uint8), scales, slots, keys.double() * factor[:, :1],
        values.double() * factor[:, 1:],
    )  # fmt: skip
    return found, positions
