"""Asks a policy for its choice in one layer and checks the answer, so that a faulty policy harms
only the choice of tokens of its own request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.policies.base import Merged, Policy, Room, View, by_head, sinks_and_newest

# What is wrong with a choice that is not `sound`.
USELESS = "its scores have NaN, or it did not choose as many slots of each head as were to stay"


class PolicyFailure(Exception):
    """A policy raised an exception, or returned something of the wrong type, shape or dtype."""


@dataclass
class Choice:
    """What stays of one layer of a request.

    Attributes:
        kept: bool [H, m], the slots of the view that stay.
        finer: bool [H, m], the kept slots that get the finer codec; None without tiers.
        state: by name, what the policy remembers about each candidate, float32 [H, m, ...].
        merged: keys, values and log biases that replace those of the kept slots; None if they stay
            as they are.
        layer_state: by name, what the policy remembers about the layer, float32 [H, c].
        sound: bool scalar, False where the policy's values were useless (NaN scores, the wrong
            number of slots, slots past a head's count) and the sinks and the newest stay instead.
            It is a tensor, so that nobody has to wait for the device.
    """

    kept: Tensor
    finer: Tensor | None
    state: dict[str, Tensor]
    merged: Merged | None
    sound: Tensor
    layer_state: dict[str, Tensor] = field(default_factory=dict)


def newest(view: View, keep: Tensor, finer: Tensor | None = None) -> Choice:
    """Returns the choice that needs no policy: the protected slots and the newest candidates stay,
    and the protected and newest of these are `finer`. Arguments are those of `choose`."""
    kept = sinks_and_newest(view, keep)
    fine = None if finer is None else sinks_and_newest(view, finer)
    sound = torch.ones((), dtype=torch.bool, device=view.device)
    return Choice(kept, fine, dict(view.state), None, sound, dict(view.layer_state))


def scored(policy: Policy, view: View) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the policy's scores, -inf past a head's count, and its state.

    Raises:
        PolicyFailure: the policy raised, or a result has the wrong type, shape or dtype.
    """
    with _Guard():
        found: Any = policy.score(view)
        scores, state = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
        shape = (view.num_kv_heads, view.candidates)
        _require("score", scores, shape, _is_float, "floats")
        if not isinstance(state, Mapping):
            raise PolicyFailure(f"score returned {type(state).__name__} as state, not tensors")
        kept = {}
        for name, value in state.items() if "state" in policy.needs else ():
            right = isinstance(value, Tensor) and tuple(value.shape[:2]) == shape
            _require(
                f"score's state {name!r}",
                value,
                value.shape if right else shape,
                _is_float,
                "floats",
            )
            kept[str(name)] = value.float().nan_to_num()
        if view.ragged:
            scores = scores.masked_fill(~view.valid, -torch.inf)
    return scores, kept


def demanded(policy: Policy, view: View, scores: Tensor, room: Room) -> Tensor | None:
    """Returns what the policy wants `allocate` to know about a layer, float64 [H] where it was
    computed, or None.

    Raises:
        PolicyFailure: as `scored` does.
    """
    with _Guard():
        demand = policy.demand(view, scores, room)
        if demand is None:
            return None
        _require("demand", demand, (view.num_kv_heads,), lambda _: True, "numbers")
        return demand.double()


def allocated(policy: Policy, demand: Tensor | None, room: Room) -> Tensor:
    """Returns the policy's shares of a request's pages, float64 [L, H] on the CPU.

    Raises:
        PolicyFailure: as `scored` does, or shares are negative, not finite, or all 0.
    """
    with _Guard():
        shares = policy.allocate(demand, room)
        _require("allocate", shares, tuple(room.candidates.shape), lambda _: True, "numbers")
        shares = shares.double().cpu()
        if not bool(shares.isfinite().all()) or bool((shares < 0).any()) or not shares.sum() > 0:
            raise PolicyFailure("allocate returned shares that are negative, not finite or all 0")
        return shares


def choose(
    policy: Policy,
    view: View,
    keep: Tensor,
    finer: Tensor | None = None,
    demoted: Tensor | None = None,
    given: tuple[Tensor, dict[str, Tensor]] | None = None,
) -> Choice:
    """Returns a policy's choice of the candidates that stay, and of those that get the finer codec.
    Protected slots stay in any case.

    Args:
        keep: int64 [H] on the CPU, how many of each head stay.
        finer: int64 [H] on the CPU, how many of these get the finer codec; None without tiers.
        demoted: as `Policy.split` takes it; needed with `finer`.
        given: what `scored` returned, if it was called before.

    Raises:
        PolicyFailure: the policy raised, or a result has the wrong type, shape or dtype.
    """
    scores, state = scored(policy, view) if given is None else given
    shape = (view.num_kv_heads, view.candidates)
    with _Guard():
        picked = policy.select(view, scores, keep)
        _require("select", picked, shape, _is_bool, "bool")
        sound = ~scores.isnan().any() & _have(picked, keep)
        if view.ragged:
            sound = sound & ~(picked & ~view.valid).any()
        # Unsound masks are replaced here, before they index anything.
        kept = _if_sound(
            sound,
            lambda: with_protected(view, scores, picked, keep),
            lambda: sinks_and_newest(view, keep),
        )
        fine = None
        if finer is not None:
            assert demoted is not None
            best = policy.split(view, scores, kept, finer, demoted)
            _require("split", best, shape, _is_bool, "bool")
            sound = sound & _have(best, finer) & ~(best & ~kept).any()
            stays = kept
            fine = _if_sound(sound, lambda: best, lambda: sinks_and_newest(view, finer))
            kept = _if_sound(sound, lambda: stays, lambda: sinks_and_newest(view, keep))
        merged = policy.merge(view, scores, kept) if policy.merges else None
        remembered: dict[str, Tensor] = {}
        if merged is not None:
            merged = _checked(merged, view)
            remembered = {k: x.float() for k, x in (merged.layer_state or {}).items()}
    return Choice(kept, fine, state, merged, sound, remembered)


def _have(mask: Tensor, counts: Tensor) -> Tensor:
    """Returns whether the rows of `mask` have as many ones as `counts`, which is on the CPU, says:
    a bool scalar on the device."""
    return (mask.sum(1, keepdim=True) == by_head(counts, mask.device)).all()


def _if_sound(sound: Tensor, then: Callable[[], Tensor], otherwise: Callable[[], Tensor]) -> Tensor:
    """Returns what `then` makes where `sound`, a bool scalar, is true, else what `otherwise` makes.
    A GPU makes both, as nobody waits for it."""
    if sound.device.type == "cpu":
        return then() if bool(sound) else otherwise()
    return torch.where(sound, then(), otherwise())


def with_protected(view: View, scores: Tensor, kept: Tensor, keep: Tensor) -> Tensor:
    """Returns `kept` with the protected slots that a policy dropped in the places of the worst
    others. Arguments are those of `Policy.select`, and its result."""
    protected = view.staying
    if view.device.type == "cpu" and not bool((protected & ~kept).any()):
        return kept
    rank = torch.atan(scores.double().nan_to_num()) + 10.0
    rank = rank.masked_fill(~kept, -torch.inf).masked_fill(protected, torch.inf)
    if view.ragged:
        rank = rank.masked_fill(~view.valid, -torch.inf)
    return ops.top_mask(rank, keep)


def _checked(merged: Any, view: View) -> Merged:
    if not isinstance(merged, Merged):
        raise PolicyFailure(f"merge returned {type(merged).__name__}, not a Merged")
    rows = (view.num_kv_heads, view.candidates)
    values = view.values
    assert values is not None
    for what, value, size in (
        ("keys", merged.keys, view.keys.shape[2]),
        ("values", merged.values, values.shape[2]),
    ):
        _require(f"merge's {what}", value, (*rows, size), _is_float, "floats")
    if merged.log_bias is not None:
        _require("merge's log bias", merged.log_bias, rows, _is_float, "floats")
    remembered = merged.layer_state or {}
    for name, value in remembered.items():
        right = isinstance(value, Tensor) and value.dim() == 2 and len(value) == rows[0]
        shape = tuple(value.shape) if right else (rows[0], 1)
        _require(f"merge's layer state {name!r}", value, shape, _is_float, "floats")
    tensors = merged.keys, merged.values, merged.log_bias, *remembered.values()
    finite = [_is_finite(x) for x in tensors if x is not None and x.numel()]
    if finite and not bool(torch.stack(finite).all()):  # one look at the device
        raise PolicyFailure("merge returned values that are not finite")
    return merged


def _is_finite(x: Tensor) -> Tensor:
    # NaN is the least and the greatest. One pass; isfinite of each element takes five.
    low, high = torch.aminmax(x)
    return low.isfinite() & high.isfinite()


class _Guard:
    """Turns whatever a policy raises into PolicyFailure."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, PolicyFailure):
            raise PolicyFailure(f"{type(error).__name__}: {error}") from error


def _require(
    what: str,
    value: object,
    shape: tuple[int, ...],
    allowed: Callable[[torch.dtype], bool],
    words: str,
) -> None:
    if not isinstance(value, Tensor):
        raise PolicyFailure(f"{what} returned {type(value).__name__}, not a tensor")
    if tuple(value.shape) != tuple(shape) or not allowed(value.dtype):
        raise PolicyFailure(
            f"{what} returned {value.dtype} {tuple(value.shape)}, not {words} {tuple(shape)}"
        )


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


def _is_bool(dtype: torch.dtype) -> bool:
    return dtype == torch.bool


def rope_of(view: View) -> Rope:
    """Returns the model's rotary embedding. Raises PolicyFailure if it is not known."""
    if view.rope is None:
        raise PolicyFailure("it needs the model's rotary embedding, which is of an unknown kind")
    return view.rope


def dry_run(
    policy: Policy,
    *,
    sinks: int = 4,
    window: int = 16,
    page_size: int = 32,
    with_rope: bool = True,
) -> None:
    """Asks a policy for a choice among random tokens, as the engine will: first among raw tokens,
    then among those that stayed and new ones.

    Args:
        sinks, window: as in the server's settings.
        page_size: tokens in a block.
        with_rope: whether the model's rotary embedding is known.

    Raises:
        PolicyFailure: `choose` raised it, or the choice is not sound.
    """
    layers, heads = policy.made_for or (1, 2)
    group, size = 2, policy.head_size or 64
    blocks = 4 * -(-max(sinks, window, 1) // page_size) + 8
    m, keep = blocks * page_size, blocks // 2 * page_size
    draw = torch.Generator().manual_seed(0)
    n = m + window
    state: dict[str, Tensor] = {}
    layer_state: dict[str, Tensor] = {}
    positions = torch.arange(m, dtype=torch.int32).expand(heads, -1)
    for turn in range(2):
        # Where a policy divides pages, heads hold unequal numbers of tokens from then on.
        fewer = page_size if turn and policy.allocates else 0
        counts = torch.tensor([m, *[m - fewer] * (heads - 1)])
        view = View(
            held=ops.LayerKV(
                torch.randn(heads, n, size, generator=draw),
                torch.randn(heads, n, size, generator=draw),
                (counts + window).tolist() if fewer else None,
            ),
            queries=torch.randn(heads * group, window, size, generator=draw)
            if "queries" in policy.needs
            else None,
            scale=size**-0.5,
            candidates=m,
            sinks=sinks,
            page_size=page_size,
            layer=0,
            layers=layers,
            all_heads=lambda x: x,
            counts=counts if fewer else None,
            state=state,
            layer_state=layer_state,
            known=(torch.arange(m) < turn * keep).expand(heads, -1),
            log_bias=torch.zeros(heads, m) if policy.merges else None,
            true_positions=positions + turn * (m - keep),
            spans=((0, m // 4), (m // 2, m)),
            rope=Rope(1e4 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size))
            if with_rope
            else None,
            computed=n + turn * (m - keep),
            repeated=torch.rand(heads, m, generator=draw) if "repeat" in policy.needs else None,
        )
        given = scored(policy, view)
        if policy.allocates:
            room = Room(
                layers * heads * keep // page_size,
                torch.full((layers, heads), page_size),
                counts.expand(layers, -1),
            )
            demand = demanded(policy, view, given[0], room)
            if demand is not None:
                view = replace(view, demands=demand.cpu().expand(layers, -1))
            allocated(policy, view.demands, room)
        demoted = torch.zeros(heads, m, dtype=torch.bool) if policy.tiers else None
        kept = counts - (m - keep)
        finer = kept // 2 if policy.tiers else None
        choice = choose(policy, view, kept, finer, demoted, given)
        if not choice.sound:
            raise PolicyFailure(USELESS)
        slots = ops.mask_slots(choice.kept, kept).clamp_(min=0)
        layer_state = choice.layer_state
        state = {}
        for name, value in choice.state.items():
            state[name] = torch.zeros_like(value)
            state[name][:, :keep] = reordered(value, slots)


class ReorderedKV:
    """What a request holds in one layer, with its candidates in another order, or only some of
    them. It implements `base.LayerKV`.

    Args:
        view: the view of all candidates, by slot.
        order: int64 [H, k], the slots of each head's candidates in the new order; the tail stays
            behind them.
    """

    def __init__(self, view: View, order: Tensor):
        self._held, self._order = view.held, order
        self._m = view.candidates
        self._candidates = view.sizes.tolist() if view.ragged else view.candidates

    @property
    def num_kv_heads(self) -> int:
        """Returns the number of KV heads, H."""
        return self._held.num_kv_heads

    @property
    def device(self) -> torch.device:
        """Returns the device on which policies compute."""
        return self._held.device

    @property
    def keys(self) -> Tensor:
        """Returns the keys [H, n, D], with RoPE, of any float dtype."""
        return self._reordered(self._held.keys)

    @property
    def values(self) -> Tensor | None:
        """Returns the values [H, n, D], or None where there are none."""
        values = self._held.values
        return None if values is None else self._reordered(values)

    def _reordered(self, x: Tensor) -> Tensor:
        return torch.cat((reordered(x[:, : self._m], self._order), x[:, self._m :]), 1)

    def window_scores(
        self,
        queries: Tensor,
        scale: float,
        candidates: Any,
        *,
        pool: int = 1,
        pool_kind: str = "max",
        reduce: str | None = "mean",
        **options: Any,
    ) -> Tensor:
        """Returns `ops.window_scores` over these keys, pooled in this order."""
        first = reduce if pool == 1 or reduce == "greatest" else None
        scores = self._held.window_scores(queries, scale, self._candidates, reduce=first, **options)
        # Query heads read the slots of their KV head.
        group = len(scores) // self.num_kv_heads
        scores = scores.gather(1, self._order.repeat_interleave(group, 0))
        counts = [candidates] * self.num_kv_heads if isinstance(candidates, int) else candidates
        for head, count in enumerate(counts):
            own = scores[head * group : (head + 1) * group]
            own[:, count:] = -torch.inf
            if pool > 1 and count:
                own[:, :count] = ops.pool_scores(own[:, :count], pool, pool_kind)
        if first is not None or reduce is None:
            return scores
        return ops.reduce_groups(scores, self.num_kv_heads, reduce)


def in_position_order(view: View, order: Tensor) -> View:
    """Returns a view with the candidates in the order of their positions instead of their slots, or
    with only some of them: then the caller sets how many each head has.

    Args:
        view: the view by slot.
        order: int64 [H, k], the slots of each head in the order of their positions.
    """

    def ordered(x: Tensor | None) -> Tensor | None:
        return None if x is None else reordered(x, order)

    return replace(
        view,
        held=ReorderedKV(view, order),
        candidates=order.shape[1],
        protected=ordered(view.protected),
        state={name: reordered(x, order) for name, x in view.state.items()},
        known=ordered(view.known),
        log_bias=ordered(view.log_bias),
        true_positions=ordered(view.true_positions),
        repeated=ordered(view.repeated),
    )


def reordered(x: Tensor, order: Tensor) -> Tensor:
    """Returns the columns `order`, int64 [H, k], of each row of `x` [H, m, ...]: [H, k, ...]."""
    index = order.view(*order.shape, *(1,) * (x.dim() - 2))
    return x.gather(1, index.expand(*order.shape, *x.shape[2:]))
