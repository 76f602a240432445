"""GPU attention backends in the engine: vLLM's own Triton backend with raw pages in the layout that
it has on GPUs, and ours with pages of every codec."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu.v2.engine import Answer, Engine
from tests.gpu.v2.test_runner import RAW, assert_equal, assert_slots_follow, prompts
from tests.ledger import Ledger
from vllm_kvcrush.codecs import FITTED
from vllm_kvcrush.engine.worker.memory import SideMemory
from vllm_kvcrush.ops import cpu
from vllm_kvcrush.policies.adakv import AdaKV


@pytest.fixture(scope="module", autouse=True)
def triton_attention(v1: Engine, v1_fitted: Engine) -> Iterator[None]:
    """Makes vLLM's Triton backend the attention of the CPU platform in later engines."""
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends import registry

    name = registry.AttentionBackendEnum.CPU_ATTN
    plain = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda *_, **__: (8, 0)
    path = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"
    registry.register_backend(name, path)
    selector._cached_get_attn_backend.cache_clear()
    yield
    name.clear_override()
    selector._cached_get_attn_backend.cache_clear()
    torch.cuda.get_device_capability = plain


def test_raw_pages_under_vllms_own_backend(model: str, v1: Engine) -> None:
    engine = Engine(model, v2=True, allow=[*RAW, "none"])
    layer = engine.runner._layers[0]
    assert type(layer).__name__ == "StockCacheLayer"
    assert engine.runner.attn_groups[0][0].backend.__name__ == "TritonAttentionBackend"
    # Tokens before heads: what vLLM prefers on GPUs, and our CPU kernels do not read.
    cache = engine.llm.llm_engine.vllm_config.cache_config
    assert cache.get_resolved_kv_cache_layout().name == "LBNHC"
    extra: list[dict[str, Any]] = [{"kv_policy": "kvcrush"}, {"kv_policy": "none"}]
    job = (prompts(180, 40, seed=4), 6, extra)
    got, want = engine.run(*job), v1.run(*job)
    assert [a.compactions > 0 for a in got] == [True, False]
    assert_equal(got, want)
    for answer in got:
        assert_slots_follow(answer)


@pytest.fixture(scope="module")
def ours(model: str, triton_attention: None) -> Engine:
    engine = Engine(model, v2=True)
    assert type(engine.runner._layers[0]).__name__ == "TritonCacheLayer"
    return engine


def compare(ours: Engine, v1: Engine, job: tuple[Any, ...]) -> tuple[list[Answer], Ledger]:
    """Runs a job in both engines, which must keep the same slots and give the same tokens, and
    returns ours."""
    kept: dict[Engine, list[Any]] = {ours: [], v1: []}
    ledgers = []
    for e, seen in kept.items():
        e.runner.on_select = lambda c, layer, slots, seen=seen: seen.append((layer, slots.tolist()))
        ledgers.append(Ledger(e.runner))
    try:
        got, want = ours.run(*job), v1.run(*job)
    finally:
        for ledger, e in zip(ledgers, kept, strict=True):
            ledger.close()
            e.runner.on_select = None
    assert kept[ours] == kept[v1]
    assert ledgers[0].compactions == ledgers[1].compactions
    assert not ledgers[0].failures.total()
    assert_equal(got, want)
    return got, ledgers[0]


class Operations(TorchDispatchMode):
    """Notes the operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def builder_of(engine: Engine) -> Any:
    ((group,),) = engine.runner.attn_groups
    (builder,) = group.metadata_builders
    return builder


def read_by(metadata: Any) -> list[torch.Tensor]:
    """All that the launches of a step read, of every layer."""
    found = [metadata.slot_mapping]
    for batch in metadata.batches:
        own = batch.directory
        found += [batch.query_start, batch.length, batch.table, batch.states]
        found += [own.runs, own.blocks, own.page, own.count, own.bias]
    return found


def test_a_step_neither_copies_nor_moves_what_it_reads(
    ours: Engine, v1: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metadata are views of tensors that never move, whatever comes, goes and is compacted."""
    builder, seen, made = builder_of(ours), [], Operations()
    build = builder.build

    def watched(*args: Any, **kwargs: Any) -> Any:
        metadata = build(*args, **kwargs)  # which notes what it was told
        with made:
            type(builder).build(builder, *args, **kwargs)
        if builder.paged:
            seen.append([x.data_ptr() for x in read_by(metadata)])
        return metadata

    monkeypatch.setattr(builder, "build", watched)
    extra: list[dict[str, Any]] = [{"kv_policy": p} for p in ("int8", "adakv", "none", "kvcrush")]
    got, _ = compare(ours, v1, (prompts(115, 147, 40, 116, seed=9), 20, extra))
    assert sum(a.compactions for a in got) >= 4
    assert got[3].compactions == 2, "one of them while decoding"
    assert len(seen) >= 20
    assert {tuple(addresses) for addresses in seen} == {tuple(seen[0])}
    assert made.names == {"aten::slice.Tensor"}


def test_a_replay_reads_what_was_captured(
    ours: Engine, v1: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay runs no Python: decode steps are given the metadata that were made for the first of
    their size, padded as for a graph, and requests come, go and are compacted all the same."""
    builder, runner = builder_of(ours), ours.runner
    build, graphs, replays = builder.build, {}, 0

    def captured(size: int, common: Any) -> Any:
        padded = dataclasses.replace(
            common,
            num_reqs=size,
            query_start_loc=runner.input_buffers.query_start_loc[: size + 1],
            seq_lens=runner._slot_lens[:size],
            block_table_tensor=runner.block_tables.input_block_tables[0][:size],
        )
        return builder.build_for_cudagraph_capture(padded)

    def replayed(common_prefix_len: int, common: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal replays
        now = build(common_prefix_len, common, *args, **kwargs)
        if common.max_query_len > 1:
            return now
        # The interpreter's rows are the batch's, whatever the graph was captured for.
        key = common.num_reqs
        replays += key in graphs
        if key not in graphs:
            graphs[key] = captured(-(-key // 4) * 4, common)
        return graphs[key]

    monkeypatch.setattr(builder, "build", replayed)
    policies = ("int8", "keepkv(streaming)@int8", "none", "kvcrush")
    extra: list[dict[str, Any]] = [{"kv_policy": p} for p in policies]
    got, _ = compare(ours, v1, (prompts(115, 147, 40, 116, seed=11), 20, extra))
    assert sum(a.compactions for a in got) >= 4
    assert got[3].compactions == 2, "one of them while decoding"
    assert replays >= 10
    assert all(len(m.batches[0].states) == 4 for m in graphs.values())


def test_packed_pages_under_ours(ours: Engine, v1: Engine) -> None:
    """Pages of int8 are as on a CPU, bit for bit but for the order of sums; pages of int4 are
    beside them."""
    extra: list[dict[str, Any]] = [{"kv_policy": p} for p in ("int8", "none", "mikv")]
    got, ledger = compare(ours, v1, (prompts(150, 40, 280, seed=5), 5, extra))
    assert [a.compactions > 0 for a in got] == [True, False, True]
    assert {codecs for _, codecs in ledger.compactions} == {("int8",), ("int8", "int4")}


def test_unequal_heads_and_merges_under_ours(
    ours: Engine, v1: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads hold unequal numbers of tokens, and merged tokens have biases. There are two
    compactions, so that the second one scores tokens with biases."""
    # So few pages would be shared out equally over a random model's heads.
    shares = torch.tensor([0.7, 0.3]).repeat(2, 1)
    monkeypatch.setattr(AdaKV, "allocate", lambda *_: shares)
    policies = ("adakv", "keepkv(adakv, threshold=0.5)@int8")
    extra: list[dict[str, Any]] = [{"kv_policy": p} for p in policies]
    got, ledger = compare(ours, v1, (prompts(150, 230, seed=7), 20, extra))
    assert [a.compactions >= 2 for a in got] == [True, True] and ledger.unequal


def test_what_lies_beside_the_pool_is_what_was_said(ours: Engine) -> None:
    """To the byte what is there from the start, and no less than what compactions took."""
    runner = ours.runner
    side = SideMemory.of(runner._settings, runner._sizes())
    blocks = runner._layers[0].pages.num_blocks
    first = runner._directory.layers[0]
    assert runner._directory._runs.nbytes == side.directory
    entries = (first.page, first.count, first.bias)
    assert sum(x.nbytes for x in entries) == side.entries * blocks
    assert runner._ring.kept.nbytes == side.queries
    extra = [{"kv_policy": p} for p in ("h2o", "keepkv(adakv)@int8", "kvcrush", "int4")]
    ours.run(prompts(170, 160, 150, 140, seed=3), 2, [{"kv_budget": 0.5, **e} for e in extra])
    peaks = runner._peaks
    assert 0 < peaks["gathered"] <= side.compaction
    assert 0 < peaks["running"] <= side.kept * blocks
    assert peaks["queries"] == side.queries


def test_pages_of_fitted_codecs_under_ours(
    model: str, tables: str, v1_fitted: Engine, request: pytest.FixtureRequest
) -> None:
    """The result is that of a CPU whose kernels multiply floats; those for AVX2 round queries to
    bytes."""
    extra: list[dict[str, Any]] = [{"kv_policy": p} for p in ("tc4", "none", "auto")]
    job = (prompts(150, 40, 170, seed=6), 5, extra)
    best = cpu.isa()
    request.addfinalizer(lambda: cpu.use_isa(best))
    cpu.use_isa("baseline")
    want = v1_fitted.run(*job)
    cpu.use_isa(best)
    engine = Engine(model, v2=True, tables=tables)
    assert engine.runner._layers[0].pages.fitted.codecs == FITTED
    got = engine.run(*job)
    assert [a.compactions > 0 for a in got] == [True, False, True]
    assert_equal(got, want)
    for answer in got:
        assert_slots_follow(answer)


def test_what_cannot_run_is_refused_in_a_sentence() -> None:
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    from vllm_kvcrush.engine.worker.backends import stock as backend_stock
    from vllm_kvcrush.engine.worker.backends import triton as backend_triton

    class Unknown:
        pass

    odd = [types.SimpleNamespace(impl=Unknown())]
    for refuse in (
        lambda: backend_stock.keep(odd),
        lambda: backend_triton.install(odd),
    ):
        with pytest.raises(ValueError, match=r"Unknown.*--attention-backend TRITON_ATTN"):
            refuse()
    good = [types.SimpleNamespace(impl=object.__new__(TritonAttentionImpl))]
    assert backend_triton.install(good).directory is not None
    assert type(good[0].impl).__name__ == "KVCrushTritonImpl"
