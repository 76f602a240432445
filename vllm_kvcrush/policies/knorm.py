"""Key norms: tokens whose keys are short stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_kvcrush.policies.base import Policy, View, norms


@dataclass
class KNorm(Policy):
    """L2 norm of keys (arXiv 2406.11430): a token whose key is short gets much attention, so the
    score of a token is minus the norm of its key.

    Rotary embeddings change no norm. The paper leaves the first two layers alone; here all layers
    keep equally many tokens.

    Cost: O(n D), one pass over the keys.

    Choose it where nothing may be kept beside the pages and no query tells what will matter.
    """

    name: ClassVar[str] = "knorm"
    tiled: ClassVar[bool] = True

    def score(self, view: View) -> Tensor:
        return -norms(view.keys[:, : view.candidates])
