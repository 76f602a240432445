"""Policies that take keys in the pages' type have float32 copies of tiles of them only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_kvcrush import ops, policies
from vllm_kvcrush.policies import base
from vllm_kvcrush.policies.base import View

H, N, M, D = 3, 101, 90, 16


class Largest(TorchDispatchMode):
    """Notes the most float32 numbers that an operation returns."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor) and x.dtype == torch.float32 and x.dim() == 3:
                self.most = max(self.most, x.shape[1] * x.shape[2])
        return result


def view(keys: Tensor, counts: list[int] | None) -> View:
    return View(
        held=ops.LayerKV(keys, keys, None if counts is None else [c + N - M for c in counts]),
        queries=None,
        scale=D**-0.5,
        candidates=M,
        sinks=4,
        page_size=16,
        layer=0,
        layers=1,
        all_heads=lambda x: x,
        counts=None if counts is None else torch.tensor(counts),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("counts", [None, [90, 40, 61]])
@pytest.mark.parametrize("name", ["keydiff", "knorm", "kvcrush"])
def test_scores_from_tiles(
    name: str, counts: list[int] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policies.get(name, {})
    assert policy.tiled
    keys = (torch.randn(H, N, D) + torch.randn(H, 1, D)).to(dtype)
    want = policy.score(view(keys.float(), counts))
    monkeypatch.setattr(base, "_TILE", 7)
    with Largest() as seen:
        got = policy.score(view(keys, counts))
    assert isinstance(got, Tensor) and isinstance(want, Tensor)
    for head, count in enumerate(counts or [M] * H):
        torch.testing.assert_close(got[head, :count], want[head, :count], rtol=1e-5, atol=1e-5)
    assert 0 < seen.most <= 7 * D or (name == "knorm" and seen.most == 0)


def test_only_policies_that_say_so_are_tiled() -> None:
    assert not policies.get("snapkv", {}).tiled
    assert not policies.get("kvcrush(snapkv)", {}).tiled
    assert policies.get("kvcrush(knorm)", {}).tiled
