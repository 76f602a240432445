"""Which keys of a head are alike: what merging and redundancy are made of.

Nothing here waits for the device. Sums of tokens (`reference.merge`, `reference.spread`) are left
to torch, whose operations read each token once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vllm_kvcrush.ops.triton.cache import on_device
from vllm_kvcrush.ops.triton.kernels.similar import latest_kernel, nearest_kernel

ROWS, COLUMNS = 64, 64  # of a tile


def nearest_kept(keys: Tensor, gone: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Finds for every dropped slot the kept one whose key is most similar, as
    `reference.nearest_kept` does, in float32. Arguments are the same."""
    unit = F.normalize(keys.float(), dim=2).contiguous()
    heads, n, size = unit.shape
    target = torch.arange(n, device=keys.device).repeat(heads, 1)
    cosine = torch.ones(heads, n, device=keys.device).masked_fill(gone, -2.0)
    marks = (x.contiguous().view(torch.uint8) for x in (gone, kept))
    if n:
        nearest_kernel[(triton.cdiv(n, ROWS), heads)](
            target, cosine, unit, *marks, n, SIZE=size, PADDED=_padded(size), R=ROWS, C=COLUMNS
        )
    return target, cosine


def redundancy(keys: Tensor, counts: Sequence[int] | None = None, threshold: float = 0.5) -> Tensor:
    """Returns how similar each key is to the others, as `reference.redundancy` does, in float32.
    Arguments are the same."""
    unit = F.normalize(keys.float(), dim=2)
    heads, n, size = unit.shape
    own = on_device(tuple([n] * heads if counts is None else counts), keys.device)
    there = torch.arange(n, device=keys.device) < own.unsqueeze(1)
    unit = torch.where(there.unsqueeze(2), unit, 0.0).contiguous()
    latest = torch.empty(heads, n, dtype=torch.int64, device=keys.device)
    cosine = torch.empty(heads, n, device=keys.device)
    if n:
        latest_kernel[(triton.cdiv(n, ROWS), heads)](
            latest, cosine, unit, own, n, threshold,
            SIZE=size, PADDED=_padded(size), R=ROWS, C=COLUMNS,
        )  # fmt: skip
    total = (unit @ unit.sum(1).unsqueeze(2)).squeeze(2) - unit.square().sum(2)
    # A key that has found none takes 0 from the first.
    total.scatter_add_(1, latest.clamp(min=0), -cosine)
    return total / own.clamp(min=1).unsqueeze(1)


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
