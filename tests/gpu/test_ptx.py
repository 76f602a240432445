"""The inline PTX that the interpreter cannot run, executed here on every 16-bit word."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from vllm_kvcrush.ops.triton.kernels import tiles

WORDS = np.arange(65536, dtype=np.uint32)
# Neighbours in one register: every word in either half, beside a different one.
PAIRS = WORDS | (WORDS[::-1] << 16)


def _halves(register: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(register.astype(np.uint32).view(np.int16)).view(dtype).double()


def _register(values: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    return values.to(dtype).view(torch.int16).numpy().view(np.uint32)


def execute(ptx: str, *operands: np.ndarray) -> np.ndarray:
    """Returns the result $0 of a block of PTX on 32-bit registers $1, $2, ..."""
    body = re.fullmatch(r"\{ \.reg \.b32 [a-z, ]+; (.*) \}", ptx)
    assert body is not None, ptx
    registers = {f"${i + 1}": x.astype(np.uint32) for i, x in enumerate(operands)}

    def value(name: str) -> np.ndarray:
        if name[0].isdigit():
            return np.full_like(operands[0], int(name, 0), dtype=np.uint32)
        return registers[name]

    for line in filter(None, (x.strip() for x in body[1].split(";"))):
        name, rest = line.split(" ", 1)
        to, *arguments = rest.split(", ")
        if name == "mov.b32":
            result = value(arguments[0])
        elif name == "shr.b32":
            result = value(arguments[0]) >> np.uint32(int(arguments[1]))
        elif name == "shl.b32":
            result = value(arguments[0]) << np.uint32(int(arguments[1]))
        elif name == "lop3.b32":
            a, b, c = (value(x) for x in arguments[:3])
            table = int(arguments[3], 0)
            result = np.zeros_like(a)
            for row in range(8):
                if table >> row & 1:
                    result |= (
                        (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
                    )
        elif name in ("fma.rn.bf16x2", "fma.rn.f16x2"):
            dtype = torch.bfloat16 if "bf16" in name else torch.float16
            a, b, c = (_halves(value(x), dtype) for x in arguments)
            # Exact in float64, so that it is rounded once.
            result = _register(a * b + c, dtype)
        else:
            raise AssertionError(f"unknown instruction {name}")
        registers[to] = result
    return registers["$0"]


KINDS = [(torch.bfloat16, tiles.BF16_STEPS, tiles.BF16_KEYS, tiles.BF16_CODES)]
KINDS += [(torch.float16, tiles.FP16_STEPS, tiles.FP16_KEYS, tiles.FP16_CODES)]


@pytest.mark.parametrize(("dtype", "steps", "keys", "codes"), KINDS, ids=["bf16", "fp16"])
def test_unpacking(dtype: torch.dtype, steps: object, keys: object, codes: object) -> None:
    words = torch.from_numpy(PAIRS.view(np.uint16).astype(np.int32))
    for i, ptx in enumerate(steps.value):  # type: ignore[attr-defined]
        top, shift = (3, 7, 15)[i // 8], 2 * (i % 8)
        if shift + top.bit_length() <= 16:
            want = 2 * (words >> shift & top).double() - top
            assert torch.equal(_halves(execute(ptx, PAIRS), dtype), want)
    for plane in range(4):
        want = 2 * (words >> 4 * plane & 15).double() - 15
        scale = torch.rand(len(words)).double() + 0.01
        middle = torch.randn(len(words)).double() * 5
        a, b = _register(scale, dtype), _register(middle, dtype)
        got = execute(keys.value[plane], PAIRS, a, b)  # type: ignore[attr-defined]
        want = (want * _halves(a, dtype) + _halves(b, dtype)).to(dtype).double()
        assert torch.equal(_halves(got, dtype), want)
    for plane in range(2):
        want = (words >> 8 * plane & 255).to(torch.int8).double()
        got = execute(codes.value[plane], PAIRS)  # type: ignore[attr-defined]
        assert torch.equal(_halves(got, dtype), want)


def test_the_executor_follows_the_truth_table() -> None:
    a, b, c = (np.array([x], dtype=np.uint32) for x in (0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA))
    for table, want in ((0xEA, a & b | c), (0x96, a ^ b ^ c), (0x80, a & b & c)):
        ptx = f"{{ .reg .b32 t; lop3.b32 $0, $1, $2, $3, {table:#x}; }}"
        assert execute(ptx, a, b, c) == want
