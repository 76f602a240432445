"""Pages as vllm_kvcrush/ops/triton/layout.py describes them, written and read by plain torch: what
the kernels are tested against. Shares no code with them but the byte offsets."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_kvcrush.ops import pages_reference as reference
from vllm_kvcrush.ops.triton.layout import NEVER, STEPS, Geometry, Section
from vllm_kvcrush.pages import GROUP


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
    """[..., channels] → the same, plane by plane."""
    return torch.cat([x[..., s::planes] for s in range(planes)], -1)


def _natural(x: Tensor, planes: int) -> Tensor:
    parts = x.view(*x.shape[:-1], planes, x.shape[-1] // planes)
    return parts.transpose(-1, -2).reshape(x.shape)


def key_grids(key: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [n, D] of int4 keys, and the half scales and middles [n, D] that are stored."""
    codes, scales, zeros = reference.int4_keys(key)
    half = (0.5 * scales).to(grid_dtype(dtype))
    middle = (zeros + 7.5 * scales).clamp(-reference.HALF_MAX, reference.HALF_MAX)
    return codes, half, middle.to(grid_dtype(dtype))


def kept(codec: str, key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a page gives back: float64. As on a CPU, but for the rounding of int4's grids."""
    if not len(key):
        return key.double(), value.double()
    k, v = reference.kept(codec, key, value, dtype)
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
        _put(page, at.positions, (positions % 65536).to(torch.uint16))
        base = int(positions[0]) // 65536 * 65536
        steps = (positions - base) // 65536
        first = [int((steps <= j).sum()) for j in range(STEPS)]
        first = [NEVER if f == n else f for f in first]
        _put(page, geometry.header, torch.tensor([base], dtype=torch.int32))
        _put(page, geometry.header + 4, torch.tensor(first).to(torch.uint16))


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
    """K and V, float64 [n, D], and positions, of a page's bytes."""
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
    low = _get(page, at.positions, (n,), torch.uint16).int()
    base = _get(page, geometry.header, (1,), torch.int32)
    first = _get(page, geometry.header + 4, (STEPS,), torch.uint16).int()
    steps = (first.unsqueeze(0) <= torch.arange(n).unsqueeze(1)).sum(1)
    return key, value, base + low + 65536 * steps.int()
