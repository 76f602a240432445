"""TOVA: the tokens that the last query attends to, over all heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vllm_kvcrush.policies.base import Policy, View


@dataclass
class TOVA(Policy):
    """TOVA (arXiv 2401.06104): the score of a token is the attention of the last query alone,
    the mean over all heads of the layer, over those of all ranks too. So all heads keep the same
    tokens.

    Heads that hold unequal numbers of tokens choose by their own mean. The paper drops one token
    with each new one; here as many as a compaction must are dropped at once.

    Cost: O(n D) on the pages themselves, no copy of the keys.

    Choose it where memory beside the pages is short and the last tokens of a prompt say what is
    wanted.
    """

    name: ClassVar[str] = "tova"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    def score(self, view: View) -> Tensor:
        own = view.window_scores(last=1)
        everyone = view.all_heads(own)  # each rank must ask, though its heads may be unequal
        return own if view.ragged else everyone.mean(0).expand(len(own), -1)
