"""The plugin's own maths at a compaction, layer by layer: what faster operations behind the same
names are compared with. Reading and writing pages is not part of it."""

from __future__ import annotations

import math

import torch

from benchmarks.kernels.cases import PAGE, Case
from benchmarks.kernels.timing import Parts, now, since
from vllm_kvcrush import policies
from vllm_kvcrush.plan import Plan
from vllm_kvcrush.policies.base import View

BUDGET = 0.25
POLICIES = ("streaming", "snapkv", "h2o", "kvcrush")
STAGES = ("score", "select", "total")


def plan(context: int) -> Plan:
    """The plan of a prompt of `context` tokens at the default settings."""
    return Plan(BUDGET, context, PAGE)


class Layers:
    """Keys and queries of `sets` layers of one request whose prompt, `case.lengths[0]` tokens,
    has just ended. All in float32, as the engine hands them to a policy on the CPU."""

    def __init__(self, case: Case, working_set: int):
        (held,) = case.lengths
        self._plan, self._scale = plan(held), case.shape.scale
        _, tail = self._plan.shape(held, held)
        self.candidates = held - tail
        self.keep = self._plan.held_after(held, held) - tail
        self.sets = math.ceil(working_set / (case.float32_bytes // 2))
        # [kv_heads, held, head_size] each
        self.keys = [
            case.tokens(case.keys, contents[0], held).clone()
            for contents in case.contents(self.sets)
        ]
        # [heads, window, head_size]
        self._queries = case.queries[-self._plan.window :].transpose(0, 1).contiguous()

    def view(self, index: int, needs: frozenset[str]) -> View:
        """What a policy with these needs sees of layer `index`."""
        keys = self.keys[index]
        assert needs <= {"queries", "running"}
        return View(
            keys=keys,
            values=None,
            queries=self._queries if "queries" in needs else None,
            scale=self._scale,
            candidates=self.candidates,
            sinks=self._plan.sinks,
            page_size=PAGE,
            running=keys.new_zeros(len(keys), self.candidates) if "running" in needs else None,
            layer=index,
            all_heads=lambda x: x,
        )

    def compact(self, policy: policies.Policy, index: int, spent: Parts) -> torch.Tensor:
        """The slots of layer `index` that stay; adds the seconds of each stage to `spent`."""
        view, began = self.view(index, policy.needs), now()
        scores = policy.score(view)
        scored, middle = since(began), now()
        kept = policy.select(view, scores, self.keep)
        selected, total = since(middle), since(began)
        for stage, seconds in zip(STAGES, (scored, selected, total), strict=True):
            wall, cpu = spent.get(stage, (0.0, 0.0))
            spent[stage] = (wall + seconds[0], cpu + seconds[1])
        return kept


class CompactionBurst:
    """Compactions of one policy, layer after layer, for about `seconds`."""

    def __init__(self, layers: Layers, name: str, seconds: float):
        self._layers, self._policy, self._next = layers, policies.get(name), 0
        self._times = 1
        self()
        self._times = max(1, math.ceil(seconds / self()["total"][0]))

    @torch.inference_mode()
    def __call__(self) -> Parts:
        spent: Parts = {}
        for _ in range(self._times):
            self._layers.compact(self._policy, self._next, spent)
            self._next = (self._next + 1) % self._layers.sets
        return {k: (w / self._times, c / self._times) for k, (w, c) in spent.items()}
