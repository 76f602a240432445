"""Which keys are alike: the kernels against plain torch in float64."""

from __future__ import annotations

import random

import pytest
import torch

from vllm_kvcrush.ops import reference
from vllm_kvcrush.ops.triton.similar import nearest_kept, redundancy


def keys_of(heads: int, n: int, size: int, device: str) -> torch.Tensor:
    keys = torch.randn(heads, n, size)
    like = torch.randint(0, max(n, 1), (heads, n))
    again = keys.gather(1, like.unsqueeze(2).expand_as(keys))
    return torch.where(torch.rand(heads, n, 1) < 0.3, 2 * again, keys).to(device)


@pytest.mark.parametrize(("n", "size"), [(1, 64), (64, 16), (150, 40), (193, 128)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_nearest_kept(n: int, size: int, share: float, device: str, draw: random.Random) -> None:
    keys = keys_of(2, n, size, device)
    kept = torch.rand(2, n, device=device) < share
    gone = ~kept & (torch.rand(2, n, device=device) < 0.8)
    target, cosine = nearest_kept(keys, gone, kept)
    want = reference.nearest_kept(keys.double(), gone, kept)
    torch.testing.assert_close(cosine, want[1], rtol=0, atol=1e-5)
    # Where several are alike but for rounding, any will do.
    unit = torch.nn.functional.normalize(keys.double(), dim=2)
    found = (unit * unit.gather(1, target.unsqueeze(2).expand_as(unit))).sum(2)
    merged = gone & kept.any(1, keepdim=True)
    torch.testing.assert_close(found[merged].float(), cosine[merged], rtol=0, atol=1e-5)
    assert bool(kept.gather(1, target)[merged].all())
    at = torch.arange(n, device=device).expand_as(target)
    assert torch.equal(target[~merged], at[~merged])


@pytest.mark.parametrize("counts", [None, [150, 64], [0, 97]])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_redundancy(
    counts: list[int] | None, threshold: float, device: str, draw: random.Random
) -> None:
    # No cosine is so near the threshold that rounding decides.
    for _ in range(200):
        keys = keys_of(2, 150, 64, device)
        unit = torch.nn.functional.normalize(keys.double(), dim=2)
        if float(((unit @ unit.mT) - threshold).abs().min()) > 2e-6:
            break
    got = redundancy(keys, counts, threshold)
    want = reference.redundancy(keys.double(), counts, threshold)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
