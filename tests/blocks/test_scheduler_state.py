"""Random lives of requests, through the real schedulers and block manager.

Hypothesis admits, steps, aborts and preempts; `paged_worker.PagedWorker` does with each
`SchedulerOutput` what a worker does. After every step block counts, prefix cache and slots must
agree, and the design's bound must hold.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import pickle
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_block_hash,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.pairwise import FULL, parametrize
from vllm_kvcrush.codecs import FITTED
from vllm_kvcrush.config import CANARY_KEY, Settings
from vllm_kvcrush.engine import canaries
from vllm_kvcrush.engine.blocks import Deferred, Job, KVCrushSpec
from vllm_kvcrush.engine.commands import Compact
from vllm_kvcrush.engine.pressure import shape_at
from vllm_kvcrush.engine.scheduler import KVCrushAsyncScheduler, KVCrushScheduler
from vllm_kvcrush.plan import cdiv

from .paged_worker import STOP_TOKEN, PagedWorker

MAX_MODEL_LEN = 1024
FREE_STATES = ("free", "cached")
POLICIES = (
    "streaming",
    "snapkv",
    "h2o",
    "kvcrush",
    "int8",
    "int4",
    "tc4",
    "tc6",
    "tc8",
    "auto",
    "mikv",
)
# Head sizes and bytes of a channel, which decide how many tokens a packed block holds.
PAGE = [64, 64, 4]


def fitted(block_size: int) -> dict[str, Any]:
    """Returns what the heads of two ranks, three on each, hold in pages of the codecs with tables,
    as `Settings.fitted`."""
    tc4 = [[(24, 2), (40, 1)], [(32, 3)]]
    tc6 = [[(32, 1), (48, 2)], [(40, 2), (56, 1)]]
    tc8 = [[(48, 1), (57, 2)], [(48, 2), (96, 1)]]
    return {
        codec: [[(room * block_size // 8, heads) for room, heads in rank] for rank in ranks]
        for codec, ranks in (("tc4", tc4), ("tc6", tc6), ("tc8", tc8))
    }


init_none_hash(sha256)


@functools.cache
def base_config(asynchronous: bool) -> tuple[VllmConfig, StructuredOutputManager]:
    """Returns the configuration of a model that is never built."""
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "max_position_embeddings": MAX_MODEL_LEN,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(model))
        model_config = ModelConfig(
            model=folder,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=MAX_MODEL_LEN,
        )
    config = VllmConfig(
        model_config=model_config,
        scheduler_config=SchedulerConfig(
            max_model_len=MAX_MODEL_LEN,
            is_encoder_decoder=False,
            async_scheduling=asynchronous,
        ),
        cache_config=CacheConfig(block_size=16),
    )
    return config, StructuredOutputManager(config)


def tree_prompt(path: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the prompt along a path in a small tree of texts, given (branch, tokens) by level."""
    tokens = []
    for level, (branch, length) in enumerate(path):
        tokens += [2 + (i * (3 + branch) + 5 * branch + level) % 17 for i in range(length)]
    return tokens


prompts = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([1, 7, 16, 33, 64, 80, 150])),
    min_size=1,
    max_size=3,
).map(tree_prompt)
budgets = st.one_of(
    st.none(),
    st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]),
    st.integers(0, 10),  # blocks above the smallest absolute budget
)
asked_policies = st.sampled_from([None, "none", *POLICIES])


class SchedulerMachine(RuleBasedStateMachine):
    scheduler_class: type = KVCrushScheduler
    ahead = 0  # steps that may be in flight when the next one is scheduled

    @initialize(
        block_size=st.sampled_from([8, 16]),
        num_blocks=st.integers(24, 40),
        chunk=st.sampled_from([16, 40, 64, 256]),
        seqs=st.integers(2, 6),
        window=st.sampled_from([1, 4, 8, 16, 24]),
        sinks=st.sampled_from([0, 4, 20]),
        prefill_interval=st.sampled_from([16, 32, 64]),
        decode_interval=st.sampled_from([1, 5, 8, 24]),
        min_tokens=st.sampled_from([0, 0, 60, 150]),
        policy=st.sampled_from([*POLICIES, "none"]),
        budget=st.sampled_from([0.1, 0.25, 0.5, 0.9, 1.0, 112]),
        prefix_caching=st.sampled_from([True, True, True, False]),
        tables=st.sampled_from([True, True, True, False]),
        pressure=st.sampled_from([None, None, 0.5, 0.8, 1.0]),
        seed=st.integers(0, 99),
    )
    def start(
        self,
        block_size: int,
        num_blocks: int,
        chunk: int,
        seqs: int,
        prefix_caching: bool,
        seed: int,
        policy: str,
        budget: float | int,
        tables: bool = True,
        min_tokens: int = 0,
        pressure: float | None = None,
        **config: int,
    ) -> None:
        # Without tables auto takes other codecs, and the fitted policies do not start.
        policy = policy if tables or policy not in FITTED else "auto"
        self.settings = Settings.from_dict(
            {
                "policy": policy,
                "budget": budget,
                "min_tokens": min_tokens,
                "pressure": pressure,
                "live_page": True,
                "canary": 1.0,
                "config": config,
                "page": PAGE,
                "fitted": fitted(block_size) if tables else {},
            }
        )
        self.settings.check(block_size, MAX_MODEL_LEN)
        vllm_config, structured = base_config(self.ahead > 0)
        vllm_config.additional_config = {"kvcrush": self.settings.to_dict()}
        vllm_config.scheduler_config.max_num_batched_tokens = chunk
        vllm_config.scheduler_config.max_num_seqs = seqs
        vllm_config.cache_config.block_size = block_size
        vllm_config.cache_config.num_gpu_blocks = num_blocks
        vllm_config.cache_config.enable_prefix_caching = prefix_caching
        spec = KVCrushSpec(block_size=block_size, num_kv_heads=1, head_size=8, dtype="float32")
        self.scheduler = self.scheduler_class(
            vllm_config=vllm_config,
            kv_cache_config=KVCacheConfig(
                num_blocks=num_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=structured,
            block_size=block_size,
        )
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.hasher = get_request_block_hasher(block_size, sha256)
        self.manager = self.scheduler._manager
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.worker = PagedWorker(num_blocks, block_size, self.settings, seed)
        self.in_flight: list[tuple[Any, dict[str, list[int]]]] = []
        self.texts: list[list[int]] = [[2] * 40]
        self.added = 0
        # Canaries that nobody aborted and that have no answer yet.
        self.canaries: set[str] = set()
        # Token prefixes by block hash: the numbers that a block with this hash must hold.
        self.meaning: dict[bytes, list[int]] = {}
        self.meanings_known: dict[str, int] = {}
        # Requests that passed a compaction position uncompacted in this admission.
        self.overdue: set[str] = set()
        self.compact = self.manager.compact
        self.manager.compact = self.watch_compact
        self.compact_due = self.scheduler._compact_due
        self.scheduler._compact_due = self.watch_compact_due
        self.since_drain = 0
        self.failed = False

    # -- what may happen --------------------------------------------------------------------------

    @rule(
        prompt=prompts,
        max_tokens=st.sampled_from([1, 9, 40, 90, 150]),
        policy=asked_policies,
        budget=budgets,
        copies=st.sampled_from([1, 1, 2, 4]),
    )
    def admit(
        self,
        prompt: list[int],
        max_tokens: int,
        policy: str | None,
        budget: float | int | None,
        copies: int,
    ) -> None:
        extra: dict[str, Any] = {}
        if policy in FITTED and not self.settings.fitted:
            policy = "auto"
        if policy is not None:
            extra["kv_policy"] = policy
        # A budget without a policy is a client's error, which is refused before the engine.
        if budget is not None and (policy or self.settings.policy) != "none":
            if isinstance(budget, int):
                budget = self.settings.smallest_budget(self.block_size) + budget * self.block_size
            extra["kv_budget"] = budget
        params = self.settings.validate_request(extra, self.block_size, MAX_MODEL_LEN)
        max_tokens = min(max_tokens, (self.num_blocks - 1) * self.block_size - 1)

        def fits(length: int) -> bool:
            plan = self.settings.plan(params, length, self.block_size)
            return plan.bound(length + max_tokens) < self.num_blocks

        while not fits(len(prompt)):
            prompt = prompt[:-1]
        self.texts.append(prompt)
        for _ in range(copies):
            self.added += 1
            request = Request(
                request_id=f"r{self.added}",
                prompt_token_ids=list(prompt),
                sampling_params=SamplingParams(
                    max_tokens=max_tokens, stop_token_ids=[STOP_TOKEN], extra_args=extra or None
                ),
                pooling_params=None,
                block_hasher=self.hasher,
            )
            self.scheduler.add_request(request)

    @rule(
        which=st.integers(0, 9),
        more=st.sampled_from([0, 1, 24]),
        max_tokens=st.sampled_from([1, 9, 40, 90]),
        policy=asked_policies,
        budget=budgets,
    )
    def admit_again(
        self,
        which: int,
        more: int,
        max_tokens: int,
        policy: str | None,
        budget: float | int | None,
    ) -> None:
        """Admits the same prompt again, or the next turn of a conversation."""
        text = self.texts[-1 - which % len(self.texts)]
        self.admit(text + [3] * more, max_tokens, policy, budget, copies=1)

    @rule(which=st.integers(0, 9), scored=st.sampled_from([1, 9, 32]))
    def send_canary(self, which: int, scored: int) -> None:
        """Scores the last tokens of a text, such as a request's that has ended."""
        text = self.texts[-1 - which % len(self.texts)]
        if not scored < len(text) < MAX_MODEL_LEN:
            return
        self.added += 1
        request = Request(
            request_id=f"canary{self.added}",
            prompt_token_ids=list(text),
            sampling_params=SamplingParams(
                max_tokens=1,
                prompt_logprobs=1,
                skip_reading_prefix_cache=False,
                extra_args={CANARY_KEY: scored},
            ),
            pooling_params=None,
            block_hasher=self.hasher,
        )
        self.canaries.add(request.request_id)
        self.scheduler.add_request(request)

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @precondition(lambda self: self.in_flight)
    @rule()
    def deliver(self) -> None:
        output, sampled = self.in_flight.pop(0)
        ids = list(output.num_scheduled_tokens)
        results = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
                sampled_token_ids=[list(sampled[request_id]) for request_id in ids],
            ),
        )
        for told in (told for result in results.values() for told in result.outputs):
            if told.request_id.startswith("canary") and told.finished:
                self.canaries.remove(told.request_id)  # told once
        self.check_pool()

    @precondition(lambda self: self.scheduler.requests)
    @rule(which=st.integers(0, 9))
    def abort(self, which: int) -> None:
        requests = list(self.scheduler.requests.values())
        request = requests[which % len(requests)]
        self.texts.append(list(request.all_token_ids))
        self.canaries.discard(request.request_id)
        self.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
        self.check_pool()

    @rule(running=st.booleans())
    def reset_prefix_cache(self, running: bool) -> None:
        self.scheduler.reset_prefix_cache(reset_running_requests=running)
        self.check_pool()

    @precondition(lambda self: self.since_drain > 40)
    @rule()
    def drain(self) -> None:
        """Asserts that every admitted request finishes (liveness)."""
        self.since_drain = 0
        requests = self.scheduler.requests.values()
        limit = 100 + sum(r.num_prompt_tokens + 4 * r.max_tokens for r in requests)
        taken = idle = 0
        while self.scheduler.has_requests():
            idle = 0 if self.step() or self.in_flight else idle + 1
            taken += 1
            assert idle < 3, "requests wait, and nothing is scheduled"
            assert taken < limit, f"no end after {taken} steps"
        while self.in_flight:
            self.deliver()
        self.check_idle()

    def teardown(self) -> None:
        if getattr(self, "failed", True):
            return
        if self.added % 2:
            self.canaries -= set(self.scheduler.requests)
            self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
        self.drain()

    # -- one step ---------------------------------------------------------------------------------

    def counted(self) -> int:
        """Compactions that the scheduler has counted since its stats were last taken."""
        policies = self.scheduler.kvcrush_stats.policies.values()
        return sum(sum(own.compactions.values()) for own in policies)

    def step(self) -> int:
        """Schedules and executes a step, and delivers the outputs of earlier steps that are due."""
        self.failed = True
        self.since_drain += 1
        while len(self.in_flight) > self.ahead:
            self.deliver()
        due = self.due_now()
        running = {r.request_id for r in self.scheduler.running}
        counted = self.counted()
        output = self.scheduler.schedule()
        commands = pickle.loads(pickle.dumps(output.kvcrush))
        compacted = {c.request_id for c in commands.commands}
        assert len(compacted) == len(commands.commands)
        # Those that a preemption took back are not counted.
        assert self.counted() - counted == len(commands.commands)
        owners = Counter(command.target for command in commands.commands)
        for command in commands.commands:
            self.check_command(command, due, owners[command.target])
        self.check_canaries(output)
        self.learn_hashes()
        late = [r for r, tracked in self.scheduler._tracked.items() if tracked.deferred]
        sampled = self.worker.execute(output, commands, late)
        preempted = set(output.preempted_req_ids or ())
        self.overdue |= due
        self.overdue &= running - compacted - preempted
        self.overdue -= {r for r in self.overdue if not self.is_due(r)}
        for request_id in self.overdue:
            assert self.scheduler._tracked[request_id].deferred, f"{request_id} was forgotten"
        self.in_flight.append((output, sampled))
        self.check_pool()
        self.check_writes()
        self.check_requests()
        self.failed = False
        return output.total_num_scheduled_tokens

    def check_canaries(self, output: Any) -> None:
        """Asserts that a canary is alone, takes short steps, and finds no token in the prefix cache
        that is to be scored."""
        ids = [r for r in self.scheduler.requests if r.startswith("canary")]
        assert set(self.scheduler._canaries) == set(ids)
        if not ids:
            return
        assert len(self.scheduler.requests) == 1
        assert set(output.num_scheduled_tokens) <= set(ids) and not output.kvcrush.commands
        assert output.total_num_scheduled_tokens <= canaries.MOST_TOKENS
        for new in output.scheduled_new_reqs:
            scored = self.scheduler._canaries[new.req_id]
            assert new.num_computed_tokens <= len(new.prompt_token_ids) - scored - 1

    def elastic(self, request_id: str) -> bool:
        """Whether a request is compacted under pressure only."""
        return request_id in self.scheduler._plans and (
            self.scheduler._tracked[request_id].params.elastic
        )

    def is_due(self, request_id: str) -> bool:
        plan, request = self.scheduler._plans[request_id], self.scheduler.requests[request_id]
        n = self.worker.rows[request_id].computed
        assert n == request.num_computed_tokens
        return plan.due(n, n - self.worker.rows[request_id].shift)

    def due_now(self) -> set[str]:
        """Returns the requests that are at a compaction position with too many blocks."""
        return {
            r.request_id
            for r in self.scheduler.running
            if (plan := self.scheduler._plans.get(r.request_id))
            and not self.elastic(r.request_id)
            and plan.is_check(r.num_computed_tokens)
            and self.is_due(r.request_id)
        }

    def watch_compact(self, jobs: Sequence[Job]) -> list[Compact] | Deferred:
        """Calls `KVCrushManager.compact`, and asserts that it gives back blocks or changes
        nothing."""

        def state() -> Any:
            lists = {k: [b.block_id for b in v] for k, v in self.manager.req_to_blocks.items()}
            hashes = [b.block_hash for b in self.pool.blocks]
            return lists, hashes, dict(self.manager.slot_shift), self.pool.get_num_free_blocks()

        before = state()
        result = self.compact(jobs)
        if isinstance(result, Deferred):
            assert state() == before
            owners = Counter(b for blocks in before[0].values() for b in blocks)
            ends = {j.request_id: (j.held - j.shape.tail_tokens) // self.block_size for j in jobs}
            shared = [r for r, end in ends.items() for b in before[0][r][:end] if owners[b] > 1]
            assert shared, f"{list(ends)} share nothing, and were put off"
        else:
            assert self.pool.get_num_free_blocks() > before[3]
            for command in result:
                lost = [i for i in command.target if i in command.source and before[1][i]]
                fresh = set(command.target) - set(command.source)
                assert not lost or len(jobs) > 1 or len(fresh) == before[3], (
                    f"blocks {lost} left the prefix cache while others were free"
                )
        return result

    def watch_compact_due(self) -> list[Compact]:
        """Calls `_compact_due`, and asserts that requests that wait for each other to give up
        blocks are compacted together."""
        result = self.compact_due()
        owners = Counter(b.block_id for v in self.manager.req_to_blocks.values() for b in v)
        released: Counter[int] = Counter()
        waiting = wanted = 0
        for request_id, tracked in self.scheduler._tracked.items():
            blocks = self.manager.req_to_blocks.get(request_id)
            if not tracked.deferred or not blocks:
                continue
            plan, n = self.scheduler._plans[request_id], self.worker.rows[request_id].computed
            shape = plan.shape(n, n - self.worker.rows[request_id].shift)
            if self.elastic(request_id):
                shape = shape_at(self.scheduler._holder(request_id, n), tracked.level)
            end = len(blocks) - cdiv(shape.tail_tokens, self.block_size)
            released.update(b.block_id for b in blocks[:end])
            waiting, wanted = waiting + 1, wanted + shape.compressed
        if waiting > 1 and self.pool.get_num_free_blocks() >= wanted:
            gained = sum(owners[b] == count for b, count in released.items())
            assert gained <= wanted, f"{waiting} requests could have been compacted together"
        return result

    def check_command(self, command: Compact, due: set[str], twins: int) -> None:
        request_id = command.request_id
        if self.elastic(request_id):
            assert self.settings.pressure is not None
            assert self.scheduler.kvcrush_stats.pressure > self.settings.pressure
            # Nobody is squeezed below the budget.
            plan, n = self.scheduler._plans[request_id], command.computed
            least = plan.blocks(n) - len(command.tail)
            if plan.packings:
                least = min(least, plan.packings[0].blocks(n - command.tail_tokens))
            assert len(command.target) >= least
        else:
            assert request_id in due or request_id in self.overdue, (
                f"{request_id} was compacted at {command.computed}, which is no compaction position"
            )
        for i in command.target:
            block = self.pool.blocks[i]
            assert block.ref_cnt == twins and block.block_hash is None, block

    # -- what must hold ---------------------------------------------------------------------------

    def learn_hashes(self) -> None:
        size = self.block_size
        for request_id, request in self.scheduler.requests.items():
            known = self.meanings_known.get(request_id, 0)
            if known < len(request.block_hashes):
                chain = self.worker.prefixes.chain(request.all_token_ids)
                for i in range(known, len(request.block_hashes)):
                    self.meaning[request.block_hashes[i]] = chain[i * size : (i + 1) * size]
                self.meanings_known[request_id] = len(request.block_hashes)

    def check_pool(self) -> None:
        """Asserts that owners, free queue and prefix cache agree with each other and with the
        slots."""
        owners = Counter(b.block_id for v in self.manager.req_to_blocks.values() for b in v)
        free = [b.block_id for b in self.pool.free_block_queue.get_all_free_blocks()]
        assert len(free) == len(set(free)) == self.pool.get_num_free_blocks()
        assert set(free) == {b.block_id for b in self.pool.blocks[1:] if not owners[b.block_id]}
        assert 0 not in owners
        cached = self.pool.cached_block_hash_to_block
        hashed = 0
        self.learn_hashes()
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == owners[block.block_id], block
            if block.block_hash is not None:
                hashed += 1
                assert cached.contain(block.block_hash, block.block_id)
                expected = self.meaning[get_block_hash(block.block_hash)]
                assert self.worker.slots[block.block_id] == expected, (
                    f"block {block.block_id} is in the prefix cache with other contents"
                )
        self.check_map(len(free), hashed)
        entries = (v if isinstance(v, dict) else [v] for v in cached._cache.values())
        assert sum(len(e) for e in entries) == hashed

    def check_map(self, free: int, hashed: int) -> None:
        """Asserts that the live page's map adds up to the pool."""
        shown = self.scheduler.observer.snapshot()
        counts = shown["pool"]["counts"]
        assert sum(counts.values()) == self.num_blocks - 1 == shown["pool"]["blocks"]
        assert counts["free"] + counts["cached"] == free
        lists = self.manager.req_to_blocks.values()
        held = {b.block_id for blocks in lists for b in blocks if b.block_hash}
        assert counts["cached"] == hashed - len(held)
        cells = Counter()
        for state, length in shown["pool"]["map"]:
            cells[state] += length
        assert dict(cells) == {state: n for state, n in counts.items() if n}
        assert {r["number"] for r in shown["requests"]} == {
            self.scheduler._tracked[r.request_id].number for r in self.scheduler.running
        }
        # A block that several hold is one of the pool's, and one of each of theirs.
        theirs = Counter()
        for request in shown["requests"]:
            theirs.update(request["blocks"])
        assert all(n <= theirs[state] for state, n in counts.items() if state not in FREE_STATES)

    def check_writes(self) -> None:
        """Asserts that a new token is written to a block of the request's own, or is what all
        requests that have the block expect."""
        for i, slot in self.worker.written:
            block = self.pool.blocks[i]
            if block.block_hash is None:
                assert block.ref_cnt <= 1, f"block {i} is shared, and was written"
            else:
                expected = self.meaning[get_block_hash(block.block_hash)][slot]
                assert self.worker.slots[i][slot] == expected

    def check_requests(self) -> None:
        running = {r.request_id for r in self.scheduler.running}
        lists = {k for k, v in self.manager.req_to_blocks.items() if v}
        assert lists == running
        assert set(self.manager.slot_shift) == {
            r for r in running if self.worker.rows[r].compactions
        }
        assert set(self.scheduler._tracked) == set(self.scheduler.requests)
        assert set(self.scheduler._plans) <= set(self.scheduler.requests)
        for request_id in running:
            row = self.worker.rows[request_id]
            assert row.blocks == [b.block_id for b in self.manager.req_to_blocks[request_id]]
            assert row.shift == self.manager.slot_shift.get(request_id, 0)
            blocks, tokens = row.region
            codecs = self.scheduler._codecs(request_id)
            assert sum(codecs.values()) == blocks and set(codecs) <= set(row.codecs)
            assert not codecs or len(row.codecs) > 1 or tuple(codecs) == row.codecs
            assert self.manager.regions.get(request_id, (0, 0)) == row.region
            assert (request_id in self.manager.lossy_since) == bool(row.compactions)
            held = tokens + len(row.held) - blocks * self.block_size
            assert self.manager.held_tokens(request_id, row.computed) == held
            assert held <= row.computed
            self.worker.check_row(row)
            request = self.scheduler.requests[request_id]
            assert row.tokens[: request.num_tokens] == list(request.all_token_ids)
            if request_id in self.scheduler._canaries:
                # It leaves nothing in the prefix cache.
                own = row.blocks[row.hit // self.block_size :]
                assert all(self.pool.blocks[i].block_hash is None for i in own)
            bound = row.plan.bound(row.computed)
            if row.plan.never or (self.elastic(request_id) and not row.compactions):
                assert len(row.blocks) == cdiv(row.computed, self.block_size)
            elif self.elastic(request_id):
                assert len(row.blocks) < cdiv(row.computed, self.block_size)
            elif request_id not in self.overdue:
                assert len(row.blocks) <= bound, f"{request_id}: {len(row.blocks)} > {bound}"

    def check_idle(self) -> None:
        self.check_pool()
        assert self.pool.get_num_free_blocks() == self.num_blocks - 1
        assert not self.scheduler.requests and not self.canaries
        assert not self.scheduler._tracked and not self.scheduler._plans
        assert not self.manager.slot_shift and not self.manager.lossy_since
        assert not self.manager.regions and not self.manager.candidates
        assert not self.manager.num_cached_block
        assert not any(self.manager.req_to_blocks.values())


class AsyncSchedulerMachine(SchedulerMachine):
    scheduler_class = KVCrushAsyncScheduler
    ahead = 1


MACHINES = [SchedulerMachine, AsyncSchedulerMachine]


@pytest.mark.parametrize("machine", MACHINES)
def test_random_lives(machine: type[SchedulerMachine]) -> None:
    # Each run draws other lives; KVCRUSH_EXAMPLES=5000 makes the search longer.
    examples = os.environ.get("KVCRUSH_EXAMPLES") or (2000 if FULL else 200)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(examples),
            stateful_step_count=40,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@parametrize(machine=MACHINES, num_blocks=[24, 26, 28, 31, 35], chunk=[16, 256])
def test_copies_of_a_prompt_in_a_small_pool(
    machine: type[SchedulerMachine], num_blocks: int, chunk: int
) -> None:
    """Requests that share all blocks keep each other from freeing any: they must still end."""
    for budget, prefill_interval, other in itertools.product((0.5, 0.75), (32, 64), (1, 150)):
        lives = machine()
        lives.start(
            block_size=8,
            num_blocks=num_blocks,
            chunk=chunk,
            seqs=6,
            window=8,
            sinks=4,
            prefill_interval=prefill_interval,
            decode_interval=1,
            policy="snapkv",
            budget=budget,
            prefix_caching=True,
            seed=0,
        )
        prompt = tree_prompt([(1, 7), (1, 150), (0, 80)])
        lives.admit(prompt, max_tokens=40, policy=None, budget=None, copies=2)
        lives.admit(prompt[:-9], max_tokens=other, policy="none", budget=None, copies=2)
        lives.admit(prompt[:100], max_tokens=90, policy="none", budget=None, copies=1)
        lives.drain()


@pytest.mark.parametrize("extra", [{"kv_policy": "tc8"}, {"kv_policy": "h2o"}, {7: 1}], ids=str)
def test_a_request_that_no_front_end_saw_has_no_plan(extra: dict[Any, Any]) -> None:
    """The request asks for what is not served: a policy without its tables, or one that is not
    allowed."""
    lives = SchedulerMachine()
    lives.start(
        block_size=8, num_blocks=24, chunk=40, seqs=2, window=8, sinks=4, prefill_interval=32,
        decode_interval=8, policy="auto", budget=0.25, prefix_caching=True, seed=0, tables=False,
    )  # fmt: skip
    allowed = tuple(name for name in lives.scheduler._settings.allow if name != "h2o")
    lives.scheduler._settings = dataclasses.replace(lives.scheduler._settings, allow=allowed)
    request = Request(
        request_id="r",
        prompt_token_ids=[2] * 60,
        sampling_params=SamplingParams(max_tokens=9, extra_args=extra),
        pooling_params=None,
        block_hasher=lives.hasher,
    )
    lives.scheduler.add_request(request)
    assert not lives.scheduler._plans
    assert lives.scheduler._tracked["r"].params.policy == "none"


def test_a_compaction_does_not_count_whose_request_is_preempted_in_its_step() -> None:
    """Preempted between the two, it has nothing left to compact."""
    lives = SchedulerMachine()
    lives.start(
        block_size=8, num_blocks=40, chunk=256, seqs=2, window=8, sinks=4, prefill_interval=32,
        decode_interval=8, policy="snapkv", budget=0.25, prefix_caching=False, seed=0,
    )  # fmt: skip
    lives.admit(prompt=[2] * 160, max_tokens=9, policy=None, budget=None, copies=1)
    lives.step()
    scheduler, due = lives.scheduler, lives.scheduler._compact_due

    def preempting() -> list[Compact]:
        commands = due()
        (request,) = [scheduler.requests[command.request_id] for command in commands]
        scheduler.running.remove(request)
        scheduler._preempt_request(request, 0.0)
        return commands

    scheduler._compact_due = preempting
    assert not scheduler.schedule().kvcrush.commands
    (tracked,) = scheduler._tracked.values()
    assert (tracked.compactions, tracked.first_compaction, lives.counted()) == (0, None, 0)


def closed_loop(at_once: int, **settings: Any) -> tuple[int, int, int]:
    """Keeps so many requests, each a sixth of the pool, in a scheduler until all are done.

    Returns the steps that this took, the tokens that were computed in them, and compactions.
    """
    lives = SchedulerMachine()

    lives.start(
        block_size=8, num_blocks=129, chunk=512, seqs=16, prefix_caching=True, seed=0, **settings
    )
    draw, steps, tokens = random.Random(at_once), 0, 0
    waiting = 2 * at_once + 2
    while waiting or lives.scheduler.requests:
        while waiting and len(lives.scheduler.requests) < at_once:
            waiting -= 1
            lives.added += 1
            request = Request(
                request_id=f"r{lives.added}",
                prompt_token_ids=[draw.randrange(3, 60) for _ in range(160)],
                sampling_params=SamplingParams(max_tokens=16, ignore_eos=True),
                pooling_params=None,
                block_hasher=lives.hasher,
            )
            lives.scheduler.add_request(request)
        tokens += lives.step()
        steps += 1
        lives.deliver()
    return steps, tokens, lives.counted()


@pytest.mark.parametrize("at_once", [4, 6, 8])
def test_pressure_takes_no_more_steps_than_plain_vllm(at_once: int) -> None:
    """Nor computes more tokens, whatever it compacts."""
    plain = closed_loop(at_once, policy="none", budget=1.0)
    pressed = closed_loop(at_once, policy="auto", budget=0.25, pressure=0.8)
    assert pressed[0] <= plain[0] and pressed[1] <= plain[1]
    # Four have room, and six are more than the limit allows.
    assert bool(pressed[2]) == (at_once > 4)
