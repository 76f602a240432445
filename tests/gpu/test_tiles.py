"""Unpacking and transforms alone, also in bfloat16, whose arithmetic the interpreter gets wrong."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from vllm_kvcrush.codecs import reference
from vllm_kvcrush.ops.triton.cache import DTYPES
from vllm_kvcrush.ops.triton.kernels import tiles


@triton.jit
def _unpack(
    out, words, BITS: tl.constexpr, S: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):
    at = tl.arange(0, 256)[:, None] * 256 + tl.arange(0, 256)[None, :]
    if BITS == 8:
        x = tiles.codes8(tl.load(words + at), S, DTYPE, PTX)
    else:
        x = tiles.half_steps(tl.load(words + at), S, DTYPE, PTX)
    tl.store(out + at, x)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize(("bits", "planes"), [(8, 2), (4, 4)])
def test_every_word_unpacks(device: str, dtype: torch.dtype, bits: int, planes: int) -> None:
    words = torch.arange(65536, dtype=torch.int32)
    for plane in range(planes):
        code = words >> bits * plane & 2**bits - 1
        want = code.to(torch.int8).double() if bits == 8 else 2.0 * code - 15
        out = torch.empty(65536, dtype=dtype, device=device)
        _unpack[(1,)](
            out, words.to(torch.int16).to(device), bits, plane, DTYPES[dtype], device == "cuda"
        )
        assert torch.equal(out.cpu().double(), want.double())


@triton.jit
def _rotate(out, x, N: tl.constexpr, BLOCK: tl.constexpr):
    i, c = tl.arange(0, 4)[:, None], tl.arange(0, N // 4)[None, :]
    at = x + i * N + 4 * c
    a, b, d, e = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    a, b, d, e = tiles.planes_hadamard(a, b, d, e, 4, N // 4, BLOCK)
    y = tiles.interleave(a, b, d, e, 4, N // 4)
    sign = tiles.rotation_sign(tl.arange(0, N))
    tl.store(out + i * N + tl.arange(0, N)[None, :], y * sign[None, :])


@pytest.mark.parametrize("size", [8, 16, 64, 80, 96, 128, 256])
def test_rotation(device: str, size: int) -> None:
    """Products over a compressed page end with this rotation of values, in planes."""
    padded, x = max(64, triton.next_power_of_2(size)), torch.randn(4, size)
    wide = torch.zeros(4, padded)
    wide[:, :size] = x
    out = torch.full((4, padded), torch.nan, device=device)
    _rotate[(1,)](out, wide.to(device), padded, size & -size)
    want = x.double() @ reference.rotation(size)
    torch.testing.assert_close(out[:, :size].cpu().double(), want, rtol=0, atol=1e-5)
    assert (out[:, size:] == 0).all()
