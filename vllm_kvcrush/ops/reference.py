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
from typing import Any, NamedTuple

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
    logits = window_logits(queries, keys, scale, log_bias)
    return logits.flatten(0, 1).softmax(-1)


def window_logits(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    log_bias: Tensor | None = None,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """Returns the attention logits of the newest queries over every held slot.

    Args:
        queries, keys, scale, log_bias: as in `window_attention`.
        counts: slots of each head, where they differ; what lies past them is padding. The query
            rows end at a head's own last slot.

    Returns:
        [H, g, w, n]; -inf at slots after a query's own and past a head's own.
    """
    num_heads, window, size = queries.shape
    num_kv_heads, n, _ = keys.shape
    if window > n:
        raise ValueError(f"a window of {window} queries is longer than the {n} held slots")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide over {num_kv_heads} KV heads")
    dtype, device = _wide(queries, keys), keys.device
    # A group's queries become rows of one matrix product: the keys are not repeated.
    rows = queries.to(dtype).reshape(num_kv_heads, -1, size) * scale
    logits = (rows @ keys.to(dtype).mT).view(num_kv_heads, -1, window, n)
    if log_bias is not None:
        logits[..., : log_bias.shape[1]] += log_bias.to(dtype)[:, None, None]
    if counts is None:
        later = torch.ones(window, window, dtype=torch.bool, device=device).triu_(1)
        logits[..., n - window :].masked_fill_(later, -torch.inf)
        return logits
    ends = torch.tensor(counts)[:, None] - window + torch.arange(1, window + 1)  # [H, w]
    seen = torch.arange(n, device=device) < ends.to(device).unsqueeze(2)
    return logits.masked_fill_(~seen.unsqueeze(1), -torch.inf)


def attend_and_score(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    held: tuple[Tensor, Tensor],
    scale: float,
    log_bias: Tensor | None = None,
    valid: Tensor | None = None,
    most: int = 1 << 22,
) -> tuple[Tensor, Tensor]:
    """Computes attention of new tokens over held slots and, causally, over one another, and the
    greatest weight that each held slot receives (KVzip, arXiv 2505.23416 Eq. 2).

    Args:
        queries, keys, values: of the new tokens, [t, Hq, D], [t, H, D] and [t, H, Dv], with RoPE,
            queries unscaled.
        held: keys [H, n, D] and values [H, n, Dv] of the held slots.
        scale: factor of q·k.
        log_bias: [H, m], added to the logits of the first m held slots, or None.
        valid: bool [H, n], held slots that are there; None means all.
        most: logits that are computed at once.

    Returns:
        The output, [t, Hq, Dv], and the greatest weights over new tokens and the query heads of a
        KV head, [H, n].
    """
    tokens, num_heads, size = queries.shape
    heads, n, _ = held[0].shape
    dtype, group = _wide(queries, held[0]), num_heads // heads
    every_key = torch.cat((held[0].to(dtype), keys.to(dtype).transpose(0, 1)), 1)
    every_value = torch.cat((held[1].to(dtype), values.to(dtype).transpose(0, 1)), 1)
    bias = torch.zeros(heads, n, dtype=dtype, device=keys.device)
    if log_bias is not None:
        bias[:, : log_bias.shape[1]] = log_bias.to(dtype)
    if valid is not None:
        bias = bias.masked_fill(~valid, -torch.inf)
    rows = max(1, most // (num_heads * every_key.shape[1]))
    greatest = torch.zeros(heads, n, dtype=dtype, device=keys.device)
    output = torch.empty(tokens, num_heads, values.shape[2], dtype=dtype, device=keys.device)
    for first in range(0, tokens, rows):
        end = min(first + rows, tokens)
        own = (queries[first:end].to(dtype) * scale).view(end - first, heads, group, size)
        logits = own.permute(1, 2, 0, 3).flatten(1, 2) @ every_key[:, : n + end].mT
        logits = logits.view(heads, group, end - first, n + end)
        logits[..., :n] += bias[:, None, None]
        later = torch.ones(end - first, end, dtype=torch.bool, device=keys.device).triu_(first + 1)
        logits[..., n:].masked_fill_(later, -torch.inf)
        weights = logits.softmax(-1)
        greatest = torch.maximum(greatest, weights[..., :n].amax((1, 2)))
        found = weights.flatten(1, 2) @ every_value[:, : n + end]
        output[first:end] = found.view(num_heads, end - first, -1).transpose(0, 1)
    return output, greatest


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
        reduce: `how` of `reduce_groups`; or "greatest", the maximum over the query heads of a KV
            head for each query, before the sum over the window; or None for no reduction.
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
    if reduce == "greatest":
        weights, reduce = reduce_groups(weights, keys.shape[0], "max"), None
    votes = weights.mean(1) if mean else weights.sum(1)
    if candidates:
        votes = pool_scores(votes, pool, pool_kind)
    return votes if reduce is None else reduce_groups(votes, keys.shape[0], reduce)


class WindowMoments(NamedTuple):
    """What a window of queries makes of each candidate.

    Attributes:
        mean, variance: float32 [Hq, m], of a candidate's weights over the window, 0 past a head's
            count. The variance is the unbiased one, and 0 for a window of one query.
        entropy: float32 [Hq], the sum over the window of -Σ a·ln a over the candidates.
    """

    mean: Tensor
    variance: Tensor
    entropy: Tensor


def window_moments(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    candidates: Sequence[int],
    tail: int,
    log_bias: Tensor | None = None,
) -> WindowMoments:
    """Returns moments of the weights of `window_attention` (CAKE, arXiv 2503.12491 §4), one KV head
    after the other, so that no more than one head's weights are held.

    Args:
        queries, keys, scale, log_bias: as in `window_attention`.
        candidates: m of each KV head; its slots [0, m) are meant.
        tail: number of slots of each head after its candidates.
    """
    group, width, window = len(queries) // len(keys), max(candidates), queries.shape[1]
    rows = []
    for h, m in enumerate(candidates):
        own = queries[h * group : (h + 1) * group], keys[h : h + 1, : m + tail]
        bias = None if log_bias is None else log_bias[h : h + 1, :m]
        weights = window_attention(*own, scale, bias)[..., :m]
        mean = weights.mean(1)
        variance = (weights - mean.unsqueeze(1)).square().sum(1) / max(1, window - 1)
        entropy = -torch.special.xlogy(weights, weights).sum((1, 2))
        rows.append((F.pad(mean, (0, width - m)), F.pad(variance, (0, width - m)), entropy))
    return WindowMoments(*(torch.cat([row[i] for row in rows]) for i in range(3)))


def nearest_kept(keys: Tensor, gone: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Finds for every dropped slot the kept one of the same head whose key is most similar.

    Args:
        keys: [H, m, D].
        gone, kept: bool [H, m], the dropped slots and the kept ones, disjoint.

    Returns:
        int64 [H, m], the nearest kept slot of each dropped one, of equal ones the first (on a GPU
        any), and every other slot itself; and float32 [H, m], the cosine between the two keys: 1
        for other slots, -2 where a head keeps nothing.
    """
    target = torch.arange(keys.shape[1], device=keys.device).repeat(len(keys), 1)
    cosine = torch.ones(target.shape, device=keys.device).masked_fill(gone, -2.0)
    # A float32 product's last bit may depend on its column, and then equal keys are not equal.
    wide = torch.float64 if keys.device.type == "cpu" else torch.float32
    unit = F.normalize(keys.to(wide), dim=2)
    for head, own in enumerate(unit):
        stay = kept[head].nonzero().squeeze(1)
        if not len(stay):
            continue
        others = own[stay].mT
        for slots in torch.split(gone[head].nonzero().squeeze(1), 1024):  # bounded memory
            near = (own[slots] @ others).float().max(1)
            target[head, slots], cosine[head, slots] = stay[near.indices], near.values
    return target, cosine


def merge(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Returns the weighted sums of what goes to each slot: out[h, target[h, i]] += weight[h, i] ·
    x[h, i].

    Args:
        x: [H, m, D].
        target: int64 [H, m], a slot of the same head for each slot.
        weight: [H, m]; where it is 0, x does not count, whatever it is.

    Returns:
        [H, m, D], 0 at slots that are nobody's target.
    """
    parts = torch.where((weight != 0).unsqueeze(2), weight.unsqueeze(2) * x, 0.0)
    index = target.unsqueeze(2).expand_as(parts)
    return torch.zeros_like(parts).scatter_add_(1, index, parts)


def spread(values: Tensor, kept: Tensor, part: Tensor, width: int) -> Tensor:
    """Returns values in which each dropped slot's is added, `part` times, to those of the next
    `width` kept slots of its head, fewer near the end (CaM, openreview LCTmppB165, Eq. 8).

    Args:
        values: [H, m, D].
        kept: bool [H, m].
        part: [H, m]; those of kept slots do not count.
        width: 1 or more.

    Returns:
        [H, m, D]; dropped slots have their own values.
    """
    out = values.to(_wide(values))
    gone = torch.where(kept, 0.0, part).unsqueeze(2).double() * values.double()
    running = F.pad(gone.cumsum(1), (0, 0, 1, 0))  # of the slots before each
    places = torch.arange(kept.shape[1], device=kept.device)
    # The slot after the kept one `width` before each kept slot, or the first: what lies between is
    # spread over it. Kept slots are numbered, and the numbers' slots looked up.
    number = kept.cumsum(1) - 1
    order = torch.where(kept, places, kept.shape[1]).sort(1).values
    earlier = order.gather(1, (number - width).clamp(min=0)) + 1
    since = torch.where(number >= width, earlier, 0)
    index = since.unsqueeze(2).expand_as(gone)
    added = running[:, :-1] - running.gather(1, index)
    return torch.where(kept.unsqueeze(2), out + added.to(out.dtype), out)


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


def ranks(scores: Tensor) -> Tensor:
    """Returns the rank of each slot among its head's, int64 [H, m]: 0 for the best score; ties go
    to the lower slot."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def min_max(x: Tensor, valid: Tensor) -> Tensor:
    """Returns each row scaled so that its least value is 0 and its greatest 1, [H, m]; all are 0
    where they are equal, and at slots that are not `valid`, bool [H, m]."""
    low = x.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = x.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    scaled = (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)
    return scaled.masked_fill(~valid, 0.0)


def decayed_max(old: Tensor | None, new: Tensor, decay: float) -> Tensor:
    """Returns a score that fades from compaction to compaction unless it is renewed (G-KV, arXiv
    2512.00504): max(decay * old, new), [H, m]. `old` is None at the first one."""
    return new if old is None else torch.maximum(decay * old.to(new.dtype), new)


def redundancy(keys: Tensor, counts: Sequence[int] | None = None, threshold: float = 0.5) -> Tensor:
    """Returns how similar each key is to the others (R-KV, arXiv 2505.24133): the mean over the
    other held keys of the cosine with it, where a key's similarity to its latest similar one does
    not count, so that the newest of several alike stays.

    A key's latest similar one is the last other key whose cosine with it is above the threshold.
    It is searched for from the newest key on, and keys that have found theirs are left out on a
    CPU. Memory is O(n) in any case; time is O(n² D) at worst.

    Args:
        keys: [H, n, D].
        counts: keys of each head, where they differ; what lies past them is padding.
        threshold: least cosine of similar keys, 0 or more.

    Returns:
        [H, n], 0 past a head's own.
    """
    out = torch.zeros(keys.shape[:2], dtype=_wide(keys), device=keys.device)
    for head, own in enumerate(keys):
        n = keys.shape[1] if counts is None else counts[head]
        unit = F.normalize(own[:n].to(out.dtype), dim=1)
        total = unit @ unit.sum(0) - unit.square().sum(1)
        out[head, :n] = (total - _of_latest(unit, threshold)) / max(n, 1)
    return out


def _of_latest(unit: Tensor, threshold: float) -> Tensor:
    """Returns, for each key of `unit` [n, D], the sum of the cosines with those whose latest
    similar key it is, [n]."""
    n, shrinks = len(unit), unit.device.type == "cpu"
    latest = torch.full((n,), -1, device=unit.device)
    left = torch.arange(n, device=unit.device)  # keys that still search
    own, end, width = unit, n, 32
    while end > 0 and len(left):
        start = max(0, end - width)
        cosine = own @ unit[start:end].mT
        itself = (left - start).unsqueeze(1)
        here = (itself >= 0) & (itself < end - start)
        itself = itself.clamp(0, end - start - 1)
        cosine.scatter_(1, itself, cosine.gather(1, itself).masked_fill(here, -1.0))
        # Places of similar keys, counted from 1, so that the last is the greatest.
        places = torch.arange(1, end - start + 1, dtype=unit.dtype, device=unit.device)
        last = cosine.gt_(threshold).mul_(places).amax(1).long()
        now = torch.where(latest[left] < 0, last + (start - 1), latest[left])
        latest[left] = torch.where(last > 0, now, latest[left])
        if shrinks:  # on a GPU nobody waits for how many there are
            left, own = left[last == 0], own[last == 0]
        end, width = start, min(2 * width, 1024)
    found = latest >= 0
    cosine = (unit * unit[latest.clamp(min=0)]).sum(1).masked_fill(~found, 0.0)
    return torch.zeros_like(cosine).index_add_(0, latest.clamp(min=0), cosine)


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
