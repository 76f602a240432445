"""KeyDiff: tokens whose keys are unlike the others' stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_kvcrush.policies.base import Policy, View


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

    def score(self, view: View) -> Tensor:
        keys = view.keys.float()
        scale = 1 / keys.norm(dim=2).clamp(min=1e-12)
        if view.ragged:
            scale = scale.masked_fill(~view.held_valid, 0.0)
        anchor = scale.unsqueeze(1) @ keys  # [H, 1, D], in the direction of the mean
        anchor = anchor / anchor.norm(dim=2, keepdim=True).clamp(min=1e-12)
        m = view.candidates
        return -(keys[:, :m] @ anchor.mT).squeeze(2) * scale[:, :m]
