"""Times the plugin's own maths at a compaction, layer by layer: what faster operations behind the
same names are compared with. Reading and writing pages is not part of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from benchmarks.kernels.cases import PAGE, Case
from benchmarks.kernels.timing import Parts, now, since, turns
from vllm_kvcrush import policies
from vllm_kvcrush.ops import cpu
from vllm_kvcrush.plan import Plan
from vllm_kvcrush.policies import choice
from vllm_kvcrush.policies.base import View

BUDGET = 0.25
POLICIES = ("streaming", "snapkv", "h2o", "kvcrush")
STAGES = ("score", "select", "total")


def plan(context: int) -> Plan:
    """Returns the plan of a prompt of `context` tokens at the default settings."""
    return Plan(BUDGET, context, PAGE)


class Layers:
    """The cache, in float32, of `sets` layers of one request whose prompt, `case.lengths[0]`
    tokens, has just ended, and its queries."""

    def __init__(self, case: Case, working_set: int):
        (held,) = case.lengths
        shape = case.shape
        self._plan, self._held = plan(held), held
        _, tail = self._plan.shape(held, held)
        self.candidates = held - tail
        self.keep = self._plan.held_after(held, held) - tail
        self.sets = math.ceil(working_set / (case.float32_bytes // 2))  # only keys are read
        table = torch.arange(math.ceil(held / PAGE), dtype=torch.int32)
        pool = torch.empty(len(table), self.sets, shape.kv_heads, PAGE, 2 * shape.head_size)
        self._layers = [
            cpu.Layer(
                pool,
                index=index,
                layers=self.sets,
                heads=shape.heads,
                kv_heads=shape.kv_heads,
                k_size=shape.head_size,
                v_size=shape.head_size,
                block_size=PAGE,
                dtype=pool.dtype,
                scale=shape.scale,
            )
            for index in range(self.sets)
        ]
        self._source = cpu.Source(None, table, held, 0, PAGE)
        for layer, contents in zip(self._layers, case.contents(self.sets), strict=True):
            rows = case.tokens(case.keys, contents[0], held).transpose(0, 1).contiguous()
            cpu.store(layer, rows, rows, torch.arange(held))
        # [heads, window, head_size]
        self._queries = case.queries[-self._plan.window :].transpose(0, 1).contiguous()

    def view(self, index: int, needs: frozenset[str]) -> View:
        """Returns what a policy with these needs sees of layer `index`."""
        layer = self._layers[index]
        assert needs <= {"queries", "state"}
        attention = torch.zeros(layer.kv_heads, self.candidates)
        return View(
            held=cpu.LayerKV(layer, self._source, self._held),
            queries=self._queries if "queries" in needs else None,
            scale=layer.scale,
            candidates=self.candidates,
            sinks=self._plan.sinks,
            page_size=PAGE,
            state={"attention": attention} if "state" in needs else {},
            layer=index,
            all_heads=lambda x: x,
        )

    def compact(self, policy: policies.Policy, index: int, spent: Parts) -> torch.Tensor:
        """Returns the slots of layer `index` that stay; adds the seconds of each stage to
        `spent`."""
        view, began = self.view(index, policy.needs), now()
        scores, _ = choice.scored(policy, view)
        scored, middle = since(began), now()
        kept = policy.select(view, scores, torch.full((view.num_kv_heads,), self.keep))
        selected, total = since(middle), since(began)
        for stage, seconds in zip(STAGES, (scored, selected, total), strict=True):
            wall, cpu = spent.get(stage, (0.0, 0.0))
            spent[stage] = (wall + seconds[0], cpu + seconds[1])
        return kept


class CompactionBurst:
    """Compactions of one policy, layer after layer, for about `seconds`."""

    def __init__(
        self,
        layers: Layers,
        name: str,
        seconds: float,
        flush: Callable[[], None] | None = None,
    ):
        self._layers, self._policy, self._next = layers, policies.get(name), 0
        self._times, self._flush = 1, flush
        self()
        self._times = turns(seconds, self()["total"][0], layers.sets, flush)

    @torch.inference_mode()
    def __call__(self) -> Parts:
        spent: Parts = {}
        if self._flush is not None:
            self._flush()
        for _ in range(self._times):
            self._layers.compact(self._policy, self._next, spent)
            self._next = (self._next + 1) % self._layers.sets
        return {k: (w / self._times, c / self._times) for k, (w, c) in spent.items()}
