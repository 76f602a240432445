"""What merging and redundancy are made of, with the CPU kernels, as `ops.reference` does it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_kvcrush.ops.cpu.library import LIBRARY, KeysStruct, address, check, per_row


def _keys(x: Tensor) -> tuple[KeysStruct, Tensor]:
    """Returns what the library takes for a tensor [H, m, D], and the tensor that it reads, whose
    heads may lie apart."""
    x = x.to(torch.float32)
    heads, slots, size = x.shape
    if x.stride()[1:] != (size, 1) or (heads > 1 and x.stride(0) < slots * size):
        x = x.contiguous()
    stride = max(x.stride(0), slots * size)
    return KeysStruct(x.data_ptr(), stride, heads, size, slots), x


def _alike(what: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns the tensor with its elements in order. Raises ValueError if its shape is another."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{what} {tuple(tensor.shape)} for {tuple(shape)}")
    return tensor.to(dtype).contiguous()


def nearest_kept(keys: Tensor, gone: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Finds for every dropped slot the kept one whose key is most similar, as
    `reference.nearest_kept` does. Arguments are the same; D is a multiple of 8, at most 256."""
    given, held = _keys(keys)
    marks = [_alike("a mask of", x, held.shape[:2], torch.bool) for x in (gone, kept)]
    target = torch.empty(held.shape[:2], dtype=torch.int64)
    cosine = torch.empty(held.shape[:2])
    check(
        LIBRARY.kvc_nearest_kept(
            ctypes.addressof(given),
            address(marks[0]),
            address(marks[1]),
            target.data_ptr(),
            cosine.data_ptr(),
        )
    )
    return target, cosine


def redundancy(keys: Tensor, counts: Sequence[int] | None = None, threshold: float = 0.5) -> Tensor:
    """Returns how similar each key is to the others, as `reference.redundancy` does, in float32.
    Arguments are the same; D is a multiple of 8, at most 256."""
    given, held = _keys(keys)
    own = per_row(held.shape[1] if counts is None else counts, len(held))
    out = torch.empty(held.shape[:2])
    check(
        LIBRARY.kvc_redundancy(ctypes.addressof(given), own.data_ptr(), threshold, out.data_ptr())
    )
    return out


def merge(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Returns the weighted sums of what goes to each slot, as `reference.merge` does, in float32.
    Arguments are the same; D is a multiple of 8, at most 256."""
    given, held = _keys(x)
    to = _alike("targets", target, held.shape[:2], torch.int64)
    by = _alike("weights", weight, held.shape[:2], torch.float32)
    out = torch.empty(held.shape)
    check(LIBRARY.kvc_merge(ctypes.addressof(given), address(to), address(by), out.data_ptr()))
    return out


def spread(values: Tensor, kept: Tensor, part: Tensor, width: int) -> Tensor:
    """Returns values with those of dropped slots added to the next kept ones, as
    `reference.spread` does, in float32. Arguments are the same; D is a multiple of 8, at most
    256."""
    out = values.to(torch.float32).clone(memory_format=torch.contiguous_format)
    heads, slots, size = out.shape
    mark = _alike("a mask of", kept, out.shape[:2], torch.bool)
    by = _alike("parts", part, out.shape[:2], torch.float32)
    check(LIBRARY.kvc_spread(heads, slots, size, address(mark), address(by), width, out.data_ptr()))
    return out
