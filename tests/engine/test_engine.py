"""Compaction on the real engine and the real model: what a user would notice."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.conftest import (
    BLOCK,
    DECODE_INTERVAL,
    MAX_MODEL_LEN,
    PREFILL_INTERVAL,
    Engine,
    on_tiny_model,
)
from tests.ledger import Ledger
from vllm_kvcrush import policies
from vllm_kvcrush.codecs import CODECS, FITTED
from vllm_kvcrush.codecs.layout import SINKS
from vllm_kvcrush.codecs.transform import calibrate, losses
from vllm_kvcrush.codecs.transform.fit import Statistics
from vllm_kvcrush.codecs.transform.points import TablesError
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.codecs.transform.tables import HeadTables
from vllm_kvcrush.engine.worker import statistics
from vllm_kvcrush.ops import cpu

pytestmark = pytest.mark.engine


def add(engine: Engine, name: str, prompt: list[int], params: Any) -> None:
    engine.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)


def step_until(engine: Engine, condition: Any, limit: int = 400) -> None:
    for _ in range(limit):
        if condition():
            return
        engine.llm.llm_engine.step()
    raise AssertionError("the condition never came true")


def internal(engine: Engine, name: str) -> str:
    """Returns vLLM's id, in the scheduler, of the request that was added as `name`."""
    (found,) = [r for r in engine.scheduler.requests if r.startswith(name)]
    return found


# -- blocks really freed ------------------------------------------------------------------------


@on_tiny_model
def test_blocks_come_free_when_the_prompt_ends(engine: Engine, ids: list[int]) -> None:
    prompt = ids[:320]  # 10 blocks; a quarter is 80 tokens: the floor of 3 blocks holds
    with engine.watch() as steps:
        (result,) = engine.generate([prompt], engine.params(4))
    total = engine.pool.num_gpu_blocks - 1
    assert steps[0]["free"] == total - 10
    assert steps[1]["compactions"][0].computed == 320
    assert steps[1]["free"] == total - 4  # 3 kept, and one more for the next token
    assert len(result.outputs[0].token_ids) == 4


@on_tiny_model
def test_compaction_repeats_while_decoding(engine: Engine, ids: list[int]) -> None:
    with engine.watch() as steps:
        engine.tokens(ids[:320], 3 * DECODE_INTERVAL)
    at = [c.computed for s in steps for c in s["compactions"]]
    assert at == [320, 320 + DECODE_INTERVAL, 320 + 2 * DECODE_INTERVAL]
    bound = 3 + DECODE_INTERVAL // BLOCK
    assert all(max(s["held"].values()) <= bound for s in steps[1:] if s["held"])


@on_tiny_model
def test_a_prompt_larger_than_the_whole_pool_is_served(engine: Engine, ids: list[int]) -> None:
    usable = engine.pool.num_gpu_blocks - 1
    prompt = ids[:1952]
    assert len(prompt) > usable * BLOCK and usable * BLOCK < MAX_MODEL_LEN
    with engine.watch() as steps:
        tokens = engine.tokens(prompt, 8)
    assert len(tokens) == 8
    planned = 1952 // 4 // BLOCK
    assert max(max(s["held"].values(), default=0) for s in steps) <= (
        planned + PREFILL_INTERVAL // BLOCK
    )
    assert [c.computed for s in steps for c in s["compactions"]][-1] == 1952


@on_tiny_model
def test_freed_blocks_admit_waiting_requests(engine: Engine, ids: list[int]) -> None:
    prompts = [ids[i * 330 : i * 330 + 320] for i in range(12)]

    def peak(**extra: Any) -> int:
        engine.reset()
        with engine.watch() as steps:
            engine.generate(prompts, engine.params(24, **extra))
        return max(s["running"] for s in steps)

    raw, compressed = peak(kv_policy="none"), peak()
    # 59 blocks: 5 requests of 11 blocks, against 4 blocks each once compacted.
    assert raw <= 5
    assert compressed >= 2 * raw


# -- correctness after compaction ---------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(model_path: str) -> Any:
    from hf_reference import Reference

    return Reference(model_path)


@pytest.mark.parametrize(
    "policy", ["streaming", "snapkv", "h2o", "kvcrush", "kvcrush-page", "kvzip"]
)
def test_tokens_equal_transformers_with_the_same_kept_tokens(
    engine: Engine, ids: list[int], reference: Any, policy: str, monkeypatch: Any
) -> None:
    """The compactions are between prefill chunks, at the prompt's end and while decoding."""
    if policy == "kvcrush-page":
        policy = "kvcrush"
        paged = policies.get("kvcrush(level=page, anchor=mean)")
        monkeypatch.setitem(engine.runner._policies, "kvcrush", paged)
    kept: dict[int, list[torch.Tensor]] = {}

    def record(command: Any, layer: int, slots: torch.Tensor) -> None:
        start = len(command.source) * BLOCK
        tail = torch.arange(start, start + command.tail_tokens).expand(slots.shape[0], -1)
        kept.setdefault(command.computed, []).append(torch.cat([slots, tail], 1))

    engine.runner.on_select = record
    # The prompt ends so soon after a compaction that the next window reaches back before it.
    prompt, new = ids[100:524], 2 * DECODE_INTERVAL + 4
    tokens = engine.tokens(prompt, new, kv_policy=policy, kv_budget=160)
    first = 160 + PREFILL_INTERVAL
    assert sorted(kept) == [first, 424, 424 + DECODE_INTERVAL, 424 + 2 * DECODE_INTERVAL]
    assert tokens == reference.greedy(prompt, tokens, kept)
    if policy != "streaming":
        at_end = kept[424]
        assert any(not torch.equal(layer[0], layer[1]) for layer in at_end), (
            "all heads kept the same tokens"
        )
    positions = kept[first][0]
    assert (positions[:, :4] == torch.arange(4)).all(), "sinks were dropped"


def rounding_of(engine: Engine, codec: str, tables: Any) -> Any:
    """Returns the function that rounds a head's first tokens as pages of `codec` do, by the
    oracle."""

    def apply(layer: int, head: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        pages = engine.runner._layers[layer].pages
        room = pages.capacity(codec, head)
        for start in range(0, len(keys), room):
            own = slice(start, start + room)
            mine = None
            if codec in FITTED:
                exceptions = pages.tables[codec].exceptions[head]
                mine = HeadTables(tables[codec], layer, head, exceptions)
            positions = torch.arange(len(keys))[own]  # nothing was evicted
            keys[own], values[own] = CODECS[codec].kept(
                keys[own], values[own], torch.float32, positions, mine
            )

    return apply


@pytest.mark.parametrize(
    ("codec", "budget"),
    [
        ("int8", 0.5),
        ("int4", 0.5),
        ("int8", 128),
        ("int4", 128),
        ("tc4", 0.33),
        ("tc6", 0.25),
        ("tc8", 0.25),
    ],
)
def test_tokens_equal_transformers_with_the_same_rounded_cache(
    engine: Engine,
    ids: list[int],
    reference: Any,
    tables: Any,
    codec: str,
    budget: float | int,
    request: pytest.FixtureRequest,
) -> None:
    """With a fraction as budget, every token stays in fewer bits. With a budget of 128 tokens,
    packed pages are compacted again and again, and tokens are evicted too where int8 needs more.
    The kernels are the portable ones, which compute in floats: the integer ones round by some 1e-3,
    enough to change a near tie."""
    best = cpu.isa()
    cpu.use_isa("baseline")
    request.addfinalizer(lambda: cpu.use_isa(best))
    kept: dict[int, list[torch.Tensor]] = {}
    packed: dict[int, int] = {}

    region = 0

    def record(command: Any, layer: int, slots: torch.Tensor) -> None:
        nonlocal region
        tail_start = region if command.compressed else 0
        tail_start += (len(command.source) - command.compressed) * BLOCK
        tail = torch.arange(tail_start, tail_start + command.tail_tokens)
        everything = torch.cat([slots, tail.expand(slots.shape[0], -1)], 1)
        kept.setdefault(command.computed, []).append(everything)
        packed[command.computed] = slots.shape[1]
        if len(kept[command.computed]) == len(engine.runner._layers):
            region = slots.shape[1]

    engine.runner.on_select = record
    prompt, new = ids[3100:3500], DECODE_INTERVAL + 8
    (output,) = engine.generate([prompt], engine.params(new, kv_policy=codec, kv_budget=budget))
    tokens = list(output.outputs[0].token_ids)
    rounding = rounding_of(engine, codec, tables)
    assert tokens == reference.greedy(prompt, tokens, kept, rounding, packed)
    details = output.kv_tokens_details
    held, raw = details["held"], details["raw"]
    if budget == 128:
        assert len(kept) > 1 and held > 128, "no more than the budget would hold raw"
    evicts = budget == 128 and codec == "int8"
    assert held < raw if evicts else held == raw


def test_statistics_taken_at_start_are_the_models(
    engine: Engine, model_path: str, monkeypatch: Any
) -> None:
    """Without a file of tables, the engine finds the same moments as transformers does in the same
    text."""
    assert statistics.pieces(engine.runner.model_config, 9) == []
    found = statistics.pieces(engine.runner.model_config, 512)[:2]
    assert [len(piece) for piece in found] == [512, 512]
    monkeypatch.setattr(statistics, "pieces", lambda *_: found)
    probe = calibrate.Probe(model_path)
    got = statistics.gather(engine.runner._read_pieces(), probe.rope)
    engine.reset()  # the pieces lay in any blocks
    moments = []
    for piece in found:
        back = -torch.arange(len(piece))
        q, k, _ = probe.prefill(piece)
        q, k = (probe.rope.rotate(x, back)[:, :, SINKS:] for x in (q, k))
        moments.append(Statistics.of(k, q))
    want = moments[0].merged(moments[1], 1, 1)
    for name in ("key_mean", "key_second", "query_second"):
        mine, its = getattr(got, name), getattr(want, name)
        assert (mine - its).norm() < 1e-3 * its.norm(), name
    with pytest.raises(TablesError, match="not the one that its configuration describes"):
        other = Rope(probe.rope.frequencies * 1.5)
        statistics.gather(engine.runner._read_pieces(), other)
    with pytest.raises(TablesError, match="too short to take statistics"):
        statistics.gather(iter(()), probe.rope)
    engine.reset()
    engine.assert_idle()


def test_losses_measured_at_start_are_the_models(
    engine: Engine, model_path: str, monkeypatch: Any
) -> None:
    """Without a file, the engine finds what codecs lose as transformers does with the oracles, and
    tells the scheduler with the first request."""
    runner, scheduler = engine.runner, engine.scheduler
    assert statistics.excerpts(runner.model_config, BLOCK, 40) == []
    found = statistics.excerpts(runner.model_config, BLOCK, 511)[:1]
    ((context, question),) = found
    assert (len(context) % BLOCK, len(question)) == (0, 96)
    monkeypatch.setattr(statistics, "excerpts", lambda *_: found)
    wanted = dataclasses.replace(
        runner._settings, policy="auto", losses={"int8": None, "int4": None}
    )
    monkeypatch.setattr(runner, "_losses", {})
    monkeypatch.setattr(runner, "_head_losses", {})
    for owner in (runner, scheduler):
        monkeypatch.setattr(owner, "_settings", wanted)
    runner._measure_losses()
    engine.reset()  # the excerpts lay in any blocks
    got = runner._losses
    probe = calibrate.Probe(model_path)
    _, keys, values = probe.prefill(context)
    with torch.inference_mode():
        exact = probe.log_probabilities(keys, values, len(context), question)
        for codec in ("int8", "int4"):
            stored = losses.stored(codec, keys, values, {})
            other = probe.log_probabilities(*stored, len(context), question)
            want = float(losses.divergence(exact, other).mean())
            assert got[codec] == pytest.approx(want, rel=0.05), codec
    assert 0 < got["int8"] < got["int4"]
    # How they are divided among heads agrees with what gradients say.
    gradients = probe.gradients(keys, values, question, torch.Generator().manual_seed(0))
    errors = stored[0] - keys, stored[1] - values
    want = losses.by_head(errors, gradients, len(question)).flatten().log()
    shares = torch.from_numpy(runner._head_losses["int4"])
    assert shares.sum().item() == pytest.approx(got["int4"])
    assert float(torch.corrcoef(torch.stack([shares.flatten().log(), want]))[0, 1]) > 0.6
    with engine.moves() as moves:
        engine.tokens(context, 2, kv_policy="auto", kv_budget=0.4)
    assert scheduler._settings.losses == got
    assert moves[0]._state.plan.packings[0].loss == got["int8"]
    engine.reset()
    engine.assert_idle()


@pytest.mark.parametrize(
    ("budget", "codecs", "evicts"),
    [(0.4, ["int8"], False), (0.3, ["tc4", "int8"], False), (0.1, ["tc8"], True)],
)
def test_auto_takes_as_many_bits_as_the_budget_pays_for(
    engine: Engine,
    ids: list[int],
    plain: Any,
    budget: float,
    codecs: list[str],
    evicts: bool,
) -> None:
    prompt = ids[4000:5000]
    with engine.moves() as moves:
        (output,) = engine.generate([prompt], engine.params(12, kv_policy="auto", kv_budget=budget))
    last = moves[-1]
    assert [part.codec for part in last._parts] == codecs
    blocks = len(last._command.target) + len(last._command.tail)
    assert blocks <= max(3, int(budget * 1000) // BLOCK)
    details = output.kv_tokens_details
    assert (details["held"] < details["raw"]) == evicts
    if not evicts:  # a model that reads its own context well goes on as it would have
        assert list(output.outputs[0].token_ids)[:4] == plain.tokens([prompt], 4)[0]


def test_auto_stores_each_head_in_the_codec_that_suits_it(
    engine: Engine, ledger: Ledger, ids: list[int], plain: Any, monkeypatch: Any
) -> None:
    """Where it is known what each head loses in which codec, those that lose most get the finest,
    no token is dropped, and what is stored stays in its codec while there is room."""
    runner = engine.runner
    shape = len(runner._layers), runner._layers[0].heads
    costs = np.random.default_rng(3).permutation(np.logspace(-4, 0, shape[0] * shape[1]))
    costs = (costs / costs.sum()).reshape(shape)
    losses = {codec: loss * costs for codec, loss in runner._settings.losses.items()}
    monkeypatch.setattr(runner, "_head_losses", losses)
    prompt = ids[4000:5000]
    with engine.moves() as moves:
        params = engine.params(160, kv_policy="auto", kv_budget=0.25)
        (output,) = engine.generate([prompt], params)
    assert output.kv_tokens_details["held"] == output.kv_tokens_details["raw"]
    assert list(output.outputs[0].token_ids)[:4] == plain.tokens([prompt], 4)[0]
    chosen = []
    for move in moves:
        region, found = move.target, np.zeros(shape)
        assert ((region.part_tokens > 0).sum(0) == 1).all()
        for codec, tokens in zip(region.codecs, region.part_tokens, strict=True):
            found += tokens / move._candidates * losses[codec]
        alike = np.sum([part.tokens * losses[part.codec] for part in move._parts])
        chosen.append((found.sum() * move._candidates / alike, region))
    assert all(share < 1 + 1e-9 for share, _ in chosen) and chosen[-1][0] < 0.5
    # While decoding, as many bytes a token as before.
    last, before = (
        np.array(region.codecs)[region.part_tokens.argmax(0)] for _, region in chosen[:-3:-1]
    )
    assert len(np.unique(last)) > 1 and (last == before).mean() > 0.9
    assert len(moves) >= 2 and not ledger.failures.total()
    engine.reset()
    engine.assert_idle()


def test_mikv_keeps_everything_and_the_important_tokens_finer(
    engine: Engine, ids: list[int], plain: Any
) -> None:
    """Over many compactions, a demoted token is in the finer tier again only if all others are."""
    tiers: list[tuple[Any, torch.Tensor]] = []

    def record(command: Any, layer: int, slots: torch.Tensor) -> None:
        if layer == 0:
            tiers.append((command, slots))

    engine.runner.on_select = record
    prompt, new = ids[4000:5000], 2 * DECODE_INTERVAL + 4
    with engine.moves() as moves:
        (output,) = engine.generate([prompt], engine.params(new, kv_policy="mikv", kv_budget=0.25))
    details = output.kv_tokens_details
    assert details["held"] == details["raw"] and len(tiers) >= 4
    # Positions by slot of the first KV head, before each compaction and after.
    position, demoted = torch.arange(0), set[int]()
    for (command, slots), move in zip(tiers, moves, strict=True):
        parts = move._parts
        have = torch.cat([position, torch.arange(len(position), command.computed)])
        position = have[slots[0]]
        fine, coarse = parts if len(parts) > 1 else (None, parts[0])
        assert coarse.codec in ("int8", "tc8")
        if coarse.codec == "tc8":
            finer = position[: fine.tokens if fine else 0].tolist()
            assert finer[:4] == ([0, 1, 2, 3] if finer else [])
            promoted = demoted & set(finer)
            assert not promoted or set(position.tolist()) - demoted <= set(finer)
            demoted = set(position[len(finer) :].tolist())
    assert demoted
    tokens = list(output.outputs[0].token_ids)
    assert tokens[:4] == plain.tokens([prompt], 4)[0]


def test_compaction_changes_what_is_attended(engine: Engine, ids: list[int]) -> None:
    """The tests above would pass on an engine that evicts nothing; this one would not."""
    prompt = ids[1000:1500]
    assert engine.tokens(prompt, 40) != engine.tokens(prompt, 40, kv_policy="none")


# -- the prefix cache ---------------------------------------------------------------------------


def test_same_prompt_again_hits_and_repeats_itself(
    engine: Engine, ids: list[int], plain: Any
) -> None:
    prompt = ids[2000:2400]
    (first,) = engine.generate([prompt], engine.params(20))
    (second,) = engine.generate([prompt], engine.params(20))
    assert first.num_cached_tokens == 0
    # The first compaction is at 352; its window of 16 queries is computed anew.
    assert second.num_cached_tokens == (352 - 16) // BLOCK * BLOCK
    assert second.outputs[0].token_ids == first.outputs[0].token_ids
    # What the compressed requests left in the cache is exact.
    (uncompressed,) = engine.generate([prompt], engine.params(20, kv_policy="none"))
    assert uncompressed.num_cached_tokens >= 320
    assert list(uncompressed.outputs[0].token_ids) == plain.tokens([prompt], 20)[0]


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "kvcrush"])
def test_result_does_not_depend_on_the_cache(engine: Engine, ids: list[int], policy: str) -> None:
    prompt = ids[2500:2807]
    cold = engine.tokens(prompt, 20, kv_policy=policy)
    engine.reset()
    engine.tokens(prompt, 1, kv_policy="none")  # now every full block of the prompt is cached
    assert engine.tokens(prompt, 20, kv_policy=policy) == cold


@on_tiny_model
def test_compaction_in_place_when_the_pool_is_empty(engine: Engine, ids: list[int]) -> None:
    prompt = ids[3000:3320]
    expected = engine.tokens(prompt, 16)
    engine.reset()
    add(engine, "tight", prompt, engine.params(16))
    engine.llm.llm_engine.step()
    hoard = engine.pool.get_new_blocks(engine.free)  # nothing is left to compact into
    try:
        with engine.watch() as steps:
            engine.llm.llm_engine.step()
        (command,) = steps[0]["compactions"]
        assert set(command.target) <= set(command.source)
        (request,) = engine.scheduler.running
        step_until(engine, lambda: not engine.scheduler.running)
        assert list(request.output_token_ids) == expected
    finally:
        engine.pool.free_blocks(hoard)
    # Its overwritten blocks left the cache, so the next one must not find them.
    assert engine.tokens(prompt, 16) == expected


# -- off means off ------------------------------------------------------------------------------


def test_uncompressed_requests_equal_plain_vllm_beside_compressed_ones(
    engine: Engine, ids: list[int], plain: Any
) -> None:
    prompts = [ids[i * 400 : i * 400 + 200 + 30 * i] for i in range(6)]
    extra: list[dict[str, Any]] = [
        {"kv_policy": "none"},
        {},
        {"kv_budget": 1.0},
        {"kv_policy": "snapkv", "kv_budget": 0.3},
        {"kv_budget": 1024},  # never exceeded
        {"kv_policy": "streaming", "kv_budget": 128},
    ]
    with engine.watch() as steps:
        results = engine.generate(prompts, [engine.params(40, **e) for e in extra])
    assert any(s["running"] == 6 for s in steps)
    expected = plain.tokens(prompts, 40)
    got = [list(r.outputs[0].token_ids) for r in results]
    for index in (0, 2, 4):
        assert got[index] == expected[index], extra[index]
    compacted = {c.request_id for s in steps for c in s["compactions"]}
    assert len(compacted) == 3


@on_tiny_model
def test_a_request_that_can_never_fit_is_refused(engine: Engine, ids: list[int]) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="62 KV blocks of the 59") as caught:
        engine.tokens(ids[:1952], 8, kv_policy="none")
    assert "kv_policy" in str(caught.value) and "\n" not in str(caught.value)
    assert not engine.scheduler.requests


# -- what happens to requests -------------------------------------------------------------------


@on_tiny_model
def test_preempted_requests_resume_with_the_same_tokens(engine: Engine, ids: list[int]) -> None:
    prompt = ids[4000:4300]
    alone = engine.tokens(prompt, 100)
    engine.reset()
    # Uncompressed requests grow until the newest request, the compressed one, must go.
    raws = [ids[4400 + i * 260 : 4400 + i * 260 + 250] for i in range(6)]
    with engine.watch() as steps:
        results = engine.generate(
            [*raws, prompt],
            [engine.params(110, kv_policy="none")] * 6 + [engine.params(100)],
        )
    victims = {r for s in steps for r in s["preempted"]}
    compacted = [c.request_id for s in steps for c in s["compactions"]]
    assert victims & set(compacted), "the compressed request was never preempted"
    assert list(results[-1].outputs[0].token_ids) == alone


@on_tiny_model
@pytest.mark.parametrize("phase", ["waiting", "reading", "compacted", "decoding"])
def test_abort_gives_every_block_back(engine: Engine, ids: list[int], phase: str) -> None:
    core = engine.llm.llm_engine
    add(engine, "victim", ids[5000:5900], engine.params(200))
    name = internal(engine, "victim")
    if phase != "waiting":
        core.step()
    if phase == "compacted":
        step_until(engine, lambda: name in engine.manager.slot_shift)
    if phase == "decoding":
        step_until(engine, lambda: engine.scheduler.requests[name].num_output_tokens > 40)
    core.abort_request(["victim"])
    step_until(engine, lambda: not core.has_unfinished_requests())
    core.step()  # tells the worker
    assert not engine.runner._requests
    engine.assert_idle()


def test_stop_strings_and_several_choices(engine: Engine, ids: list[int]) -> None:
    from vllm import SamplingParams

    prompt = ids[6000:6320]
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    (full,) = engine.generate([prompt], params)
    text = full.outputs[0].text
    stop = text[len(text) // 2 :][:6]
    params = SamplingParams(temperature=0, max_tokens=60, stop=[stop])
    (stopped,) = engine.generate([prompt], params)
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].text == text[: text.index(stop)]

    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=40, ignore_eos=True)
    with engine.watch() as steps:
        (several,) = engine.generate([prompt], params)
    assert [len(c.token_ids) for c in several.outputs] == [40, 40, 40]
    assert len({tuple(c.token_ids) for c in several.outputs}) > 1
    assert any(s["compactions"] for s in steps)


@on_tiny_model
def test_copies_of_one_prompt_never_cost_blocks(engine: Engine, ids: list[int]) -> None:
    """Copies share their blocks, so that the compaction of one of them alone would cost blocks."""
    total = engine.pool.num_gpu_blocks - 1
    prompt = ids[7000:7320]
    free_before: list[int] = []
    compact = engine.scheduler._compact_due

    def measured() -> Any:
        before = engine.free
        done = compact()
        if done:
            free_before.append(engine.free - before)
        return done

    engine.scheduler._compact_due = measured
    try:
        with engine.watch() as steps:
            results = engine.generate([prompt] * 3, engine.params(40))
    finally:
        engine.scheduler._compact_due = compact
    assert free_before and all(gain > 0 for gain in free_before)
    assert max(s["free"] for s in steps) <= total
    assert min(s["free"] for s in steps) >= total - 3 * 11
    assert all(len(r.outputs[0].token_ids) == 40 for r in results)
