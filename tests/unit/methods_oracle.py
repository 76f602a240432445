"""The scoring methods once more, in float64 and in plain loops, from their papers' formulas.

Nothing here uses the code under test. A `Head` is what one KV head holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Head:
    """One KV head of a view.

    Attributes:
        keys, values: [n, D] and [n, Dv].
        queries: [g, w, D], the last of them the query of the last token.
        m, sinks: as in `View`.
        scale: factor of q·k.
        positions: [n], true positions of all held tokens.
        spans, computed, layer, layers: as in `View`.
        frequencies: [D/2], of the rotary embedding.
        state: by name, [m].
        bias: [m], log biases.
        known, repeated: [m], as in `View`.
    """

    keys: Array
    values: Array
    queries: Array
    m: int
    sinks: int
    scale: float
    positions: Sequence[int]
    spans: Sequence[tuple[int, int]]
    computed: int
    frequencies: Array
    state: dict[str, Array] = field(default_factory=dict)
    bias: Array | None = None
    known: Sequence[bool] | None = None
    repeated: Array | None = None

    @property
    def n(self) -> int:
        return len(self.keys)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    out: Array = e / e.sum()
    return out


def repeated(
    queries: Array,
    keys: Array,
    values: Array,
    held_keys: Array,
    held_values: Array,
    scale: float,
    bias: Array,
) -> tuple[Array, Array]:
    """Returns the output [g, t, Dv] of t tokens, by queries [g, t, D] and keys and values of their
    own, over held slots with log biases [n]; and the greatest weight of each held slot."""
    group, tokens, _ = queries.shape
    n = len(held_keys)
    output, greatest = np.zeros((group, tokens, values.shape[1])), np.zeros(n)
    for g in range(group):
        for i in range(tokens):
            logits = [queries[g, i] @ held_keys[j] * scale + bias[j] for j in range(n)]
            logits += [queries[g, i] @ keys[j] * scale for j in range(i + 1)]
            weights = softmax(np.array(logits))
            greatest = np.maximum(greatest, weights[:n])
            output[g, i] = weights[:n] @ held_values + weights[n:] @ values[: i + 1]
    return output, greatest


def kvzip(head: Head) -> Array:
    assert head.known is not None and head.repeated is not None
    old = head.state["greatest"]
    return np.array([old[j] if head.known[j] else head.repeated[j] for j in range(head.m)])


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)))


def logits(head: Head) -> Array:
    """Returns [g, w, n], -inf after each query's own token."""
    group, window, _ = head.queries.shape
    out = np.full((group, window, head.n), -np.inf)
    for g in range(group):
        for i in range(window):
            for j in range(head.n - window + i + 1):
                bias = head.bias[j] if head.bias is not None and j < head.m else 0.0
                out[g, i, j] = head.queries[g, i] @ head.keys[j] * head.scale + bias
    return out


def attention(head: Head) -> Array:
    """Returns [g, w, n]."""
    out = logits(head)
    for row in out.reshape(-1, head.n):
        row[:] = softmax(row)
    return out


def pooled(x: Array, size: int, kind: str) -> Array:
    out = np.empty_like(x)
    for j in range(len(x)):
        near = x[max(0, j - size // 2) : j + size // 2 + 1]
        out[j] = near.max() if kind == "max" else near.mean()
    return out


def knorm(head: Head) -> Array:
    return np.array([-math.sqrt(sum(x * x for x in key)) for key in head.keys[: head.m]])


def keydiff(head: Head) -> Array:
    anchor = np.mean([key / np.sqrt(key @ key) for key in head.keys], axis=0)
    return np.array([-cosine(key, anchor) for key in head.keys[: head.m]])


def lagkv(head: Head, lag: int) -> Array:
    parts = max(0, head.n - head.sinks) // lag
    if parts < 2:
        return np.arange(head.m) / head.n
    scores = np.ones(head.n)
    for part in range(parts - 1):
        own = slice(head.sinks + part * lag, head.sinks + (part + 1) * lag)
        after = slice(own.stop, own.stop + lag)
        total = np.zeros(lag)
        for x in (head.keys, head.values):
            low, high = x[after].min(0), x[after].max(0)
            scaled = (x[own] - low) / (high - low)
            total += softmax(np.array([row.std(ddof=1) for row in scaled]))
        for i in range(lag):
            scores[own.start + i] = sum(other < total[i] for other in total) / lag
    return scores[: head.m]


def tova(heads: Sequence[Head]) -> Array:
    rows = [row[-1] for head in heads for row in attention(head)]
    out: Array = np.mean(rows, axis=0)[: heads[0].m]
    return out


def rotation(frequencies: Array, position: float) -> Array:
    """Returns the matrix of the rotary embedding at a position, [D, D]."""
    half = len(frequencies)
    out = np.zeros((2 * half, 2 * half))
    for j, frequency in enumerate(frequencies):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[j, j], out[j, j + half] = cos, -sin
        out[j + half, j], out[j + half, j + half] = sin, cos
    return out


def expected_attention(
    head: Head, future: int, covariance: bool, value_norm: bool, epsilon: float
) -> Array:
    group, window, size = head.queries.shape
    first = head.computed - window
    ahead = np.mean([rotation(head.frequencies, head.computed + j) for j in range(future)], axis=0)
    weights = np.zeros(head.n)
    for g in range(group):
        plain = [
            rotation(head.frequencies, -(first + i)) @ head.queries[g, i] for i in range(window)
        ]
        mean = np.mean(plain, axis=0)
        spread = np.mean([np.outer(q - mean, q - mean) for q in plain], axis=0)
        mean, spread = ahead @ mean, ahead @ spread @ ahead.T
        z = np.full(head.n, -np.inf)
        for j in range(head.sinks, head.n):
            key = head.keys[j]
            z[j] = key @ mean / math.sqrt(size)
            if covariance:
                z[j] += key @ spread @ key / (2 * size)
            if head.bias is not None and j < head.m:
                z[j] += head.bias[j]
        weights += softmax(z) / group
    out = weights[: head.m] + epsilon
    if value_norm:
        out = out * np.array([math.sqrt(v @ v) for v in head.values[: head.m]])
    return out


def redundancy(head: Head, threshold: float) -> Array:
    """Returns R-KV's, [n]: the mean over rows of the cosine matrix, in which the diagonal and each
    row's last entry above the threshold are 0."""
    matrix = np.zeros((head.n, head.n))
    for i in range(head.n):
        for j in range(head.n):
            matrix[i, j] = 0.0 if i == j else cosine(head.keys[i], head.keys[j])
    for row in matrix:
        similar = [j for j in range(head.n) if row[j] > threshold]
        if similar:
            row[similar[-1]] = 0.0
    out: Array = matrix.mean(0)
    return out


def gkv(head: Head, decay: float, weight: float, threshold: float) -> tuple[Array, Array]:
    """Returns the scores and the global score."""
    m, weights = head.m, attention(head)
    local = np.array([np.mean(weights[:, :, j].max(0)) for j in range(m)])
    local = local / local.max()
    old = head.state.get("global", np.zeros(m))
    score = np.array([max(decay * a, b) for a, b in zip(old, local, strict=True)])
    alike = softmax(redundancy(head, threshold))[:m]
    return weight * score - (1 - weight) * alike / alike.max(), score


def rkv(head: Head, weight: float, pool: int, threshold: float) -> Array:
    best = logits(head).max(0)[:, : head.m]
    importance = pooled(np.mean([softmax(row) for row in best], axis=0), pool, "max")
    return weight * importance - (1 - weight) * softmax(redundancy(head, threshold))[: head.m]


def critic(head: Head, attention_weight: float, entropy: float, gradient: float) -> Array:
    weights, m = attention(head), head.m

    def scaled(x: Array) -> Array:
        out: Array = (x - x.min()) / (x.max() - x.min())
        return out

    given = np.array([weights[:, :, j].sum() for j in range(m)])
    spread = np.zeros(m)
    for j in range(m):
        for of_query in weights[:, :, j]:
            p = of_query / of_query.sum()
            spread[j] += -sum(x * math.log(x) for x in p if x > 0)
    terms = attention_weight * scaled(given) + entropy * scaled(spread)
    if gradient:
        terms = terms + gradient * scaled(derivatives(head)[:m])
    out: Array = terms / (attention_weight + entropy + gradient)
    return out


def derivatives(head: Head) -> Array:
    """Returns what automatic differentiation gives, summed over channels and query heads, [n]."""
    total = np.zeros(head.n)
    bias = np.zeros(head.n)
    if head.bias is not None:
        bias[: head.m] = head.bias
    for q in head.queries:
        keys, values = (torch.tensor(x, requires_grad=True) for x in (head.keys, head.values))
        outputs = []
        for back in (2, 1):
            n = head.n - back + 1
            seen = keys[:n] @ torch.tensor(q[-back]) * head.scale + torch.tensor(bias[:n])
            outputs.append(seen.softmax(0) @ values[:n])
        (outputs[1] - outputs[0].detach()).square().mean().backward()
        assert keys.grad is not None and values.grad is not None
        total += (keys.grad.abs().sum(1) + values.grad.abs().sum(1)).numpy()
    return total


def gui_kv(
    head: Head, saliency: float, temperature: float, redundant: float, rank: int, pool: int
) -> Array:
    weights, m = attention(head), head.m
    scores = np.mean([pooled(of_head[:, :m].sum(0), pool, "avg") for of_head in weights], axis=0)
    begun = [span for span in head.spans if span[0] < head.computed]
    if not begun:
        return scores
    inside = [[j for j, p in enumerate(head.positions) if first <= p < end] for first, end in begun]
    newest = inside[-1]
    norms = np.array([np.linalg.norm(head.values[j]) for j in newest])
    bonus = softmax((norms - norms.mean()) / (norms.std(ddof=1) + 1e-8) / temperature)
    for j, more in zip(newest, bonus, strict=True):
        if j < m:
            scores[j] += saliency * more
    space = head.keys[newest[: min(rank, head.keys.shape[1])]].T
    earlier = [j for own in inside[:-1] for j in own if j < m]
    residual = {}
    for j in earlier:
        best = np.linalg.lstsq(space, head.keys[j], rcond=None)[0]
        residual[j] = float(np.linalg.norm(head.keys[j] - space @ best))
    for j in sorted(earlier, key=lambda j: (residual[j], j))[: int(redundant * len(earlier))]:
        scores[j] = 0.0
    return scores


def infinipot(head: Head, keep: int, newest: float, share: float) -> list[int]:
    """Returns the slots that stay, by taking the next best of both rankings in turns."""
    m = head.m
    weight = {j: float(np.linalg.norm(head.values[j])) for j in range(m)}
    begun = [span for span in head.spans if span[0] < head.computed]
    text: list[int] = []
    if not begun:
        reference = head.keys[head.n - max(1, int(newest * head.n)) :]
        novelty = {j: -float(np.mean([cosine(head.keys[j], k) for k in reference])) for j in weight}
    else:
        frame = {}
        for j, p in enumerate(head.positions):
            for f, (first, end) in enumerate(begun):
                if first <= p < end:
                    frame[j] = (f, p - first)
        recent = len(begun) - max(1, int(newest * len(begun)))
        novelty = {}
        for j in range(m):
            if j not in frame:
                text.append(j)
                continue
            f, patch = frame[j]
            same = [
                head.keys[i] for i, (g, other) in frame.items() if g >= recent and other == patch
            ]
            mean = float(np.mean([cosine(head.keys[j], k) for k in same])) if same else 0.0
            novelty[j] = 2.0 if f >= recent else -mean
    chosen = text[:keep]
    orders = [
        sorted(novelty, key=lambda j: (-novelty[j], j)),
        sorted(novelty, key=lambda j: (-weight[j], j)),
    ]
    # When each turn comes: the r-th of a ranking with a share s of the budget at r / s.
    turns = {}
    for order, part in zip(orders, (share, 1 - share), strict=True):
        for r, j in enumerate(order, 1):
            if part:
                turns[j] = min(turns.get(j, math.inf), r / part)
    for j in sorted(turns, key=lambda j: (turns[j], j)):
        if len(chosen) < keep:
            chosen.append(j)
    return sorted(chosen)


class Ladder:
    """LaCache in one layer, as a list of tokens and a cursor that is remembered.

    Args:
        layer, layers: which of how many.
        before, after: sizes of a group, before and after its compaction.
        sinks: tokens that stay.
    """

    def __init__(self, layer: int, layers: int, before: int, after: int, sinks: int) -> None:
        self.tokens: list[int] = []
        self._layers, self._before, self._after = layers, before, after
        self._offset = layer % (before - after + 1)
        self._sinks, self._next = sinks, 0
        self._cursor = 0  # a place among the tokens after the sinks

    def compact(self, new: int, keep: int) -> None:
        """Adds `new` tokens and drops all but `keep`."""
        self.tokens += range(self._next, self._next + new)
        self._next += new
        drop = len(self.tokens) - keep
        fixed, rest = self.tokens[: self._sinks], self.tokens[self._sinks :]
        out = rest[max(0, len(rest) - self._layers) :]  # the newest stay out of reach
        reach = rest[: len(rest) - len(out)]
        while drop:
            group = reach[self._cursor : self._cursor + self._before]
            goes = self._goes(group)
            assert goes or self._cursor, "nothing is left to drop"
            going = set(goes[max(0, len(goes) - drop) :])  # the later ones, if not all
            reach = [t for t in reach if t not in going]
            drop -= len(going)
            if len(going) == len(goes):
                self._cursor += len(group) - len(goes)
            if self._cursor >= len(reach):
                self._cursor = 0
        if not self._goes(reach[self._cursor : self._cursor + self._before]):
            self._cursor = 0  # an incomplete last group of which all stay
        self.tokens = fixed + reach + out

    def _goes(self, group: list[int]) -> list[int]:
        first, end = self._offset, self._offset + self._after
        return [token for i, token in enumerate(group) if not first <= i < end]
