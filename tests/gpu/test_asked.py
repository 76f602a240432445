"""What a compaction asks of a device, counted without one: `benchmarks.gpu.asked`. Kernels are not
interpreted here, so these need a process of their own, which tests/unit/test_gpu.py starts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from benchmarks.gpu import asked, compaction

FEW, MANY = 2, 6  # layers


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of which everything fits the staging."""
    monkeypatch.setattr(compaction, "TOKENS", 1024)


def asked_by(policy: str, budget: float) -> dict[str, list[asked.Asked]]:
    """What the compactions of a request ask, of a model with few layers and of one with many."""
    found: dict[str, list[asked.Asked]] = {}
    for layers in (FEW, MANY):
        for counts in compaction.count(policy, layers, budget):
            found.setdefault(counts.stage, []).append(counts.asked)
    assert list(found) == list(compaction.STAGES)
    return found


@pytest.mark.parametrize("policy", ["int8", "tc4", "auto"])
def test_all_layers_are_moved_at_once(policy: str) -> None:
    """Where no policy chooses, nothing that is asked depends on the number of layers, and nobody
    waits."""
    for few, many in asked_by(policy, 0.75).values():
        assert few.kernels == many.kernels and few.operations == many.operations
        assert few.kernels["gather_kernel"] >= 1
        assert few.uploads == many.uploads <= 4
        assert not many.waits


@pytest.mark.parametrize("policy", ["kvcrush", "snapkv", "int4"])
def test_nobody_waits_for_a_choice(policy: str) -> None:
    """Policies are asked layer by layer, and all that they choose is moved at once."""
    for few, many in asked_by(policy, 0.15).values():
        assert not many.waits
        assert many.uploads <= few.uploads, "the same numbers are copied once"
        moved = {"encode_kernel", "fitted_keys_kernel"}
        assert {k: n for k, n in few.kernels.items() if k in moved} == {
            k: n for k, n in many.kernels.items() if k in moved
        }


def test_those_that_share_pages_out_wait_once() -> None:
    for few, many in asked_by("adakv", 0.25).values():
        assert few.waits == many.waits and many.waits.total() == 1


def test_what_is_counted() -> None:
    """The counter sees what CUDA would do."""
    with asked.counted() as found:
        x = async_tensor_h2d(np.arange(10, dtype=np.int32), device=asked.DEVICE)
        assert x.is_cuda and x[2:].device.type == "cuda" and found.uploads == 1
        assert found.totals == {"kernels": 0, "operations": 0, "uploads": 1, "waits": 0}
        y = (x.view(2, 5) + 1).clamp_(max=3)
        torch.cat([y, y], out=torch.empty(4, 5, dtype=torch.int32, device=asked.DEVICE))
        assert dict(found.operations) == {"add": 1, "clamp_": 1, "cat": 1}
        with pytest.raises(RuntimeError, match="others on the host"):
            x + torch.arange(10)
        found.forget()
        assert int(y[0, 0]) == 1 and y.tolist()[0] == [1, 2, 3, 3, 3] and y.cpu().is_cpu
        y[y > 2] = 0
        torch.arange(3).to(asked.DEVICE)
        torch.tensor([1, 2], device=asked.DEVICE)
        assert found.waits.total() == 6 and found.waits["copy from the host"] == 1
