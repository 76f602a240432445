"""What the live page shows of an engine, taken from its scheduler when somebody asks.

`Observer` is there with `--kv-live-page` only. Between snapshots it keeps the last compactions, and
pressure once a second; all else is read when it is asked for. Snapshots are plain values that can
be sent between processes, and `server/live/state.py` has the meaning of each. They name requests by
their number, as ids of vLLM's may be chosen by clients.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.engine import pressure
from vllm_kvcrush.engine.commands import Compact, Compacted
from vllm_kvcrush.plan import Plan, cdiv

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_kvcrush.engine.scheduler import KVCrushSchedulerMixin

# What a block of the pool may be. Where holders of a shared one differ, the later of these counts.
FREE, CACHED, TAIL, WHOLE = "free", "cached", "tail", "whole"
STATES = (FREE, CACHED, *CODECS, TAIL, WHOLE)
# The name by which API servers ask an engine for a snapshot.
METHOD = "kvcrush_snapshot"
MOST_CELLS = 2048
MOST_REQUESTS = 100
_MOST_COMPACTIONS = 64
_HISTORY_SECONDS = 300
States: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"
# Clients may write policies as long as they like.
_MOST_LETTERS = 80


def expected_pages(plan: Plan, blocks: int, candidates: int) -> dict[str, int]:
    """Returns how many pages of a compressed region are expected to be in which codec, in slot
    order, before a worker has told.

    Args:
        plan: the plan of the request.
        blocks: blocks of its compressed region.
        candidates: tokens before the tail when it was compacted.
    """
    packings = {packing.codec: packing.pages for packing in plan.packings}
    parts = plan.parts(blocks, candidates)
    if len(parts) < 2:
        last = plan.packings[-1].codec if plan.packings else "raw"
        return {parts[0].codec if parts else last: 1}
    return {
        part.codec: sum(
            heads * cdiv(part.tokens, room) for rank in packings[part.codec] for room, heads in rank
        )
        for part in parts
    }


def region_codecs(pages: Mapping[str, int], blocks: int) -> dict[str, int]:
    """Divides the blocks of a compressed region among codecs as its pages are divided, as pages of
    several codecs may lie in one block. Codecs without a whole block may be left out.

    Args:
        pages: the region's pages in each codec.
        blocks: its blocks.
    """
    total = sum(pages.values())
    # By the largest remainders, so that whole blocks add up.
    exact = {codec: blocks * n / total for codec, n in pages.items()}
    found = {codec: int(share) for codec, share in exact.items()}
    rests = sorted(exact, key=lambda codec: found[codec] - exact[codec])
    for codec in rests[: blocks - sum(found.values())]:
        found[codec] += 1
    return {codec: n for codec, n in found.items() if n}


def cells(states: States) -> tuple[int, list[int]]:
    """Returns how many blocks one cell of the map stands for, and the state that most blocks of
    each cell have.

    Args:
        states: uint8 [blocks], places in `STATES`.
    """
    size = max(1, cdiv(len(states), MOST_CELLS))
    if size == 1:
        return 1, states.tolist()
    padded = np.full(cdiv(len(states), size) * size, len(STATES), dtype=np.uint8)
    padded[: len(states)] = states
    counts = [(padded.reshape(-1, size) == state).sum(axis=1) for state in range(len(STATES))]
    return size, np.argmax(np.stack(counts), axis=0).tolist()


class Observer:
    """Watches one scheduler.

    Args:
        scheduler: the scheduler, whose state is read and never changed.
    """

    def __init__(self, scheduler: KVCrushSchedulerMixin):
        self._scheduler = scheduler
        self._seen = 0
        self._compactions: deque[dict[str, Any]] = deque(maxlen=_MOST_COMPACTIONS)
        self._totals: Counter[str] = Counter()
        self._history: deque[tuple[float, float]] = deque(maxlen=_HISTORY_SECONDS)
        self._next_sample = 0.0
        self._rested = (0.0, 0.0)

    # -- what happens ---------------------------------------------------------------------------

    def compacted(self, command: Compact, freed: int) -> None:
        """Keeps a compaction that was decided.

        Args:
            command: what the workers are told.
            freed: blocks that it returned to the pool.
        """
        tracked = self._scheduler._tracked[command.request_id]
        self._seen += 1
        self._totals[tracked.params.reason] += 1
        self._compactions.append(
            {
                "id": command.request_id,
                "seq": self._seen,
                "time": time.time(),
                "request": tracked.number,
                "policy": _short(tracked.params.policy),
                "reason": tracked.params.reason,
                "tokens": command.computed,
                "blocks_before": len(command.source) + len(command.tail),
                "blocks_after": len(command.target) + len(command.tail),
                "blocks_freed": freed,
                "tokens_evicted": None,
                "seconds": None,
            }
        )

    def moved(self, done: Compacted) -> None:
        """Adds what the workers report of a compaction that was kept before."""
        for event in self._compactions:
            if event["id"] == done.request_id and event["seconds"] is None:
                event["tokens_evicted"] = round(done.evicted)
                event["seconds"] = done.seconds
                return

    def sample(self) -> None:
        """Keeps the pressure of this second, in a step."""
        now = time.time()
        if now >= self._next_sample:
            self._next_sample = now + 1
            self._history.extend(self._since_then())
            self._history.append((now, self._scheduler.pressure_now))

    def rested(self) -> None:
        """Keeps that the engine has nothing to do, until its next step."""
        self._rested = (time.time(), self._scheduler.pressure_now)

    def _since_then(self) -> list[tuple[float, float]]:
        """Returns the sample of an engine that rests since the last one of a step."""
        last = self._history[-1][0] if self._history else 0.0
        return [self._rested] if last < self._rested[0] else []

    # -- what is --------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Returns what the engine holds now; `seconds` in it is what this took."""
        started, now = time.perf_counter(), time.time()
        scheduler = self._scheduler
        most = sorted(scheduler.running, key=self._slots, reverse=True)[:MOST_REQUESTS]
        requests = [self._request(r, now) for r in most if r.request_id in scheduler._tracked]
        snapshot = {
            "time": now,
            "pool": self._pool(),
            "pressure": {
                "now": scheduler.pressure_now,
                "limit": scheduler._settings.pressure,
                "history": [list(sample) for sample in (*self._history, *self._since_then())],
            },
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "requests": sorted(requests, key=lambda r: r["number"]),
            "compactions": {
                "total": dict(self._totals),
                "recent": [
                    {k: v for k, v in event.items() if k != "id"} for event in self._compactions
                ],
            },
        }
        return {**snapshot, "seconds": time.perf_counter() - started}

    def _slots(self, request: Request) -> int:
        return int(request.num_computed_tokens)

    def _pool(self) -> dict[str, Any]:
        states = self._states()
        counts = np.bincount(states, minlength=len(STATES)).tolist()
        size, shown = cells(states)
        runs = [[STATES[s], len(list(same))] for s, same in itertools.groupby(shown)]
        return {
            "blocks": len(states),
            "block_size": self._scheduler._manager.block_size,
            "block_bytes": self._scheduler._block_bytes,
            "counts": dict(zip(STATES, counts, strict=True)),
            "cell_blocks": size,
            "map": runs,
        }

    def _states(self) -> States:
        """Returns the state of each block but vLLM's null block, by its place in `STATES`."""
        place = {name: i for i, name in enumerate(STATES)}
        # In passes that do one thing each, as a pool may have a hundred thousand blocks.
        blocks = self._scheduler.kv_cache_manager.block_pool.blocks
        used = np.array([block.ref_cnt for block in blocks]) > 0
        hashed = np.array([block.block_hash is not None for block in blocks])
        states = np.where(hashed & ~used, place[CACHED], place[FREE]).astype(np.uint8)
        for request_id, held in self._scheduler._manager.req_to_blocks.items():
            codecs = self._scheduler._codecs(request_id)
            own = np.full(len(held), place[TAIL if codecs else WHOLE], dtype=np.uint8)
            at = 0
            for codec, count in codecs.items():
                own[at : at + count] = place[codec]
                at += count
            ids = [block.block_id for block in held]
            states[ids] = np.maximum(states[ids], own)
        return states[1:]

    def _request(self, request: Request, now: float) -> dict[str, Any]:
        scheduler, request_id = self._scheduler, request.request_id
        tracked, plan = scheduler._tracked[request_id], scheduler._plans.get(request_id)
        held = scheduler._held_report(request)
        assert held is not None
        size, codecs = held["kv_block_bytes"], scheduler._codecs(request_id)
        rest = held["kv_blocks_held"] - sum(codecs.values())
        return {
            "number": tracked.number,
            "seconds": max(0.0, now - request.arrival_time),
            "phase": "prefill"
            if request.num_computed_tokens < request.num_prompt_tokens
            else "decode",
            "prompt_tokens": request.num_prompt_tokens,
            "tokens_held": held["kv_tokens_held"],
            "tokens_raw": held["kv_tokens_raw"],
            "bytes_held": held["kv_blocks_held"] * size + held["kv_side_bytes"],
            "bytes_raw": cdiv(held["kv_tokens_raw"], held["kv_block_size"]) * size,
            "blocks": {**codecs, TAIL if codecs else WHOLE: rest},
            "policy": _short(held["policy"]),
            "budget": tracked.params.budget if plan is not None else 1.0,
            "reason": tracked.params.reason if plan is not None else None,
            "level": tracked.level if tracked.params.elastic and plan is not None else None,
            "levels": pressure.levels(plan)
            if tracked.params.elastic and plan is not None
            else None,
            "compactions": tracked.compactions,
            "policy_failures": tracked.policy_failures,
            "put_off": tracked.deferred.reason if tracked.deferred else None,
        }


def _short(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 1]}…"


def install() -> None:
    """Lets API servers ask this process's engine for a snapshot, by vLLM's own calls of its
    methods."""
    from vllm.v1.engine.core import EngineCore

    def kvcrush_snapshot(self: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.scheduler.observer.snapshot()
        return found

    setattr(EngineCore, METHOD, kvcrush_snapshot)
