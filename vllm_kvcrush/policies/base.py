"""What a policy is given, and what it returns.

A policy ranks the tokens of one layer of one request and says which stay. The plan says how many
may stay, and the engine moves them. A policy may also divide a request's pages among layers and
heads, and change keys and values on their way into the compressed region.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from vllm_kvcrush import ops
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.spec import Storage

_TILE = 8192  # tokens whose keys or values a policy has in float32, if they come in another type


class LayerKV(Protocol):
    """The keys and values that a request holds in one layer, wherever they are stored. In
    `ops.LayerKV` they are plain tensors."""

    @property
    def keys(self) -> Tensor: ...
    @property
    def values(self) -> Tensor | None: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def window_scores(
        self, queries: Tensor, scale: float, candidates: Any, **options: Any
    ) -> Tensor: ...


@dataclass
class View:
    """One layer of one request at a compaction. Slots are in position order.

    Shapes use H KV heads, Hq query heads, n held slots, m candidates, w window queries, and head
    size D. Under tensor parallelism H and Hq count this rank's heads. Heads may hold unequal
    numbers of tokens: then n and m are the largest numbers, and what lies past a head's own count
    is padding.

    `keys` and `values` copy every held slot, [H, n, D], where the cache is not made of plain
    tensors. `window_scores` does not, so a policy that needs nothing else costs a fraction.

    Attributes:
        held: keys and values that the request holds in this layer.
        queries: [Hq, w, D], the last w queries, with RoPE, unscaled, or None unless the policy
            needs "queries".
        scale: factor of q·k.
        candidates: m; slots [0, m) may be dropped, the raw tail after them always stays.
        sinks: leading slots that always stay.
        page_size: tokens in a page (vLLM's block size).
        layer: index of the layer.
        all_heads: turns this rank's [H, m] into [H over all ranks, m], in rank order; the identity
            without tensor parallelism. It is a collective: every rank must make the same calls.
        layers: number of layers.
        counts: int64 [H] on the CPU, candidates of each head, at most m; None means m of each.
        protected: bool [H, m], slots that stay whatever a policy says: the sinks and the request's
            protected spans. None means the sinks.
        state: by name, what `score` returned at the last compaction about the tokens that survived
            it, float32 [H, m] or [H, m, c], and 0 for newer tokens (see `known`). Names are missing
            at the first compaction and after one in which the policy failed.
        known: bool [H, m], slots that the last compaction left; the others are newer. None means
            that all are newer.
        log_bias: float32 [H, m], what policies that merge add to the logits of a slot; None means
            nothing.
        true_positions: int32 [H, m], positions of the candidates in the request; None unless the
            policy needs "positions" (see `positions`).
        spans: the request's spans, (first, end) token positions, ascending and disjoint.
        rope: the model's rotary embedding, to undo and redo it; None where it is not known.
        computed: tokens of the request that were computed; the raw tail is the last of them.
        first_head: index of this rank's first KV head among those of all ranks.
        demands: float64 [L, H] on the CPU, what `demand` returned for every layer, once the pages
            of this compaction have been divided; None before, and where they are not.
        layer_state: by name, what `merge` returned as `Merged.layer_state` in this layer the last
            time, float32 [H, c].
        repeated: float32 [H, m], the greatest attention that each candidate received while the
            model repeated those that are new since the last compaction, 0 for older ones; None
            unless the policy needs "repeat".
    """

    held: LayerKV
    queries: Tensor | None
    scale: float
    candidates: int
    sinks: int
    page_size: int
    layer: int
    all_heads: Callable[[Tensor], Tensor]
    layers: int = 1
    counts: Tensor | None = None
    protected: Tensor | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    known: Tensor | None = None
    log_bias: Tensor | None = None
    true_positions: Tensor | None = None
    spans: tuple[tuple[int, int], ...] = ()
    rope: Rope | None = None
    computed: int = 0
    first_head: int = 0
    demands: Tensor | None = None
    layer_state: Mapping[str, Tensor] = field(default_factory=dict)
    repeated: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """Returns the keys [H, n, D], with RoPE, of any float dtype."""
        return self.held.keys

    @property
    def values(self) -> Tensor | None:
        """Returns the values [H, n, D], of any float dtype, or None if the view was made without
        them."""
        return self.held.values

    @property
    def num_kv_heads(self) -> int:
        """Returns the number of KV heads, H."""
        return self.held.num_kv_heads

    @property
    def device(self) -> torch.device:
        """Returns the device on which every tensor must be that a policy returns."""
        return self.held.device

    @property
    def positions(self) -> Tensor:
        """Returns the true positions of the candidates, int32 [H, m]."""
        assert self.true_positions is not None, 'the policy does not need "positions"'
        return self.true_positions

    @functools.cached_property
    def sizes(self) -> Tensor:
        """Returns the number of candidates of each head, int64 [H] on the CPU."""
        if self.counts is None:
            return torch.full((self.num_kv_heads,), self.candidates)
        return self.counts

    @functools.cached_property
    def ragged(self) -> bool:
        """Returns whether heads have unequal numbers of candidates."""
        return self.counts is not None and bool((self.counts != self.candidates).any())

    @functools.cached_property
    def valid(self) -> Tensor:
        """Returns which of the m columns are candidates of each head, bool [H, m]."""
        at = torch.arange(self.candidates, device=self.device)
        return (at < by_head(self.sizes, self.device)).expand(self.num_kv_heads, -1)

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Returns the number of held slots of each head, its candidates and the tail."""
        tail = self.keys.shape[1] - self.candidates
        return [count + tail for count in self.sizes.tolist()]

    @functools.cached_property
    def held_valid(self) -> Tensor:
        """Returns which of the n rows of `keys` are held slots of each head, bool [H, n]."""
        at = torch.arange(self.keys.shape[1], device=self.device)
        lengths = torch.tensor(self.lengths).to(self.device, non_blocking=True)
        return at < lengths.unsqueeze(1)

    @functools.cached_property
    def held_positions(self) -> Tensor:
        """Returns the true positions of all held slots, int32 [H, n]; those past a head's own are
        beyond every token's."""
        n, m = self.keys.shape[1], self.candidates
        at = torch.arange(n, dtype=torch.int32, device=self.device)
        sizes = self.sizes.to(self.device, torch.int32, non_blocking=True).unsqueeze(1)
        tail = self.computed - (n - m) + at - sizes
        wide = torch.nn.functional.pad(self.positions, (0, n - m))
        return torch.where(at < sizes, wide, tail)

    @functools.cached_property
    def staying(self) -> Tensor:
        """Returns which candidates stay whatever a policy says, bool [H, m]."""
        if self.protected is not None:
            return self.protected
        at = torch.arange(self.candidates, device=self.device)
        return (at < self.sinks) & self.valid

    def receivers(self, kept: Tensor) -> Tensor:
        """Returns which kept candidates others may be merged into, bool [H, m]: what a request
        protects stays as it is."""
        return kept if self.protected is None else kept & ~self.protected

    def window_scores(
        self,
        *,
        mean: bool = True,
        pool: int = 1,
        pool_kind: str = "max",
        reduce: str = "mean",
        last: int | None = None,
    ) -> Tensor:
        """Returns the attention that each candidate receives from the window's queries, float32
        [H, m], -inf past a head's count. It reads no copy of the keys.

        It is the mean or the sum over the window of the weights of `ops.window_attention`, pooled
        along the candidates and then merged over the query heads of a KV head.

        Args:
            mean: whether to take the mean over the window instead of the sum.
            pool, pool_kind: `size` and `kind` of `ops.pool_scores`; 1 leaves the scores as they
                are.
            reduce: `how` of `ops.reduce_groups`, or "greatest", see `ops.window_scores`.
            last: how many of the newest queries count; None means the whole window.
        """
        assert self.queries is not None, 'the policy does not need "queries"'
        return self.held.window_scores(
            self.queries if last is None else self.queries[:, -last:],
            self.scale,
            self.sizes.tolist() if self.ragged else self.candidates,
            mean=mean,
            pool=pool,
            pool_kind=pool_kind,
            reduce=reduce,
        )

    def window_logits(self) -> Tensor:
        """Returns the logits of the window's queries with every held slot, float32 [H, g, w, n],
        with log biases, where g query heads share a KV head; -inf at slots after a query's own and
        past a head's own."""
        assert self.queries is not None, 'the policy does not need "queries"'
        counts = self.lengths if self.ragged else None
        return ops.window_logits(self.queries, self.keys, self.scale, self.log_bias, counts)

    @functools.cached_property
    def window_moments(self) -> ops.WindowMoments:
        """Returns the mean and the variance over the window of the attention that each candidate
        receives, and the entropies of that attention. Unlike `window_scores` it copies the keys;
        `score` and `demand` share one result."""
        assert self.queries is not None, 'the policy does not need "queries"'
        tail = self.keys.shape[1] - self.candidates
        return ops.window_moments(
            self.queries, self.keys, self.scale, self.sizes.tolist(), tail, self.log_bias
        )


class Room(NamedTuple):
    """The pages of this rank that a request's compressed region may fill.

    Attributes:
        pages: number of pages, over all layers and heads.
        page_tokens: int64 [L, H], tokens that one page of each head holds.
        candidates: int64 [L, H], candidates of each head.
    """

    pages: int
    page_tokens: Tensor
    candidates: Tensor


class Merged(NamedTuple):
    """A layer's candidates after merging; only the kept slots are used.

    Attributes:
        keys: float32 [H, m, D], with RoPE of the slot's own position.
        values: float32 [H, m, Dv].
        log_bias: float32 [H, m], what is added to the logit of each slot; None means nothing.
        layer_state: by name, float32 [H, c], what the policy wants to find in `View.layer_state`
            at the request's next compaction; None means nothing.
    """

    keys: Tensor
    values: Tensor
    log_bias: Tensor | None
    layer_state: Mapping[str, Tensor] | None = None


class OptionError(ValueError):
    """A bad hyperparameter; the message is one sentence for the operator who set it."""

    def __init__(self, path: str, problem: str):
        super().__init__(f"--kv-policy-config.{path}{problem}.")
        self.path = path
        self.problem = problem


Scores = Tensor | tuple[Tensor, Mapping[str, Tensor]]


@dataclass
class Policy(ABC):
    """The base of all policies. A subclass is a dataclass whose fields are its hyperparameters. It
    checks them in `__post_init__` with `require`."""

    name: ClassVar[str]
    # Any of "queries" (of the observation window), "positions" (the tokens' true ones), "state"
    # (what `score` returns beside the scores is kept for the next compaction) and "repeat" (the
    # model reads all that is compacted a second time).
    needs: ClassVar[frozenset[str]] = frozenset()
    # Names of codecs that the pages of the compressed region may have, those that lose least
    # first; empty for raw pages.
    codecs: ClassVar[tuple[str, ...]] = ()
    # Whether the most important tokens get the finer codec where a region has pages of two codecs;
    # otherwise the newest do.
    tiers: ClassVar[bool] = False
    # Whether `allocate` divides the pages; otherwise all layers and heads keep equally many tokens.
    allocates: ClassVar[bool] = False
    # Whether `merge` changes the keys and values that stay.
    merges: ClassVar[bool] = False
    # It takes keys and values of any float type and never has more than tiles of them in float32:
    # see `float_tiles`. Then they may come in the type of raw pages.
    tiled: ClassVar[bool] = False
    # Whether the policy treats each span of a request on its own; and whether `score` does.
    uses_spans: ClassVar[bool] = False
    scores_spans: ClassVar[bool] = False

    @abstractmethod
    def score(self, view: View) -> Scores:
        """Returns the importance of each candidate, [H, m]; those with higher scores stay. A policy
        that needs "state" also returns, by name, what it wants to find in `View.state` at the next
        compaction, [H, m] or [H, m, c] each."""

    def select(self, view: View, scores: Tensor, keep: Tensor) -> Tensor:
        """Returns which slots stay: bool [H, m] with keep[h] ones in row h.

        By default these are the protected slots and then the ones with the best scores.

        Args:
            scores: [H, m], what `score` returned, -inf past a head's count.
            keep: int64 [H] on the CPU, how many slots of each head stay.
        """
        return ops.top_mask(protect(view, scores), keep)

    def split(
        self, view: View, scores: Tensor, kept: Tensor, finer: Tensor, demoted: Tensor
    ) -> Tensor:
        """Returns which of the kept slots get the finer codec, bool [H, m]: those that would stay
        if only `finer` of them did.

        Args:
            scores: [H, m], as in `select`.
            kept: bool [H, m], what `select` returned.
            finer: int64 [H], how many slots of each head get the finer codec.
            demoted: bool [H, m], tokens that are in the coarser codec already. They come last,
                since what they lost does not come back.
        """
        fresh = scores.masked_fill(demoted | ~kept, -torch.inf)
        best = self.select(view, fresh, finer)
        # Ranks are by class, then by score: the best, others that were never demoted, the demoted.
        place = fresh.argsort(dim=1, stable=True).argsort(1)
        rank = place + ((best & ~demoted).long() + (~demoted).long()) * view.candidates
        return ops.top_mask(rank.float().masked_fill(~kept, -torch.inf), finer)

    def demand(self, view: View, scores: Tensor, room: Room) -> Tensor | None:
        """Returns what `allocate` needs to know about one layer, [H], or None if it needs no
        scores. It is called for every layer, before anything is chosen; `scores` are as in
        `select`."""
        return None

    def allocate(self, demand: Tensor | None, room: Room) -> Tensor:
        """Returns the relative share of each head in the request's pages, [L, H], at least 0. It is
        called for policies with `allocates`. Under tensor parallelism each rank divides its own
        pages.

        Args:
            demand: [L, H], what `demand` returned, or None.
            room: the pages to divide.
        """
        raise NotImplementedError

    def merge(self, view: View, scores: Tensor, kept: Tensor) -> Merged:
        """Returns the keys, values and log biases with which the kept slots are stored. It is
        called for policies with `merges`.

        Args:
            scores: [H, m], as in `select`.
            kept: bool [H, m], the slots that stay.
        """
        raise NotImplementedError

    @property
    def whole_pages(self) -> bool:
        """Returns whether whole pages must stay, with the same number of tokens in every head."""
        return False

    @property
    def made_for(self) -> tuple[int, int] | None:
        """Returns the numbers of layers and of KV heads, over all ranks, of the models that the
        policy is for, or None if any will do."""
        return None

    @property
    def head_size(self) -> int | None:
        """Returns the head size of the models that the policy is for, or None if any will do."""
        return None

    @classmethod
    def storage(cls) -> Storage:
        """Returns how the compressed region may be stored."""
        return Storage(cls.codecs, cls.tiers, cls.allocates or cls.merges)

    def require(self, option: str, ok: bool, allowed: str) -> None:
        """Raises OptionError unless `ok`. `allowed` completes "... is not"."""
        if not ok:
            problem = f"={getattr(self, option)!r} is not {allowed}"
            raise OptionError(f"{self.name}.{option}", problem)

    def require_one_of(self, option: str, allowed: tuple[str, ...]) -> None:
        """Raises OptionError unless the option is one of these words."""
        ok = getattr(self, option) in allowed
        self.require(option, ok, f"one of {', '.join(allowed)}")


def _default_base() -> Policy:
    from vllm_kvcrush.policies.snapkv import SnapKV

    return SnapKV()


@dataclass
class Wrapper(Policy):
    """The base of policies that wrap another one. By default it does all that the other one does.

    Attributes:
        base: the wrapped policy; SnapKV unless another one is named.
    """

    base: Policy = field(default_factory=_default_base)

    def __post_init__(self) -> None:
        self.require("base", isinstance(self.base, Policy), "a policy")
        for name in ("codecs", "tiers", "allocates", "merges", "uses_spans", "scores_spans"):
            # Class attributes of most policies; here they depend on the wrapped object.
            setattr(self, name, getattr(type(self), name) or getattr(self.base, name))

    def require_alone(self, what: str) -> None:
        """Raises OptionError if the base "divides pages" or "merges tokens" (`what`) too, which
        this policy does itself."""
        if self.base.allocates if what == "divides pages" else self.base.merges:
            problem = f"={self.base.name} {what}, and so does {self.name}: take one of them"
            raise OptionError(f"{self.name}.base", problem)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Returns whatever the base needs."""
        return self.base.needs

    @property
    def whole_pages(self) -> bool:
        """Returns whether the base wants whole pages."""
        return self.base.whole_pages

    @property
    def made_for(self) -> tuple[int, int] | None:
        """Returns the shape of the models that the base is for."""
        return self.base.made_for

    @property
    def head_size(self) -> int | None:
        """Returns the head size of the models that the base is for."""
        return self.base.head_size

    def score(self, view: View) -> Scores:
        """Returns the base's scores and state."""
        return self.base.score(view)

    def select(self, view: View, scores: Tensor, keep: Tensor) -> Tensor:
        """Returns the base's choice."""
        return self.base.select(view, scores, keep)

    def split(
        self, view: View, scores: Tensor, kept: Tensor, finer: Tensor, demoted: Tensor
    ) -> Tensor:
        """Returns the base's choice. A subclass with a `select` of its own should have
        `Policy.split`."""
        return self.base.split(view, scores, kept, finer, demoted)

    def demand(self, view: View, scores: Tensor, room: Room) -> Tensor | None:
        """Returns the base's demand."""
        return self.base.demand(view, scores, room)

    def allocate(self, demand: Tensor | None, room: Room) -> Tensor:
        """Returns the base's shares."""
        return self.base.allocate(demand, room)

    def merge(self, view: View, scores: Tensor, kept: Tensor) -> Merged:
        """Returns what the base merges."""
        return self.base.merge(view, scores, kept)


def protect(view: View, scores: Tensor) -> Tensor:
    """Returns a copy of the scores [H, m] in which protected slots are +inf, padding is -inf and
    all others are finite."""
    top = torch.finfo(scores.dtype).max
    scores = scores.nan_to_num(nan=-top, posinf=top, neginf=-top)
    if view.protected is None:
        scores[:, : view.sinks] = torch.inf
    else:
        scores = scores.masked_fill(view.protected, torch.inf)
    if view.ragged:
        scores = scores.masked_fill(~view.valid, -torch.inf)
    return scores


def float_tiles(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields keys or values [H, n, D] in float32, some tokens after the others, and which these
    are; all at once if they are float32 already."""
    step = max(1, x.shape[1] if x.dtype == torch.float32 else _TILE)
    for first in range(0, max(1, x.shape[1]), step):
        own = slice(first, first + step)
        yield own, x[:, own].float()


def norms(x: Tensor) -> Tensor:
    """Returns the lengths of keys or values [H, n, D], float32 [H, n], without a copy of them."""
    return torch.linalg.vector_norm(x, dim=2, dtype=torch.float32)


def by_head(counts: Tensor, device: torch.device) -> int | Tensor:
    """Returns numbers of the heads, int64 [H] on the CPU, to compare columns with: one number where
    all are alike, of which a device needs no copy; else [H, 1] there, for which nobody waits."""
    first = int(counts[0])
    if bool((counts == first).all()):
        return first
    return counts.to(device, non_blocking=True).unsqueeze(1)


def newest_slots(view: View, count: Tensor) -> Tensor:
    """Returns which candidates are the `count` (int64 [H]) newest of each head, bool [H, m]."""
    at = torch.arange(view.candidates, device=view.device)
    newest = (at >= by_head(view.sizes - count, view.device)).expand(view.num_kv_heads, -1)
    return newest & view.valid if view.ragged else newest


def sinks_and_newest(view: View, keep: Tensor) -> Tensor:
    """Returns which `keep` (int64 [H]) candidates of each head stay if the protected slots come
    first and then the newest, bool [H, m]."""
    at = torch.arange(view.candidates, device=view.device)
    if view.protected is not None:
        return ops.top_mask(protect(view, at.float().repeat(view.num_kv_heads, 1)), keep)
    # No search for the best scores: sorted ones are its slow case.
    sinks = keep.clamp(max=view.sinks)
    return newest_slots(view, keep - sinks) | (at < by_head(sinks, view.device))


def is_whole(value: Any) -> bool:
    """Returns whether an option is an int; True and False, which JSON has too, are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Returns whether an option is a finite int or float."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))
