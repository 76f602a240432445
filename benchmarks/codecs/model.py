"""The model in transformers: contexts read once, answers forced over a cache of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_kvcrush.calibrate import Reader

# The last queries of a context, kept for what needs them.
WINDOW = 512


@dataclass
class Cache:
    """A context's cache. Keys [L, H, n, D] and queries [L, Hq, w, D] (the newest) with RoPE,
    values [L, H, n, Dv]."""

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
        bytes: what the pages take by (block size, bytes of a raw channel).
        kept: bool [L, H, n], tokens that were not evicted; None for all.
    """

    keys: Tensor
    values: Tensor
    bytes: dict[tuple[int, int], int]
    kept: Tensor | None = None


class Forcer:
    """Reads contexts and forces answers."""

    NAME = "kvcrush_codecs"

    def __init__(self, path: str) -> None:
        self.reader = Reader(path)
        self._coded: Coded | None = None
        self._install()
        self.reader.network.set_attn_implementation(self.NAME)

    def _install(self) -> None:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

        AttentionInterface.register(self.NAME, self._attention)
        AttentionMaskInterface.register(self.NAME, sdpa_mask)

    def _attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any
    ) -> Any:
        coded = self._coded
        if coded is None:
            return self.reader.attention(module, query, key, value, mask, **rest)
        layer, (heads, m, size) = module.layer_idx, query[0].shape
        keys = torch.cat([coded.keys[layer], key[0]], 1)
        values = torch.cat([coded.values[layer], value[0]], 1)
        kv_heads, total = keys.shape[:2]
        n = total - m
        rows = query[0].reshape(kv_heads, -1, size)
        logits = ((rows @ keys.mT) * rest["scaling"]).view(heads, m, total)
        logits[..., n:] += torch.full((m, m), -torch.inf).triu(1)
        if coded.kept is not None:
            groups = logits.view(kv_heads, -1, m, total)
            groups[..., :n].masked_fill_(~coded.kept[layer][:, None, None], -torch.inf)
        weights = logits.softmax(-1).view(kv_heads, -1, total)
        output = (weights @ values).view(heads, m, -1)
        return output.transpose(0, 1)[None], None

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> Cache:
        """The cache of a context."""
        queries, keys, values = self.reader.read(tokens)
        return Cache(keys, values, queries[:, :, -WINDOW:].clone())

    @torch.inference_mode()
    def force(self, coded: Coded, start: int, tokens: Sequence[int]) -> Tensor:
        """Log-probabilities [m, vocab] after each of m tokens; the first has position `start`."""
        self._coded, places = coded, torch.arange(start, start + len(tokens))
        try:
            logits = self.reader.network(
                input_ids=torch.tensor([list(tokens)]),
                position_ids=places[None],
                use_cache=False,
            ).logits[0]
        finally:
            self._coded = None
        return logits.log_softmax(-1)


def measure(
    logp: Tensor, full: Tensor, tokens: Sequence[int], scored: Sequence[bool]
) -> dict[str, float]:
    """Figures of one answer; `logp` and `full` are [m, vocab], this run's and the full cache's."""
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
