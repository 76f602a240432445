"""Runs the model in transformers: prefills contexts, and forces answers over a given cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcrush.codecs.transform.calibrate import Probe

# The last queries of a context, kept for what needs them.
WINDOW = 512


@dataclass
class Cache:
    """The cache of one context.

    Attributes:
        keys: [L, H, n, D], with RoPE.
        values: [L, H, n, Dv].
        queries: [L, Hq, w, D], the newest, with RoPE.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.length)


@dataclass
class Coded:
    """A cache after encoding and decoding.

    Attributes:
        keys, values: as in Cache; n differs where tokens were evicted.
        bytes: bytes of the pages, by (block size, bytes of a raw channel).
        kept: bool [L, H, n], tokens that were not evicted; None for all.
        log_bias: float32 [L, H, n], what is added to the logits of a token; None means nothing.
    """

    keys: Tensor
    values: Tensor
    bytes: dict[tuple[int, int], int]
    kept: Tensor | None = None
    log_bias: Tensor | None = None


class Forcer:
    """Prefills contexts and forces answers."""

    def __init__(self, path: str) -> None:
        self.probe = Probe(path)

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> Cache:
        """Returns the cache of a context."""
        queries, keys, values = self.probe.prefill(tokens)
        return Cache(keys, values, queries[:, :, -WINDOW:].clone())

    @torch.inference_mode()
    def force(self, coded: Coded, start: int, tokens: Sequence[int]) -> Tensor:
        """Returns log-probabilities [m, vocab] after each of m tokens, the first of which has
        position `start`."""
        return self.probe.log_probabilities(
            coded.keys, coded.values, start, tokens, coded.kept, coded.log_bias
        )


def measure(
    logp: Tensor, full: Tensor, tokens: Sequence[int], scored: Sequence[bool]
) -> dict[str, float]:
    """Returns the figures of one answer.

    Args:
        logp, full: log-probabilities [m, vocab] over this cache and over the full one.
        scored: which of the m tokens count.
    """
    steps = [i for i, wanted in enumerate(scored) if wanted]
    gold = torch.tensor([tokens[i] for i in steps])[:, None]
    before = [i - 1 for i in steps]
    logp, full = logp[before], full[before]
    top = logp.argmax(-1)
    return {
        "nll": -logp.gather(1, gold).mean().item(),
        "delta_nll": (full.gather(1, gold) - logp.gather(1, gold)).mean().item(),
        "kl": (full.exp() * (full - logp)).sum(-1).mean().item(),
        "agreement": (top == full.argmax(-1)).float().mean().item(),
        "exact": float((top == gold[:, 0]).all()),
    }
