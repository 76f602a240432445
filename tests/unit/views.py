"""Views made by hand, and what policies return for them, in the form that tests compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.policies import Policy, View


def make_view(
    pages: int = 6,
    page: int = 8,
    heads: int = 3,
    group: int = 3,
    sinks: int = 4,
    window: int = 5,
    tail: int = 7,
    seed: int = 0,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    all_heads: Callable[[Tensor], Tensor] = lambda x: x,
) -> View:
    """Returns a random view; its keys are long enough for clearly uneven attention."""
    generator = torch.Generator().manual_seed(seed)
    m = pages * page

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return View(
        held=ops.LayerKV(3 * randn(heads, m + tail, size), randn(heads, m + tail, size)),
        queries=randn(heads * group, window, size),
        scale=size**-0.5,
        candidates=m,
        sinks=sinks,
        page_size=page,
        layer=0,
        all_heads=all_heads,
        state={"attention": torch.rand(heads, m, generator=generator)},
        known=torch.ones(heads, m, dtype=torch.bool),
        true_positions=torch.arange(m, dtype=torch.int32).repeat(heads, 1),
        rope=Rope(1e4 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)),
        computed=m + tail,
        repeated=torch.rand(heads, m, generator=generator),
    )


def ragged(view: View, counts: Sequence[int]) -> View:
    """Returns the view with only the first `counts` candidates of each head, and the tail after
    them. Columns past a head's count are poison: huge, and different in each."""
    m, tail = view.candidates, view.keys.shape[1] - view.candidates
    wide, poison = max(counts), torch.full_like(view.keys[0], 1e4)
    poison *= torch.arange(1, len(poison) + 1, device=view.device).unsqueeze(1)

    def cut(x: Tensor) -> Tensor:
        rows = [
            torch.cat((row[:n], row[m:], poison[: wide - n, : row.shape[1]]))
            for row, n in zip(x, counts, strict=True)
        ]
        return torch.stack(rows)

    def kept(x: Tensor | None, fill: float) -> Tensor | None:
        if x is None:
            return None
        rows = [
            F.pad(row[:n].movedim(0, -1), (0, wide - n), value=fill).movedim(-1, 0)
            for row, n in zip(x, counts, strict=True)
        ]
        return torch.stack(rows)

    values = None if view.values is None else cut(view.values)
    state = {name: kept(x, 1e9) for name, x in view.state.items()}
    return replace(
        view,
        held=ops.LayerKV(
            cut(view.keys), values, [n + tail for n in counts], kept(view.log_bias, 0.0)
        ),
        candidates=wide,
        counts=torch.tensor(counts),
        protected=kept(view.protected, False),
        state={name: x for name, x in state.items() if x is not None},
        known=kept(view.known, False),
        log_bias=kept(view.log_bias, 0.0),
        true_positions=kept(view.true_positions, 2**30),
        repeated=kept(view.repeated, 1e9),
    )


def alone(view: View, head: int) -> View:
    """Returns a view of one head, with no padding."""
    n = int(view.sizes[head])
    own, tail = slice(head, head + 1), view.keys.shape[1] - view.candidates
    group = 0 if view.queries is None else len(view.queries) // view.num_kv_heads
    queries = None if view.queries is None else view.queries[head * group : (head + 1) * group]

    def of(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[own, :n]

    values = None if view.values is None else view.values[own, : n + tail]
    return replace(
        view,
        held=ops.LayerKV(view.keys[own, : n + tail], values, None, of(view.log_bias)),
        queries=queries,
        candidates=n,
        counts=None,
        protected=of(view.protected),
        state={name: x[own, :n] for name, x in view.state.items()},
        known=of(view.known),
        log_bias=of(view.log_bias),
        true_positions=of(view.true_positions),
        repeated=of(view.repeated),
        first_head=view.first_head + head,
    )


def on(view: View, device: str) -> View:
    """Returns the view with its tensors on another device."""

    def moved(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device)

    return replace(
        view,
        held=ops.LayerKV(view.keys.to(device), moved(view.values), view.held.counts),  # type: ignore[attr-defined]
        queries=moved(view.queries),
        protected=moved(view.protected),
        state={name: x.to(device) for name, x in view.state.items()},
        known=moved(view.known),
        log_bias=moved(view.log_bias),
        true_positions=moved(view.true_positions),
        repeated=moved(view.repeated),
    )


def each(view: View, count: int | Sequence[int]) -> Tensor:
    """Returns a number for each head in the form that policies take, int64 [H] on the CPU."""
    if isinstance(count, int):
        return torch.full((view.num_kv_heads,), count)
    return torch.tensor(count)


def scored(policy: Policy, view: View) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Returns a policy's scores and its state."""
    found = policy.score(view)
    return found if isinstance(found, tuple) else (found, {})


def scores_of(policy: Policy, view: View) -> Tensor:
    """Returns a policy's scores alone."""
    return scored(policy, view)[0]


def slots_of(policy: Policy, view: View, scores: Tensor, keep: int | Sequence[int]) -> Tensor:
    """Returns the slots that a policy selects, int64 [H, keep], -1 past a head's own count.

    The mask must have exactly as many ones in each row."""
    counts = each(view, keep)
    mask = policy.select(view, scores, counts)
    assert mask.dtype == torch.bool and mask.shape == scores.shape
    if mask.device.type == "cpu":
        assert torch.equal(mask.sum(1), counts)
        assert not bool((mask & ~view.valid).any())
    return ops.mask_slots(mask, counts)
