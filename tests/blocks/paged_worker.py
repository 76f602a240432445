"""A worker without a model: it runs scheduler outputs on slots that remember what they hold.

A slot holds the number of an exact token prefix (the KV of that prefix's last token, computed
while every earlier token was exact and in place), or `(request, admission, position)` for a token
that attended to a compacted cache. So whoever reads a wrong, stale or overwritten slot sees it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_kvcrush.config import PLAIN, Settings
from vllm_kvcrush.engine import canaries
from vllm_kvcrush.engine.commands import Admitted, Compact, StepCommands
from vllm_kvcrush.plan import Part, Plan, cdiv

STOP_TOKEN = 1
Content = int | tuple[str, int, int] | None
# Pages of a compressed region on one rank: (pair of layer and KV head, tokens).
Page = tuple[int, tuple[Content, ...]]


def next_token(tokens: Sequence[int]) -> int:
    """Returns the token that the absent model samples."""
    mixed = 7 * len(tokens) + 5 * tokens[-1] + 3 * tokens[len(tokens) // 2]
    return STOP_TOKEN if mixed % 61 == 0 else 2 + mixed % 17


class Prefixes:
    """Numbers token prefixes, so that equal numbers mean equal prefixes."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}

    def chain(self, tokens: Iterable[int], after: int = 0) -> list[int]:
        """Returns the number of each prefix that ends in `tokens`, which follow the prefix with the
        number `after`."""
        chain = []
        for token in tokens:
            after = self._numbers.setdefault((after, token), len(self._numbers) + 1)
            chain.append(after)
        return chain


def pack(tokens: Sequence[Content], parts: Sequence[Part], plan: Plan) -> list[list[Page]]:
    """Returns the pages of each rank: every pair of layer and head has all tokens, in slot order,
    in pages of its own size."""
    by_codec = {packing.codec: packing for packing in plan.packings}
    ranks = []
    for rank in range(len(plan.packings[0].pages)):
        pairs: list[list[Page]] = []
        start = 0
        for part in parts:
            own, start = tokens[start : start + part.tokens], start + part.tokens
            held = by_codec[part.codec].pages[rank]
            rooms = [room for room, heads in held for _ in range(heads)]
            pairs = pairs or [[] for _ in rooms]
            assert len(rooms) == len(pairs), "codecs count other heads"
            for pair, room in enumerate(rooms):
                pairs[pair] += [
                    (pair, tuple(own[i : i + room])) for i in range(0, part.tokens, room)
                ]
        ranks.append([page for pages in pairs for page in pages])
    return ranks


def unpack(blocks: Iterable[Any]) -> list[Content]:
    """Returns the tokens in blocks that `pack` filled, and asserts that every pair on every rank
    has the same ones."""
    found: dict[tuple[int, int], list[Content]] = {}
    for block in blocks:
        for rank, pages in enumerate(block):
            for pair, tokens in pages:
                found.setdefault((rank, pair), []).extend(tokens)
    first, *others = found.values()
    assert all(other == first for other in others), "heads hold other tokens"
    return first


@dataclass
class Row:
    """A request as its worker sees it, since it was admitted or resumed."""

    request_id: str
    admission: int
    plan: Plan
    elastic: bool  # compacted under pressure only, not where its plan says
    needs: frozenset[str]
    tokens: list[int]
    chain: list[int]
    blocks: list[int] | None  # None while preempted
    computed: int
    hit: int
    shift: int = 0
    compactions: int = 0
    # Blocks of the compressed region, and tokens in each head of it.
    region: tuple[int, int] = (0, 0)
    # The codecs of its pages, in slot order.
    codecs: tuple[str, ...] = ()
    # What the request's slots must hold, in slot order, whatever others do.
    held: list[Content] = field(default_factory=list)
    # Positions whose queries are remembered. They may outlive a compaction: the next one may come
    # before a whole window of new tokens.
    queries: set[int] = field(default_factory=set)
    # Whether a compaction of this admission was put off: then it was not known which ones score.
    late: bool = False

    def content(self, position: int) -> Content:
        """Returns what computing the token at this position writes into its slot."""
        if self.compactions:
            return (self.request_id, self.admission, position)
        return self.chain[position]


class PagedWorker:
    """Does with a `SchedulerOutput` what `engine/worker/runner_v1.py` does, in the same order, and
    asserts that all of it is allowed."""

    def __init__(self, num_blocks: int, block_size: int, settings: Settings, seed: int) -> None:
        self.block_size = block_size
        self.settings = settings
        self.random = random.Random(seed)
        self.prefixes = Prefixes()
        self.slots: list[list[Content]] = [[None] * block_size for _ in range(num_blocks)]
        self.rows: dict[str, Row] = {}
        # (block, slot) of this step's new tokens.
        self.written: list[tuple[int, int]] = []
        self._admissions = 0

    def execute(
        self, output: Any, commands: StepCommands, late: Iterable[str] = ()
    ) -> dict[str, list[int]]:
        """Runs one step; returns each scheduled request's sampled tokens. `late`: requests whose
        compaction is put off."""
        self.written = []
        late = set(late)
        for request_id in output.finished_req_ids:
            self.rows.pop(request_id, None)
        for request_id in output.preempted_req_ids or ():
            if request_id in self.rows:
                self.rows[request_id].blocks = None
        cached = output.scheduled_cached_reqs
        for command in commands.commands:
            assert command.request_id not in cached.resumed_req_ids
            self._compact(self.rows[command.request_id], command)
        for new in output.scheduled_new_reqs:
            assert new.req_id not in self.rows
            self._admit(
                new.req_id,
                new.sampling_params,
                len(new.prompt_token_ids),
                new.prompt_token_ids,
                new.block_ids[0],
                new.num_computed_tokens,
                commands.admitted.get(new.req_id),
            )
        for i, request_id in enumerate(cached.req_ids):
            row, new_blocks = self.rows[request_id], cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                assert row.blocks is None
                assert (request_id in commands.admitted) == (not row.plan.never)
                row.tokens = list(cached.all_token_ids[request_id])
                self._readmit(row, new_blocks[0], cached.num_computed_tokens[i])
            else:
                assert row.blocks is not None, f"{request_id} runs, but was preempted"
                assert row.computed == cached.num_computed_tokens[i]
                row.blocks += new_blocks[0] if new_blocks else []
        # In the order of scheduling: a request may hit blocks that an earlier one fills now.
        return {
            request_id: self._forward(self.rows[request_id], count, commands, late)
            for request_id, count in output.num_scheduled_tokens.items()
        }

    def contents(self, blocks: Sequence[int], count: int) -> list[Content]:
        """Returns what the first `count` slots of these blocks hold."""
        return [slot for block in blocks for slot in self.slots[block]][:count]

    def check_row(self, row: Row) -> None:
        """Asserts that every slot of a request holds what the request put there, and that its
        number of blocks follows from its tokens."""
        assert row.blocks is not None
        count = row.computed - row.shift
        assert len(row.held) == count
        assert len(row.blocks) == cdiv(count, self.block_size), (row.request_id, row.blocks, count)
        assert self.contents(row.blocks, count) == row.held, f"{row.request_id} lost its tokens"

    def _admit(
        self,
        request_id: str,
        sampling_params: Any,
        num_prompt_tokens: int,
        tokens: Sequence[int],
        blocks: Sequence[int],
        computed: int,
        admitted: Admitted | None,
    ) -> None:
        extra = sampling_params.extra_args
        params = PLAIN
        if not canaries.scored(extra):
            params = self.settings.validate_request(extra, self.block_size, 1 << 20)
        plan = self.settings.plan(params, num_prompt_tokens, self.block_size)
        assert admitted == (Admitted(params.policy, plan) if params.active else None)
        row = Row(
            request_id,
            admission=0,
            plan=plan,
            elastic=params.elastic,
            needs=self.settings.build(params.policy).needs if params.active else frozenset(),
            tokens=list(tokens),
            chain=[],
            blocks=None,
            computed=0,
            hit=0,
        )
        self.rows[request_id] = row
        self._readmit(row, blocks, computed)

    def _readmit(self, row: Row, blocks: Sequence[int], computed: int) -> None:
        self._admissions += 1
        row.admission = self._admissions
        row.chain = self.prefixes.chain(row.tokens)
        row.blocks = list(blocks)
        row.computed = row.hit = computed
        row.shift = row.compactions = 0
        row.region, row.codecs = (0, 0), ()
        row.held = list(row.chain[:computed])
        row.queries = set()
        row.late = False

    def _compact(self, row: Row, command: Compact) -> None:
        n, size, packed = row.computed, self.block_size, bool(row.plan.packings)
        candidates = len(command.source) * size
        assert row.blocks == [*command.source, *command.tail], "the rows differ"
        assert command.computed == n
        assert candidates + command.tail_tokens == n - row.shift
        assert cdiv(command.tail_tokens, size) == len(command.tail)
        assert command.tail_tokens >= row.plan.window
        assert command.slot_shift == n - len(command.target) * size - command.tail_tokens
        assert len(command.target) < len(command.source)
        assert len({*command.target, *command.tail}) == len(command.target) + len(command.tail)
        if command.same_as is None:  # else its twin may have written over them already
            assert self.contents(command.source, candidates) == row.held[:candidates]
        region = row.held[: command.compressed * size]
        if packed and region:
            region = unpack(region[::size])
        assert (command.compressed, len(region)) == row.region
        tokens = region + row.held[command.compressed * size : candidates]
        parts = row.plan.parts(len(command.target), len(tokens))
        keep = sum(part.tokens for part in parts)
        self._check_parts(row.plan, command, parts, len(tokens))
        assert row.hit < n
        scores = "state" in row.needs or row.plan.needs_scores(len(command.target), len(tokens))
        if "queries" in row.needs and scores and not row.late:
            missing = set(range(n - row.plan.window, n)) - row.queries
            assert not missing, f"{row.request_id} at {n}: no queries of {sorted(missing)}"
        survivors = sorted(self.random.sample(range(len(tokens)), keep))
        kept = [tokens[i] for i in survivors]
        if command.same_as is not None:
            # What the result follows from is the same here, as far as it is exact.
            twin = self.rows[command.same_as]
            assert twin.compactions and twin.computed == n and twin.chain[:n] == row.chain[:n]
            assert twin.region == (len(command.target), keep)
            assert twin.plan == row.plan and twin.shift == command.slot_shift
        elif packed:
            for block, pages in self._blocks(command, pack(kept, parts, row.plan)):
                # The first slot of a packed block stands for its pages.
                self.slots[block] = [pages, *["packed"] * (size - 1)]
        else:
            for i, block in enumerate(command.target):
                self.slots[block] = kept[i * size : (i + 1) * size]
        row.held[:candidates] = self.contents(command.target, len(command.target) * size)
        row.blocks = [*command.target, *command.tail]
        row.shift = command.slot_shift
        row.region, row.codecs = (len(command.target), keep), tuple(part.codec for part in parts)
        n, window = row.computed, row.plan.window
        if row.plan.next_compaction(n, n - row.shift, n + window - 1) is None:
            row.queries = set()
        row.compactions += 1

    def _check_parts(
        self, plan: Plan, command: Compact, parts: tuple[Part, ...], candidates: int
    ) -> None:
        blocks, keep = len(command.target), sum(part.tokens for part in parts)
        assert keep == plan.kept(blocks, candidates)
        assert 0 < keep <= candidates and all(part.tokens > 0 for part in parts)
        if not plan.packings:
            full = Part("raw", blocks * self.block_size)
            assert parts == (full,), "a raw block is not full"
            return
        if keep < candidates:
            # Evicts nothing that would have found room in the codec that holds most.
            (part,) = parts
            assert part.codec == plan.packings[-1].codec
            assert plan.packings[-1].blocks(part.tokens + 1) > blocks

    @staticmethod
    def _blocks(
        command: Compact, ranks: list[list[Page]]
    ) -> Iterable[tuple[int, tuple[list[Page], ...]]]:
        """What each target block holds of the pages of each rank, handed out in order."""
        pairs = 1 + max(pair for pages in ranks for pair, _ in pages)
        assert max(map(len, ranks)) <= pairs * len(command.target), "pages without a block"
        for i, block in enumerate(command.target):
            yield block, tuple(pages[i * pairs : (i + 1) * pairs] for pages in ranks)

    def _forward(self, row: Row, count: int, commands: StepCommands, late: set[str]) -> list[int]:
        start, end, size = row.computed, row.computed + count, self.block_size
        assert row.blocks is not None and end <= len(row.tokens)
        assert len(row.blocks) * size >= end - row.shift, f"{row.request_id} has no slot left"
        # The prefix that attention reads, found in the cache or computed here.
        assert self.contents(row.blocks, start - row.shift) == row.held, row.request_id
        for n in range(start + 1, end):
            due = row.plan.is_check(n) and row.plan.due(n, n - row.shift) and not row.elastic
            assert not due, f"{row.request_id}: chunk {start}-{end} runs over {n}, which is due"
        row.late |= row.request_id in late
        count = commands.observe.get(row.request_id, 0)
        assert count <= min(end - start, row.plan.window)
        row.queries.update(range(end - count, end))
        for position in range(start, end):
            block, slot = divmod(position - row.shift, size)
            assert block * size + slot == len(row.held)
            row.held.append(row.content(position))
            self.slots[row.blocks[block]][slot] = row.held[-1]
            self.written.append((row.blocks[block], slot))
        row.computed = end
        if end < len(row.tokens):
            return []
        row.tokens.append(next_token(row.tokens))
        row.chain += self.prefixes.chain(row.tokens[-1:], after=row.chain[-1])
        return row.tokens[-1:]
