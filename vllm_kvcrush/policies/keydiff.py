"""KeyDiff: tokens whose keys are unlike the others' stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush.policies.base import Policy, View, float_tiles, norms


@dataclass
class KeyDiff(Policy):
    """KeyDiff (arXiv 2504.15364): the score of a token is minus the cosine of its key with the
    anchor, the mean of all keys divided by their norms.

    The anchor is of all keys that a head holds, with the raw tail's. The paper compacts after each
    block of a prompt; here that is each prefill interval.

    Cost: O(n D), three passes over the keys.

    Choose it where the question comes after the prompt is compacted, so that no query tells what
    will matter.
    """

    name: ClassVar[str] = "keydiff"
    tiled: ClassVar[bool] = True

    def score(self, view: View) -> Tensor:
        keys, m = view.keys, view.candidates
        scale = 1 / norms(keys).clamp(min=1e-12)
        if view.ragged:
            scale = scale.masked_fill(~view.held_valid, 0.0)
        # [H, 1, D], in the direction of the mean.
        anchor = sum(scale[:, own].unsqueeze(1) @ tile for own, tile in float_tiles(keys))
        assert isinstance(anchor, Tensor)
        anchor = anchor / anchor.norm(dim=2, keepdim=True).clamp(min=1e-12)
        along = [(tile @ anchor.mT).squeeze(2) for _, tile in float_tiles(keys[:, :m])]
        return -torch.cat(along, 1) * scale[:, :m]
