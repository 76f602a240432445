"""KVzip: the tokens that the model looks at when it repeats its context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_kvcrush.policies.base import Policy, View


@dataclass
class KVzip(Policy):
    """KVzip (arXiv 2505.23416 §3.2-3.4, Eq. 2): the score of a token is the greatest attention that
    it receives, from any query head of its KV head and any token, while the model reads "Repeat the
    previous context:" and then the context once more. No question is needed.

    The engine makes that second pass before a compaction, over the tokens that are new since the
    last one, in chunks of 2048 (the later ones with the 8 tokens before them in the instruction).
    Older tokens keep the score that they got when they were new. Nothing of the pass is kept but
    the scores.

    Differences: the softmax is over all that a request holds, which the paper approximates by the
    chunk and its repetition; no chat template surrounds the instruction; all layers and heads keep
    equally many tokens, where the paper takes the best of all (`adakv(kvzip)` does, within a
    layer); tokens of answers are repeated as well, as a request is compacted while it decodes.

    Clients may ask for it only where the operator names it, in `--kv-policy` or
    `--kv-policy-allow`. Near the model's longest context chunks are shorter, as positions go on
    behind the request's own; where there is no room at all its newest tokens stay.

    Cost: a second pass of the model over all that is compacted, during which no other request is
    served, and a copy of one layer's keys and values at a time. As its attention is not that of the
    kernels, it took about twice as long as the prefill.

    Choose it where a context is read once and asked about often, so that a prompt that takes three
    times as long is worth it: as `adakv(kvzip)`, and down to a quarter of the tokens.
    """

    name: ClassVar[str] = "kvzip"
    needs: ClassVar[frozenset[str]] = frozenset({"repeat", "state"})

    def score(self, view: View) -> tuple[Tensor, dict[str, Tensor]]:
        score = view.repeated
        assert score is not None, "the engine has not repeated anything"
        # Without a state the policy failed the last time: what is known to nobody goes first.
        if view.known is not None and "greatest" in view.state:
            score = torch.where(view.known, view.state["greatest"], score)
        return score, {"greatest": score}
