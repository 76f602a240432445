"""What the policies that divide pages and that merge tokens compute, written out in float64 from
their formulas, head by head and token by token. Nothing here calls the code under test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from vllm_kvcrush.policies import View

Rows = list[list[list[float]]]  # by KV head of a layer: by row, numbers by token


def _array(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def attention(view: View, head: int) -> np.ndarray:
    """Returns the weights of a KV head's queries over its candidates, [group, window, n]."""
    assert view.queries is not None
    n, tail = int(view.sizes[head]), view.keys.shape[1] - view.candidates
    keys = _array(view.keys[head, : n + tail])
    bias = np.zeros(n + tail)
    if view.log_bias is not None:
        bias[:n] = _array(view.log_bias[head, :n])
    group, window = len(view.queries) // view.num_kv_heads, view.queries.shape[1]
    found = np.zeros((group, window, n))
    for g in range(group):
        for i in range(window):
            query = _array(view.queries[head * group + g, i])
            own = n + tail - window + i  # the slot of this query
            logits = [float(query @ keys[j]) * view.scale + bias[j] for j in range(own + 1)]
            top = max(logits)
            weights = [math.exp(x - top) for x in logits]
            for j in range(n):
                found[g, i, j] = weights[j] / sum(weights)
    return found


# -- CAKE ----------------------------------------------------------------------------------------


def _variance(row: Sequence[float]) -> float:
    if len(row) < 2:
        return 0.0
    mean = sum(row) / len(row)
    return sum((x - mean) ** 2 for x in row) / (len(row) - 1)


def cake_scores(view: View, gamma: float, pool: int) -> list[list[float]]:
    """Mean + gamma · variance over the window, averaged over neighbours, then over the group."""
    found = []
    for head in range(view.num_kv_heads):
        weights = attention(view, head)
        group, _, n = weights.shape
        total = [0.0] * n
        for g in range(group):
            raw = [
                sum(weights[g, :, j]) / len(weights[g]) + gamma * _variance(list(weights[g, :, j]))
                for j in range(n)
            ]
            for j in range(n):
                near = raw[max(0, j - pool // 2) : j + pool // 2 + 1]
                total[j] += sum(near) / len(near) / group
        found.append(total)
    return found


def cake_preference(view: View, tau1: float, tau2: float) -> float:
    """Entropy^(1/tau1) · variance^(1/tau2) of a layer, over all its heads and candidates."""
    entropy = variance = 0.0
    for head in range(view.num_kv_heads):
        weights = attention(view, head)
        for g in range(len(weights)):
            entropy -= sum(a * math.log(a) for a in weights[g].ravel() if a > 0)
            variance += sum(_variance(list(weights[g, :, j])) for j in range(weights.shape[2]))
    return entropy ** (1 / tau1) * variance ** (1 / tau2)


def evenly(tokens: list[float], most: list[float]) -> list[float]:
    """Budgets above what there is are cut; the surplus goes to all others in equal parts."""
    tokens = list(tokens)
    while True:
        surplus = 0.0
        for i, limit in enumerate(most):
            if tokens[i] > limit:
                surplus += tokens[i] - limit
                tokens[i] = limit
        below = [i for i, limit in enumerate(most) if tokens[i] < limit]
        if surplus <= 1e-12 or not below:
            return tokens
        for i in below:
            tokens[i] += surplus / len(below)


def cake_budgets(preferences: list[float], average: float, most: list[float]) -> list[float]:
    total = average * len(preferences)
    return evenly([p / sum(preferences) * total for p in preferences], most)


# -- PyramidKV -----------------------------------------------------------------------------------


def pyramid_budgets(layers: int, average: float, there: float, beta: float) -> list[float]:
    """An arithmetic sequence around the average, from the first layer to the last."""
    average = min(average, there)
    last = average / beta
    first = 2 * average - last
    if first > there:
        first, last = there, 2 * average - there
    if layers == 1:
        return [first]
    return [first + (last - first) * i / (layers - 1) for i in range(layers)]


# -- D2O -----------------------------------------------------------------------------------------


def d2o_density(rows: list[list[float]]) -> float:
    """The variances over tokens of what they gathered, scaled over heads, and their mean."""
    variances = [_variance(row) for row in rows]
    low, high = min(variances), max(variances)
    return sum((v - low) / (high - low + 1e-6) for v in variances) / len(variances)


def d2o_budgets(
    densities: list[float], average: float, there: list[float], dense: bool
) -> list[float]:
    layers = len(densities)
    full = {0, 1, layers - 1} & set(range(layers)) if dense else set()
    total = average * layers
    if sum(there[i] for i in full) > total / 2:
        full = set()
    rest = total - sum(there[i] for i in full)
    others = [i for i in range(layers) if i not in full]
    weights = {i: math.exp(-densities[i]) for i in others}
    wanted = [max(weights[i] / sum(weights.values()) * rest, 0.01 * there[i]) for i in others]
    # Layers that are full take no part in the division of what others cannot use.
    cut = dict(zip(others, evenly(wanted, [there[i] for i in others]), strict=True))
    return [there[i] if i in full else cut[i] for i in range(layers)]


def d2o_merge(
    keys: np.ndarray,
    values: np.ndarray,
    kept: list[bool],
    threshold: float | None,
    alpha: float,
    beta: float,
) -> tuple[np.ndarray, np.ndarray, float | None]:
    """One head: returns its keys, values (of kept slots) and its next threshold."""
    stay = [i for i, k in enumerate(kept) if k]
    gone = [i for i, k in enumerate(kept) if not k]
    nearest: dict[int, tuple[int, float]] = {}
    for e in gone if stay else ():
        cosines = [
            float(keys[e] @ keys[c] / np.linalg.norm(keys[e]) / np.linalg.norm(keys[c]))
            for c in stay
        ]
        best = max(range(len(stay)), key=lambda i: (cosines[i], -i))
        nearest[e] = stay[best], cosines[best]
    if nearest:
        mean = sum(u for _, u in nearest.values()) / len(nearest)
        threshold = mean if threshold is None else alpha * threshold + beta * mean
    new_keys, new_values = keys.copy(), values.copy()
    for c in stay:
        joins = [(e, u) for e, (to, u) in nearest.items() if to == c and u >= threshold]
        new_keys[c] = (keys[c] + sum(u * keys[e] for e, u in joins)) / (1 + len(joins))
        new_values[c] = (values[c] + sum(u * values[e] for e, u in joins)) / (1 + len(joins))
    return new_keys, new_values, threshold


# -- CaM -----------------------------------------------------------------------------------------


def cam_merge(
    values: np.ndarray, weights: list[float], kept: list[bool], width: int, draws: list[float]
) -> np.ndarray:
    """One head: returns its values, in which those of dropped tokens are spread over kept ones."""
    found = values.copy()
    for i, k in enumerate(kept):
        if k:
            continue
        after = [j for j in range(i + 1, len(kept)) if kept[j]][:width]
        if not after:
            continue
        mean = sum(weights[j] for j in after) / len(after)
        if draws[i] < min(1.0, weights[i] / mean):
            for j in after:
                found[j] += values[i] / len(after)
    return found


# -- heads ---------------------------------------------------------------------------------------


def retrieval(
    query: np.ndarray, key: np.ndarray, frequencies: np.ndarray, scale: float, reach: int
) -> float:
    """The area under the cumulated attention of equal keys, whose logits depend on distance."""
    half = len(frequencies)
    q, k = query[:half] + 1j * query[half:], key[:half] + 1j * key[half:]
    logits = []
    for position in range(reach):
        turn = np.exp(1j * frequencies * (reach - 1 - position))
        logits.append(float((q * turn * k.conj()).real.sum()) * scale)
    weights = [math.exp(x - max(logits)) for x in logits]
    area = running = 0.0
    for w in weights:
        running += w / sum(weights)
        area += running / reach
    return area


def copying(weights: np.ndarray, first: int, top: int) -> float:
    """One query head: the mean over rows of F1 of its best tokens in the passage."""
    total = 0.0
    for row in weights:
        best = sorted(range(len(row)), key=lambda j: -row[j])[:top]
        inside = sum(row[j] for j in best if first <= j < first + len(weights))
        precision = inside / sum(row[j] for j in best)
        recall = inside / sum(row[first : first + len(weights)])
        total += 2 * precision * recall / (precision + recall) if inside else 0.0
    return total / len(weights)


def duo_streams(scores: list[list[float]], sparsity: float) -> list[list[bool]]:
    """The heads with the lowest scores, if all are different."""
    flat = sorted((s, i, j) for i, row in enumerate(scores) for j, s in enumerate(row))
    low = {(i, j) for _, i, j in flat[: round(sparsity * len(flat))]}
    return [[(i, j) in low for j in range(len(row))] for i, row in enumerate(scores)]


def duo_budgets(streams: list[list[bool]], average: float, few: int) -> list[list[float]]:
    flat = [s for row in streams for s in row]
    own = min(few, average / 2)
    rest = (average * len(flat) - own * sum(flat)) / max(1, len(flat) - sum(flat))
    return [[own if s else rest for s in row] for row in streams]


def surface_budgets(
    scores: list[list[float]], average: float, beta: float, temperature: float
) -> list[list[float]]:
    raised = [[(s + 0.01 * s / sum(row)) ** temperature for s in row] for row in scores]
    total, count = sum(map(sum, raised)), sum(map(len, raised))
    return [
        [s / total * (average / beta) * count + average - average / beta for s in row]
        for row in raised
    ]


# -- composed ------------------------------------------------------------------------------------


def scaled(row: list[float], free: list[bool], by: str) -> list[float]:
    """Scores of one head from 0 to 1 over those that are free; the others have 1."""
    own = [i for i, f in enumerate(free) if f]
    found = [1.0] * len(row)
    if by == "rank":
        order = sorted(own, key=lambda i: (row[i], i))
        for rank, i in enumerate(order):
            found[i] = rank / max(1, len(order) - 1)
        return found
    low, high = min((row[i] for i in own), default=0), max((row[i] for i in own), default=0)
    for i in own:
        found[i] = (row[i] - low) / (high - low) if high > low else 0.0
    return found
