"""Policies on the cache of a real model: what a compaction of a layer costs, and what it keeps."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.codecs.model import Cache, Coded
from vllm_kvcrush import ops, policies
from vllm_kvcrush.codecs.transform.calibrate import Probe
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.engine.worker.allocation import page_counts
from vllm_kvcrush.engine.worker.repeat import CHUNK, passes
from vllm_kvcrush.ops import cpu
from vllm_kvcrush.plan import Plan
from vllm_kvcrush.policies.base import Room, View
from vllm_kvcrush.policies.choice import allocated, choose, demanded, scored

PAGE = 32


class Division(NamedTuple):
    """How a request's pages are divided.

    Attributes:
        room: the pages; None where all heads keep equally many tokens.
        demands: what the policy said about every layer, [L, H], or None.
        keep: int64 [L, H], tokens that each head keeps.
        seconds: processor time that dividing took, beside the layers' scores and demands.
    """

    room: Room | None
    demands: Tensor | None
    keep: Tensor
    seconds: float


class Compaction:
    """The compaction at the end of a prompt, as the plan has it at the default settings.

    Args:
        cache: what the model holds of the prompt.
        rope: its rotary embedding.
        budget: share of the prompt's tokens.
        received: [L, H, n], what `received` returns, for policies that need it.
    """

    def __init__(
        self, cache: Cache, rope: Rope, budget: float, received: Tensor | None = None
    ) -> None:
        self._cache, self._rope, self._received = cache, rope, received
        n = cache.length
        self._plan = Plan(budget, n, PAGE)
        _, self.tail = self._plan.shape(n, n)
        self.candidates = n - self.tail
        self.keep = self._plan.held_after(n, n) - self.tail

    def view(self, layer: int, policy: policies.Policy, held: Any) -> View:
        """Returns what a policy sees of a layer, of which `held` has keys and values."""
        layers, heads = self._cache.keys.shape[:2]
        m, queries = self.candidates, self._cache.queries[layer, :, -self._plan.window :]
        received = None if self._received is None else self._received[layer, :, :m]
        where = torch.arange(m, dtype=torch.int32).expand(heads, -1)
        return View(
            held=held,
            queries=queries if "queries" in policy.needs else None,
            scale=self._rope.size**-0.5,
            candidates=m,
            sinks=self._plan.sinks,
            page_size=PAGE,
            layer=layer,
            layers=layers,
            all_heads=lambda x: x,
            true_positions=where if "positions" in policy.needs or policy.merges else None,
            rope=self._rope,
            computed=self._cache.length,
            repeated=received if "repeat" in policy.needs else None,
        )

    def held(self, layer: int) -> ops.LayerKV:
        """Returns what is held of a layer, in plain tensors."""
        return ops.LayerKV(self._cache.keys[layer], self._cache.values[layer])

    def division(self, policy: policies.Policy, held: Callable[[int], Any]) -> Division:
        """Returns how a policy divides the pages among layers and heads, as the engine has it.

        Args:
            held: returns the keys and values of a layer.
        """
        layers, heads = self._cache.keys.shape[:2]
        keep = torch.full((layers, heads), self.keep)
        if not policy.allocates:
            return Division(None, None, keep, 0.0)
        pages = torch.full_like(keep, PAGE)
        room = Room(int(keep.sum()) // PAGE, pages, torch.full_like(keep, self.candidates))
        found = []
        for layer in range(layers):
            view = self.view(layer, policy, held(layer))
            demand = demanded(policy, view, scored(policy, view)[0], room)
            found += [] if demand is None else [demand]
        demands = torch.stack(found) if found else None
        began = time.process_time()
        least = np.full((layers, heads), math.ceil(self._plan.sinks / PAGE))
        counts = torch.from_numpy(page_counts(allocated(policy, demands, room), room, least))
        spent = time.process_time() - began
        return Division(room, demands, (counts * PAGE).clamp(max=self.candidates), spent)

    @torch.inference_mode()
    def coded(self, name: str) -> Coded:
        """Returns the cache with what a policy keeps."""
        policy, m = policies.get(name), self.candidates
        keys, values = self._cache.keys.clone(), self._cache.values.clone()
        kept = torch.ones(keys.shape[:3], dtype=torch.bool)
        bias = torch.zeros(keys.shape[:3])

        division = self.division(policy, self.held)
        for layer in range(len(keys)):
            view = replace(self.view(layer, policy, self.held(layer)), demands=division.demands)
            choice = choose(policy, view, division.keep[layer])
            if not choice.sound:
                raise ValueError(f"{name} did not choose in layer {layer}")
            if choice.merged is not None:
                keys[layer, :, :m], values[layer, :, :m] = choice.merged[:2]
                if choice.merged.log_bias is not None:
                    bias[layer, :, :m] = choice.merged.log_bias
            kept[layer, :, :m] = choice.kept
        return Coded(keys, values, {}, kept, bias if bool(bias.any()) else None)


@torch.inference_mode()
def received(probe: Probe, tokens: Sequence[int]) -> Tensor:
    """Returns the greatest attention that each token of a context receives while the model repeats
    it, [L, H, n], as the engine's second pass finds it."""
    n, scale = len(tokens), probe.rope.size**-0.5
    encode = functools.partial(probe.tokenizer.encode, add_special_tokens=False)
    found = []
    for own in passes(encode, list(tokens), 0, n, n + CHUNK):
        queries, keys, values = probe.prefill([*tokens, *own.tokens])
        weights = [
            ops.attend_and_score(
                *(x[:, n:].transpose(0, 1) for x in (q, k, v)), (k[:, :n], v[:, :n]), scale
            )[1]
            for q, k, v in zip(queries, keys, values, strict=True)
        ]
        found.append(torch.stack(weights)[:, :, own.first : own.end])
    return torch.cat(found, 2)


class Pages:
    """One layer's tokens in raw pages, read as the engine reads them: whatever a policy copies is
    part of what it costs."""

    def __init__(self, keys: Tensor, values: Tensor, heads: int) -> None:
        kv_heads, n, size = keys.shape
        table = torch.arange(math.ceil(n / PAGE), dtype=torch.int32)
        self._layer = cpu.Layer(
            torch.zeros(len(table), 1, kv_heads, PAGE, 2 * size),
            index=0,
            layers=1,
            heads=heads,
            kv_heads=kv_heads,
            k_size=size,
            v_size=size,
            block_size=PAGE,
            dtype=torch.float32,
            scale=size**-0.5,
        )
        rows = (x.transpose(0, 1).contiguous() for x in (keys, values))
        cpu.store(self._layer, *rows, torch.arange(n))
        self._source, self._n = cpu.Source(None, table, n, 0, PAGE), n

    def held(self) -> cpu.LayerKV:
        """Returns the tokens, of which nothing is copied yet."""
        return cpu.LayerKV(self._layer, self._source, self._n)


@torch.inference_mode()
def seconds(
    compaction: Compaction, pages: dict[int, Pages], name: str, rounds: int
) -> Iterator[float]:
    """Yields the processor time of one layer's choice, with its share of what dividing the pages
    takes, for each layer and round after a first one that does not count."""
    policy = policies.get(name)
    division = compaction.division(policy, compaction.held)
    for turn in range(rounds + 1):
        for layer, own in pages.items():
            view = compaction.view(layer, policy, own.held())
            began = time.process_time()
            given = scored(policy, view)
            if division.room is not None:
                demanded(policy, view, given[0], division.room)
                view = replace(view, demands=division.demands)
            choose(policy, view, division.keep[layer], given=given)
            if turn:
                yield time.process_time() - began + division.seconds / len(division.keep)
