"""Whether a kernel computes attention at all, before anyone asks how fast."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks.kernels.candidates import Candidate
from benchmarks.kernels.cases import PAGE, Case, Shape

# Lengths around the edges of pages and tiles, for a batch that no kernel may find convenient.
RAGGED = (1, 2, 31, 32, 33, PAGE - 1, PAGE, PAGE + 1, 300, 5 * PAGE)
RAGGED_QUERIES = 40


class WrongResult(Exception):
    """A kernel's output is not attention over what it holds."""


def attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Returns what is right, in float64: causal attention of the newest queries, head by KV head.

    Args:
        queries: [q, heads, D].
        keys, values: [kv_heads, n, D], n >= q.
        scale: factor of q·k.

    Returns:
        float64 [q, heads, D].
    """
    count, heads, size = queries.shape
    kv_heads, n, _ = keys.shape
    later = torch.ones(count, n, dtype=torch.bool).triu(n - count + 1)
    groups = queries.double().view(count, kv_heads, heads // kv_heads, size).permute(1, 2, 0, 3)
    out = torch.empty_like(groups)
    for head in range(kv_heads):  # one at a time: 32K tokens in float64 are large
        logits = groups[head] @ keys[head].double().T * scale
        weights = logits.masked_fill_(later, -torch.inf).softmax(-1)
        out[head] = weights @ values[head].double()
    return out.permute(2, 0, 1, 3).reshape(count, heads, size)


def error(candidate: Candidate, index: int, sequences: Iterable[int]) -> float:
    """Returns the largest relative error (in the Euclidean norm) of one head's output for one
    token. Infinite where something was not written: the output is full of NaN before."""
    case, out = candidate.case, candidate.empty()
    candidate.run(index, out)
    worst = 0.0
    for sequence in sequences:
        rows = slice(sequence * case.query_len, (sequence + 1) * case.query_len)
        wanted = attention(
            candidate.queries[rows], *candidate.held(index, sequence), case.shape.scale
        )
        off = (out[rows].double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        worst = max(worst, float(off.nan_to_num(nan=torch.inf).max()))
    return worst


def require(candidate: Candidate, what: str, index: int, sequences: Iterable[int]) -> float:
    """Returns `error`, which must be within the candidate's tolerance. Raises WrongResult."""
    found = error(candidate, index, sequences)
    if not found <= candidate.tolerance:
        raise WrongResult(
            f"{candidate.name} is wrong on {what}: a head is off by {found:.1e} of its length, "
            f"{candidate.tolerance:.0e} is allowed"
        )
    return found


@functools.cache
def check_ragged(kind: type[Candidate], shape: Shape, query_len: int, seed: int) -> None:
    """Checks a batch of ragged lengths, in decode or, with `query_len` above 1, in prefill."""
    count = min(query_len, RAGGED_QUERIES)
    case = Case(shape, [count - 1 + n for n in RAGGED], count, seed)
    # Two copies or more, so that a kernel that always reads the first one is found out.
    candidate = kind(case, 2 * case.float32_bytes)
    assert candidate.sets > 1
    for index in {0, candidate.sets - 1}:
        require(candidate, f"lengths {case.lengths}", index, range(case.batch))


def check(candidate: Candidate, seed: int) -> float:
    """Checks ragged lengths first, then the first and the last sequence of the case that is to be
    timed. Returns the latter's error. Raises WrongResult."""
    case = candidate.case
    check_ragged(type(candidate), case.shape, case.query_len, seed)
    what = f"{case.batch} sequences of {max(case.lengths)} tokens"
    return max(
        require(candidate, what, index, {0, case.batch - 1}) for index in {0, candidate.sets - 1}
    )
