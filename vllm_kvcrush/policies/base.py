"""What a policy sees, and what it answers.

A policy ranks the tokens of one layer of one request; how many stay is the plan's business, and
moving them is the engine's. Every head keeps the same number of tokens, not the same tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from vllm_kvcrush import ops


class Held(Protocol):
    """A layer's held keys and values, wherever they lie; `ops.Held` has them in plain tensors."""

    @property
    def keys(self) -> Tensor: ...
    @property
    def values(self) -> Tensor | None: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def window_scores(
        self, queries: Tensor, scale: float, candidates: int, **options: Any
    ) -> Tensor: ...


@dataclass
class View:
    """One layer of one request at a compaction. Slots are in position order.

    H KV heads, Hq query heads, n held slots, m candidates, w window queries, head size D. Under
    tensor parallelism H and Hq count this rank's heads.

    `keys` and `values` of every held slot, [H, n, D], keys with RoPE, are copies where the cache is
    not made of plain tensors. A policy that gets by with `window_scores` costs a fraction.

    Attributes:
        held: what the request holds in this layer.
        queries: [Hq, w, D], the last w queries, with RoPE, unscaled, or None unless the policy
            needs "queries".
        scale: factor of q·k.
        candidates: m; slots [0, m) may be dropped, [m, n) is the raw tail and always stays.
        sinks: leading slots that always stay.
        page_size: tokens in a page (vLLM's block size); divides m and the number kept.
        running: float32 [H, m], what `Policy.running` returned at the last compaction for the
            tokens that survived it, 0 for newer ones; None unless the policy needs "running".
        layer: index of the layer.
        all_heads: [H, m] of this rank → [H over all ranks, m], in rank order; the identity
            without tensor parallelism. A collective: every rank must make the same calls.
    """

    held: Held
    queries: Tensor | None
    scale: float
    candidates: int
    sinks: int
    page_size: int
    running: Tensor | None
    layer: int
    all_heads: Callable[[Tensor], Tensor]

    @property
    def keys(self) -> Tensor:
        """[H, n, D], with RoPE, of any float dtype."""
        return self.held.keys

    @property
    def values(self) -> Tensor | None:
        """[H, n, D], of any float dtype; None where a view without values was made by hand."""
        return self.held.values

    @property
    def num_kv_heads(self) -> int:
        """H."""
        return self.held.num_kv_heads

    @property
    def device(self) -> torch.device:
        """Of every tensor that a policy returns."""
        return self.held.device

    def window_scores(
        self,
        *,
        mean: bool = True,
        pool: int = 1,
        pool_kind: str = "max",
        reduce: str = "mean",
    ) -> Tensor:
        """Attention that each candidate receives from the window's queries: float32 [H, m].

        The weights of `ops.window_attention`, added up over the window (or their mean), pooled
        along the candidates and then merged over the query heads of a KV head.

        Args:
            mean: the mean over the window instead of the sum.
            pool, pool_kind: of `ops.pool_scores`; 1 leaves the scores as they are.
            reduce: of `ops.reduce_groups`.
        """
        assert self.queries is not None, 'the policy does not need "queries"'
        return self.held.window_scores(
            self.queries,
            self.scale,
            self.candidates,
            mean=mean,
            pool=pool,
            pool_kind=pool_kind,
            reduce=reduce,
        )


class OptionError(ValueError):
    """A bad hyperparameter; the message is one sentence for the operator who set it."""

    def __init__(self, path: str, problem: str):
        super().__init__(f"--kv-policy-config.{path}{problem}.")
        self.path = path
        self.problem = problem


@dataclass
class Policy(ABC):
    """Base of all policies. A subclass is a dataclass whose fields are its hyperparameters, and
    checks them in `__post_init__` with `require`."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()  # of "queries", "running"
    # Names in codecs.CODECS that the pages of the compressed region may have, those that lose least
    # first; empty: raw.
    codecs: ClassVar[tuple[str, ...]] = ()
    # Whether, where a region has pages of two codecs, the most important tokens get the finer one;
    # else the newest do.
    tiers: ClassVar[bool] = False

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """Importance of each candidate, [H, m]; higher stays."""

    def select(self, view: View, scores: Tensor, keep: int) -> Tensor:
        """The slots that stay: int64 [H, keep], ascending, distinct, below m.

        By default the sinks and then the best scores.
        """
        return ops.top_slots(protect(scores, view.sinks), keep)

    def split(
        self, view: View, scores: Tensor, kept: Tensor, finer: int, demoted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which of the kept slots get the finer codec: those that would stay if only so many did.

        Args:
            kept: what `select` chose.
            finer: how many.
            demoted: bool [H, m], tokens that are in the coarser codec already. What they lost does
                not come back, so they come last.

        Returns:
            int64 [H, finer] and the rest of `kept`, each ascending.
        """
        stays = torch.zeros_like(demoted).scatter_(1, kept, True)
        fresh = scores.masked_fill(demoted | ~stays, -torch.inf)
        best = torch.zeros_like(demoted).scatter_(1, self.select(view, fresh, finer), True)
        # By class, then by score: the best, others that were never demoted, the demoted.
        place = fresh.argsort(dim=1, stable=True).argsort(1)
        rank = place + ((best & ~demoted).long() + (~demoted).long()) * view.candidates
        mask = ops.top_mask(rank.float().masked_fill(~stays, -torch.inf), finer)
        rest = ops.mask_slots(stays & ~mask, kept.shape[1] - finer)
        return ops.mask_slots(mask, finer), rest

    def running(self, view: View, scores: Tensor) -> Tensor | None:
        """What the engine keeps of the survivors for `View.running` at the next compaction:
        float32 [H, m], or None."""
        return None

    def require(self, option: str, ok: bool, allowed: str) -> None:
        """Raises OptionError unless `ok`. `allowed` completes "... is not"."""
        if not ok:
            problem = f"={getattr(self, option)!r} is not {allowed}"
            raise OptionError(f"{self.name}.{option}", problem)

    def require_one_of(self, option: str, allowed: tuple[str, ...]) -> None:
        """Raises OptionError unless the option is one of these words."""
        ok = getattr(self, option) in allowed
        self.require(option, ok, f"one of {', '.join(allowed)}")


def protect(scores: Tensor, first: int, last: int = 0) -> Tensor:
    """Puts the first and the last few slots above every other.

    Args:
        scores: [H, m].
        first, last: numbers of slots.

    Returns:
        [H, m], a copy in which these slots are +inf and all others finite.
    """
    top = torch.finfo(scores.dtype).max
    scores = scores.nan_to_num(nan=-top, posinf=top, neginf=-top)
    scores[:, :first] = torch.inf
    scores[:, scores.shape[-1] - last :] = torch.inf
    return scores


def is_whole(value: Any) -> bool:
    """Whether an option is an int; True and False, which JSON has too, are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether an option is a finite int or float."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))
