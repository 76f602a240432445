"""The demo model, and models that work alike but whose keys look otherwise: made from it in memory,
so that what no codec was tuned on can be measured without another model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vllm_kvcrush.codecs.transform.calibrate import Probe

# Channels whose RoPE turns by less than this, in radians, over 4,096 tokens: what is added to all
# keys there adds nearly the same to all logits, which softmax does not see.
_SLOW = 0.8
BIAS = 12.0  # standard deviation; keys of the demo model have one of about 1
FACTOR = 12.0  # by which outlier channels are larger
OUTLIERS = 2  # pairs of channels of each head


def _attention(probe: Probe) -> Iterator[Any]:
    for layer in probe.network.base_model.layers:
        yield layer.self_attn


def _slow(probe: Probe) -> Tensor:
    """Returns which channels of a head turn slowly, bool [D]."""
    slow: Tensor = probe.rope.frequencies * 4096 < _SLOW
    return torch.cat([slow, slow])


@torch.no_grad()
def biased(probe: Probe) -> None:
    """Adds a constant to all keys, as models with a bias of their key projections have it."""
    generator = torch.Generator().manual_seed(7)
    slow = _slow(probe)
    for own in _attention(probe):
        noise = torch.randn(probe.model.kv_heads, probe.model.size, generator=generator)
        own.k_proj.bias = torch.nn.Parameter((BIAS * noise * slow).flatten(), requires_grad=False)


@torch.no_grad()
def outliers(probe: Probe) -> None:
    """Makes a few channels of all keys larger and those of queries smaller by the same factor,
    which changes nothing that the model computes."""
    generator = torch.Generator().manual_seed(7)
    heads, size = probe.model.kv_heads, probe.model.size
    groups = probe.model.heads // heads
    for own in _attention(probe):
        factor = torch.ones(heads, 2, size // 2)
        for head in range(heads):
            at = torch.randperm(size // 2, generator=generator)[:OUTLIERS]
            factor[head, :, at] = FACTOR
        factor = factor.view(heads, size)
        own.k_proj.weight *= factor.flatten()[:, None]
        own.q_proj.weight /= factor.repeat_interleave(groups, 0).flatten()[:, None]


MODELS: dict[str, Callable[[Probe], None]] = {
    "demo": lambda probe: None,
    "biased": biased,
    "outliers": outliers,
}
