"""A policy's choice for one layer, checked: what a policy gets wrong costs its request the choice
of tokens, and no other request anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.policies.base import Held, Policy, View


class PolicyFailure(Exception):
    """A policy raised, or answered with something that is not what it was asked for."""


@dataclass
class Choice:
    """What stays of one layer of a request.

    Attributes:
        slots: int64 [H, k]: the slots of the view that stay, in the order in which the region
            holds them: those of the finer codec first where there are tiers, each part ascending.
        running: float32 [H, k], the policy's running state of these slots, or None.
        sound: bool scalar: False where the policy's values were useless (NaN scores, slots that
            repeat, descend or are out of range), and `slots` are the sinks and the newest instead.
            A tensor, so that nobody has to wait for the device.
    """

    slots: Tensor
    running: Tensor | None
    sound: Tensor


def newest(view: View, keep: int, finer: int = 0) -> Choice:
    """The choice that needs no policy: the sinks and the newest candidates; of those the `finer`
    ones are again the sinks and the newest."""

    def ends(slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
        first = min(view.sinks, count)
        last = len(slots) - count + first
        return torch.cat((slots[:first], slots[last:])), slots[first:last]

    device = view.device
    kept, _ = ends(torch.arange(view.candidates, device=device), keep)
    fine, coarse = ends(kept, finer)
    slots = (torch.cat((fine, coarse)) if finer else kept).expand(view.num_kv_heads, -1)
    running = None
    if view.running is not None:
        running = view.running.gather(1, slots)
    return Choice(slots, running, torch.ones((), dtype=torch.bool, device=device))


def choose(
    policy: Policy, view: View, keep: int, finer: int = 0, demoted: Tensor | None = None
) -> Choice:
    """Asks a policy which `keep` of the candidates stay, and which `finer` of those get the finer
    codec; `demoted` as `Policy.split` takes it, or None without tiers.

    Raises:
        PolicyFailure: the policy raised, or a result has the wrong type, shape or dtype.
    """
    heads, m = view.num_kv_heads, view.candidates
    try:
        scores = policy.score(view)
        _require("score", scores, (heads, m), _is_float, "floats")
        kept = policy.select(view, scores, keep)
        _require("select", kept, (heads, keep), _is_index, "int64")
        # Before they index anything. What is wrong then is told by `sound`.
        sound = ~scores.isnan().any() & _ascending(kept, m)
        instead = newest(view, keep, finer)
        plain = newest(view, keep).slots
        kept = torch.where(sound, kept, plain)
        if demoted is None:
            slots = kept
        else:
            parts = policy.split(view, scores, kept, finer, demoted)
            if not (isinstance(parts, tuple) and len(parts) == 2):
                raise PolicyFailure(f"split returned {type(parts).__name__}, not two tensors")
            for part, size in zip(parts, (finer, keep - finer), strict=True):
                _require("split", part, (heads, size), _is_index, "int64")
                sound = sound & _ascending(part, m)
            slots = torch.cat(parts, 1)
            sound = sound & (slots.sort(1).values == kept).all()
            slots = torch.where(sound, slots, instead.slots)
        running = None
        if "running" in policy.needs:  # nobody reads what others return
            running = policy.running(view, scores)
            _require("running", running, (heads, m), _is_float, "floats")
            assert running is not None
            running = running.float().nan_to_num().gather(1, slots)
    except PolicyFailure:
        raise
    except Exception as error:
        raise PolicyFailure(f"{type(error).__name__}: {error}") from error
    return Choice(slots, running, sound)


def _require(
    what: str,
    value: object,
    shape: tuple[int, ...],
    allowed: Callable[[torch.dtype], bool],
    words: str,
) -> None:
    if not isinstance(value, Tensor):
        raise PolicyFailure(f"{what} returned {type(value).__name__}, not a tensor")
    if tuple(value.shape) != shape or not allowed(value.dtype):
        raise PolicyFailure(
            f"{what} returned {value.dtype} {tuple(value.shape)}, not {words} {shape}"
        )


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


def _is_index(dtype: torch.dtype) -> bool:
    return dtype == torch.int64


def _ascending(slots: Tensor, m: int) -> Tensor:
    """Whether each row ascends within [0, m): bool scalar."""
    inside = ((slots >= 0) & (slots < m)).all()
    return inside & (slots[:, 1:] > slots[:, :-1]).all()


def dry_run(policy: Policy, *, sinks: int = 4, window: int = 16, page_size: int = 32) -> None:
    """Asks a policy for a choice about random tokens, as the engine will: first of raw ones, then
    of what was kept and new ones.

    Args:
        sinks, window: of the server's settings.
        page_size: tokens in a block.

    Raises:
        PolicyFailure: what `choose` raises, or that the values of the choice are useless.
    """
    heads, group, size = 2, 2, 64
    blocks = 4 * -(-max(sinks, window, 1) // page_size) + 8
    m, keep = blocks * page_size, blocks // 2 * page_size
    draw = torch.Generator().manual_seed(0)
    n = m + window
    running = torch.zeros(heads, m) if "running" in policy.needs else None
    for _ in range(2):
        view = View(
            held=ops.Held(*(torch.randn(heads, n, size, generator=draw) for _ in range(2))),
            queries=torch.randn(heads * group, window, size, generator=draw)
            if "queries" in policy.needs
            else None,
            scale=size**-0.5,
            candidates=m,
            sinks=sinks,
            page_size=page_size,
            running=running,
            layer=0,
            all_heads=lambda x: x,
        )
        demoted = torch.zeros(heads, m, dtype=torch.bool) if policy.tiers else None
        choice = choose(policy, view, keep, keep // 2 if policy.tiers else 0, demoted)
        if not choice.sound:
            raise PolicyFailure("its scores have NaN, or its slots are not ascending candidates")
        if choice.running is not None:
            running = torch.zeros(heads, m)
            running[:, :keep] = choice.running


class ReorderedHeld:
    """What a request holds in one layer with its first slots in another order: `base.Held`.

    Args:
        held: what it holds, by slot.
        order: int64 [H, m]: which slot of each head comes where; slots from m on stay.
    """

    def __init__(self, held: Held, order: Tensor):
        self._held, self._order = held, order

    @property
    def num_kv_heads(self) -> int:
        """H."""
        return self._held.num_kv_heads

    @property
    def device(self) -> torch.device:
        """Where policies compute."""
        return self._held.device

    @property
    def keys(self) -> Tensor:
        """[H, n, D], with RoPE, of any float dtype."""
        return self._reordered(self._held.keys)

    @property
    def values(self) -> Tensor | None:
        """[H, n, D], or None where there are none."""
        values = self._held.values
        return None if values is None else self._reordered(values)

    def _reordered(self, x: Tensor) -> Tensor:
        m = self._order.shape[1]
        where = self._order.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return torch.cat((x[:, :m].gather(1, where), x[:, m:]), 1)

    def window_scores(
        self,
        queries: Tensor,
        scale: float,
        candidates: int,
        *,
        pool: int = 1,
        pool_kind: str = "max",
        reduce: str | None = "mean",
        **options: Any,
    ) -> Tensor:
        """`ops.window_scores` over these keys; they are pooled in this order."""
        if pool == 1:
            scores = self._held.window_scores(queries, scale, candidates, reduce=reduce, **options)
            return scores.gather(1, self._rows(scores))
        scores = self._held.window_scores(queries, scale, candidates, reduce=None, **options)
        scores = ops.pool_scores(scores.gather(1, self._rows(scores)), pool, pool_kind)
        return scores if reduce is None else ops.reduce_groups(scores, self.num_kv_heads, reduce)

    def _rows(self, scores: Tensor) -> Tensor:
        # Query heads read the slots of their KV head.
        return self._order.repeat_interleave(len(scores) // self.num_kv_heads, 0)


def in_position_order(view: View, order: Tensor) -> View:
    """A view whose candidates come in the order of their positions instead of their slots'.

    Args:
        view: by slot.
        order: int64 [H, m], the slots of each head by position.
    """
    running = None if view.running is None else view.running.gather(1, order)
    return replace(view, held=ReorderedHeld(view.held, order), running=running)
