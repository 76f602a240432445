"""Plain-torch operations of the eviction policies: the oracle of every faster implementation.

Shapes use H KV heads, Hq = g·H query heads (query head q reads KV head q // g), n held slots, of
which the first m are candidates, a window of w queries, and head size D. Inputs may have any
float dtype; maths and results are float32, or float64 where an input is float64. Ties always go
to the lower slot, and nothing here waits for the device, so that the layers of a compaction can
be queued one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FAR = torch.iinfo(torch.int64).max
ANCHORS = ("random", "zeros", "ones", "mean", "alternate")


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def window_attention(
    queries: Tensor, keys: Tensor, scale: float, log_bias: Tensor | None = None
) -> Tensor:
    """Returns the attention weights of the newest queries over every held slot (SnapKV, arXiv
    2404.14469 §4).

    Args:
        queries: [Hq, w, D] with RoPE, unscaled; row i is the query of slot n - w + i.
        keys: [H, n, D] with RoPE, w <= n.
        scale: factor of q·k, usually D ** -0.5.
        log_bias: [H, m], added to the logits of the first m slots, or None.

    Returns:
        [Hq, w, n]; every row sums to 1 and is 0 at the slots after its own.
    """
    num_heads, window, size = queries.shape
    num_kv_heads, n, _ = keys.shape
    if window > n:
        raise ValueError(f"a window of {window} queries is longer than the {n} held slots")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide over {num_kv_heads} KV heads")
    dtype = _wide(queries, keys)
    # A group's queries become rows of one matrix product: the keys are not repeated.
    rows = queries.to(dtype).reshape(num_kv_heads, -1, size) * scale
    logits = (rows @ keys.to(dtype).mT).view(num_heads, window, n)
    if log_bias is not None:
        own = log_bias.to(dtype).repeat_interleave(num_heads // num_kv_heads, 0)
        logits[..., : own.shape[1]] += own.unsqueeze(1)
    later = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu_(1)
    logits[..., n - window :].masked_fill_(later, -torch.inf)
    return logits.softmax(-1)


def reduce_groups(x: Tensor, num_kv_heads: int, how: str = "mean") -> Tensor:
    """Merges the query heads that share a KV head (GQA).

    Args:
        x: [Hq, ...].
        num_kv_heads: H; divides Hq.
        how: "mean" or "max" over the group.

    Returns:
        [H, ...].
    """
    if x.shape[0] % num_kv_heads:
        raise ValueError(f"{x.shape[0]} query heads do not divide over {num_kv_heads} KV heads")
    group = x.shape[0] // num_kv_heads  # given, because -1 is ambiguous where a head has no slots
    groups = x.to(_wide(x)).reshape(num_kv_heads, group, *x.shape[1:])
    if how == "mean":
        return groups.mean(1)
    if how == "max":
        return groups.amax(1)
    raise ValueError(f"how={how!r} is not one of mean, max")


def pool_scores(scores: Tensor, size: int, kind: str) -> Tensor:
    """Smooths scores along the slots, so that neighbours of a strong slot stay with it
    (SnapKV, arXiv 2404.14469 §4).

    Args:
        scores: [H, m].
        size: width of the centred window, odd.
        kind: "avg" or "max". At the edges the window is smaller: padding counts in neither.

    Returns:
        [H, m].
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size={size!r} is not an odd whole number, 1 or more")
    scores, pad = scores.to(_wide(scores)), size // 2
    if kind == "max":
        return F.max_pool1d(scores, size, stride=1, padding=pad)
    if kind == "avg":
        return F.avg_pool1d(scores, size, stride=1, padding=pad, count_include_pad=False)
    raise ValueError(f"kind={kind!r} is not one of avg, max")


def window_scores(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    candidates: int | Sequence[int],
    *,
    mean: bool = True,
    pool: int = 1,
    pool_kind: str = "max",
    reduce: str | None = "mean",
    counts: Sequence[int] | None = None,
    log_bias: Tensor | None = None,
) -> Tensor:
    """Returns the attention that each candidate receives from the newest queries.

    Args:
        queries, keys, scale: as in `window_attention`.
        candidates: m, for all heads or for each: slots [0, m) are scored, and pooled together.
        mean: whether to take the mean over the window instead of the sum.
        pool, pool_kind: `size` and `kind` of `pool_scores`; 1 leaves the scores as they are.
        reduce: `how` of `reduce_groups`, or None for no reduction.
        counts: slots of each head, where they differ; what lies past them is padding.
        log_bias: [H, m], added to the logits of the candidates.

    Returns:
        [H, m], or [Hq, m] without reduction; m is the largest, and scores past a head's own are
        -inf.
    """
    if counts is not None or not isinstance(candidates, int):
        heads, group = len(keys), len(queries) // len(keys)
        own = [candidates] * heads if isinstance(candidates, int) else list(candidates)
        held = [keys.shape[1]] * heads if counts is None else counts
        rows = []
        for h, (m, n) in enumerate(zip(own, held, strict=True)):
            each = queries[h * group : (h + 1) * group], keys[h : h + 1, :n], scale, m
            bias = None if log_bias is None else log_bias[h : h + 1, :m]
            found = window_scores(
                *each, mean=mean, pool=pool, pool_kind=pool_kind, reduce=reduce, log_bias=bias
            )
            rows.append(F.pad(found, (0, max(own) - m), value=-torch.inf))
        return torch.cat(rows)
    weights = window_attention(queries, keys, scale, log_bias)[..., :candidates]
    votes = weights.mean(1) if mean else weights.sum(1)
    if candidates:
        votes = pool_scores(votes, pool, pool_kind)
    return votes if reduce is None else reduce_groups(votes, keys.shape[0], reduce)


@dataclass
class LayerKV:
    """What a request holds in one layer, in plain tensors.

    Attributes:
        keys: [H, n, D], with RoPE.
        values: [H, n, D], or None if nobody asks for them.
        counts: tokens of each head, where they differ; what lies past them is padding.
        log_bias: [H, m], added to the logits of the first m slots, or None.
    """

    keys: Tensor
    values: Tensor | None = None
    counts: Sequence[int] | None = None
    log_bias: Tensor | None = None

    @property
    def num_kv_heads(self) -> int:
        """Returns the number of KV heads, H."""
        return self.keys.shape[0]

    @property
    def device(self) -> torch.device:
        """Returns the device on which policies compute."""
        return self.keys.device

    def window_scores(
        self, queries: Tensor, scale: float, candidates: int | Sequence[int], **options: Any
    ) -> Tensor:
        """Returns `window_scores` over these keys."""
        return window_scores(
            queries,
            self.keys,
            scale,
            candidates,
            counts=self.counts,
            log_bias=self.log_bias,
            **options,
        )


def top_mask(scores: Tensor, keep: int | Tensor) -> Tensor:
    """Marks each head's `keep` best slots.

    Args:
        scores: [H, m]; NaN counts as the worst.
        keep: 0 <= keep <= m, one number for all heads or int64 [H].

    Returns:
        bool [H, m] with exactly `keep` ones in each row.
    """
    if isinstance(keep, Tensor):
        rows = zip(torch.split(scores, 1), keep.tolist(), strict=True)
        return torch.cat([top_mask(row, own) for row, own in rows])
    m = scores.shape[-1]
    if not 0 <= keep <= m:
        raise ValueError(f"cannot keep {keep} of {m} slots")
    if keep in (0, m):
        return torch.full_like(scores, keep == m, dtype=torch.bool)
    # A NaN would compare false with everything and break the count, which frees wrong memory.
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    # topk finds the threshold quickly, but which of several equal slots it returns differs
    # between devices, so the first of them are taken here.
    least = scores.topk(keep, sorted=False).values.amin(-1, keepdim=True)
    above, ties = scores > least, scores == least
    room = keep - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1) <= room))


def mask_slots(mask: Tensor, count: int | Tensor) -> Tensor:
    """Lists the slots that a mask marks; see `ops.mask_slots`."""
    if isinstance(count, Tensor):
        rows = zip(torch.split(mask, 1), count.tolist(), strict=True)
        width = int(count.max())
        found = [F.pad(mask_slots(row, n), (0, width - n), value=-1) for row, n in rows]
        return torch.cat(found)
    heads = mask.shape[0]
    return torch.nonzero_static(mask, size=heads * count)[:, 1].view(heads, count)


def anchor_bits(kind: str, width: int, seed: int, device: torch.device) -> Tensor | None:
    """Returns the vector that KVCrush measures distances from (arXiv 2503.00022; the kinds are
    those of OpenVINO GenAI's `KVCrushAnchorPointMode`).

    Args:
        kind: "random" (fixed by `seed` and `width` alone), "zeros", "ones", "alternate"
            (0, 1, 0, 1, ...) or "mean".
        width: b, the number of bits.
        seed: seed of "random".

    Returns:
        bool [b], or None for "mean", which depends on the vectors: see `represent`.
    """
    if kind == "mean":
        return None
    if kind == "random":
        # Drawn on the CPU, so that the bits are the same with every kind of device.
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 2, (width,), generator=generator).bool().to(device)
    if kind == "alternate":
        return (torch.arange(width, device=device) % 2).bool()
    if kind in ("zeros", "ones"):
        return torch.full((width,), kind == "ones", dtype=torch.bool, device=device)
    raise ValueError(f"kind={kind!r} is not one of {', '.join(ANCHORS)}")


def represent(
    bits: Tensor, important: Tensor, count: int, anchor: Tensor | None, unit: int = 1
) -> Tensor:
    """Adds representatives to each head's important units (KVCrush, arXiv 2503.00022): `count`
    evenly spaced ones of its other units, in the order of their Hamming distance to the anchor,
    then of their index.

    Args:
        bits: bool [b, u·unit], a row for each head that describes tokens.
        important: bool [H, u].
        count: number of representatives of each head; no more than it has other units.
        anchor: bool [b·unit], or None for the majority of each head's other units, zero at a tie.
        unit: tokens in a unit; its vector is the bits of its tokens, head after head.

    Returns:
        bool [H, u], the important units and the representatives.
    """
    vectors = bits.view(len(bits), -1, unit).transpose(0, 1).flatten(1)  # [u, b·unit]
    others = ~important
    available = others.sum(-1, keepdim=True)
    if anchor is None:
        ones = (others.unsqueeze(-1) & vectors).sum(-2)
        anchor = (2 * ones > available).unsqueeze(-2)  # [H, 1, b·unit]
    distance = (vectors ^ anchor).sum(-1)
    order = torch.where(important, FAR, distance).argsort(stable=True)
    # Of x other units those at floor(i·x / count), so the first one is always among them.
    places = torch.arange(count, device=bits.device) * available // max(count, 1)
    return important.scatter(-1, order.gather(-1, places), True)
