"""The kernel benchmark: a wrong kernel must be found out, and figures must follow from times."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import __main__ as main
from benchmarks.kernels import cases, compaction, timing, worker
from benchmarks.kernels.bandwidth import Reader
from benchmarks.kernels.candidates import (
    Candidate,
    TorchSdpa,
    VllmBf16,
    VllmBf16Evicted,
)
from benchmarks.kernels.cases import PAGE, SHAPES, Case, Shape
from benchmarks.kernels.check import WrongResult, attention, check, check_ragged, error
from benchmarks.kernels.registry import BASELINE, CANDIDATES
from benchmarks.report import Run
from tests.pairwise import parametrize
from vllm_kvcrush import policies
from vllm_kvcrush.policies import choice

SMALL = Shape(6, 2, 32)
MB, GB = 2**20, 2**30
SIZES = {"copies": MB, "read": MB, "flush": False}


@pytest.fixture
def run(tmp_path: pathlib.Path) -> Run:
    return Run("kernels", argparse.Namespace(json=tmp_path / "k.json", quick=True, restart=False))


# -- the check ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7])
def test_oracle_agrees_with_torch(count: int) -> None:
    n = 50
    queries = torch.randn(count, 6, 32, dtype=torch.float64)
    keys, values = torch.randn(2, 2, n, 32, dtype=torch.float64)
    wanted = F.scaled_dot_product_attention(
        queries.transpose(0, 1),
        keys.repeat_interleave(3, 0),
        values.repeat_interleave(3, 0),
        attn_mask=torch.arange(n) <= torch.arange(n - count, n).unsqueeze(1),
        scale=0.3,
    ).transpose(0, 1)
    torch.testing.assert_close(attention(queries, keys, values, 0.3), wanted)


@parametrize(shape=[SMALL, *SHAPES.values()], kind=CANDIDATES, query_len=[1, 512])
def test_candidates_are_right(kind: type[Candidate], shape: Shape, query_len: int) -> None:
    check_ragged(kind, shape, query_len, 0)


class Forgetful(TorchSdpa):
    """Does not see the newest token."""

    name = "forgetful"

    def run(self, index: int, out: Tensor) -> None:
        kept = self._held
        self._held = [[[p[:, :, :-1] for p in kv] for kv in copy] for copy in kept]
        masks, self._masks = self._masks, [None] * len(self._masks)
        super().run(index, out)
        self._held, self._masks = kept, masks


class Unwritten(TorchSdpa):
    """Leaves the last head as it was."""

    name = "unwritten"

    def run(self, index: int, out: Tensor) -> None:
        whole = torch.empty_like(out)
        super().run(index, whole)
        out[:, :-1] = whole[:, :-1]


class FirstCopy(TorchSdpa):
    """Ignores which copy it is asked for."""

    name = "first-copy"

    def run(self, index: int, out: Tensor) -> None:
        super().run(0, out)


class MixedHeads(TorchSdpa):
    """Reads the KV heads in the wrong order."""

    name = "mixed-heads"

    def run(self, index: int, out: Tensor) -> None:
        super().run(index, out)
        out.copy_(out.flip(1).clone())


class Unscaled(TorchSdpa):
    """Its logits are 2 % too large."""

    name = "unscaled"

    def run(self, index: int, out: Tensor) -> None:
        kept, self.queries = self.queries, self.queries * 1.02
        super().run(index, out)
        self.queries = kept


class Acausal(TorchSdpa):
    """Attends to later tokens; in decode there are none."""

    name = "acausal"

    def run(self, index: int, out: Tensor) -> None:
        masks, self._masks = self._masks, [None] * len(self._masks)
        super().run(index, out)
        self._masks = masks


@pytest.mark.parametrize("kind", [Unwritten, FirstCopy, MixedHeads, Unscaled], ids=lambda c: c.name)
@pytest.mark.parametrize("query_len", [1, 8])
def test_wrong_kernels_are_found_out(kind: type[Candidate], query_len: int) -> None:
    with pytest.raises(WrongResult, match=f"{kind.name} is wrong on lengths"):
        check_ragged(kind, SMALL, query_len, 0)


def test_a_kernel_that_looks_ahead_is_found_out() -> None:
    with pytest.raises(WrongResult, match="acausal"):
        check_ragged(Acausal, SMALL, 8, 0)


def test_the_timed_case_is_checked_too() -> None:
    """A kernel may be right on short sequences only."""

    class Short(TorchSdpa):
        name = "short"

        def run(self, index: int, out: Tensor) -> None:
            super().run(index, out)
            out[-1] *= 1 + 0.001 * (max(self.case.lengths) > 1000)

    case = Case(SMALL, [1200, 1200])
    with pytest.raises(
        WrongResult, match=r"short is wrong on 2 sequences of 1200 tokens: .*1\.0e-03"
    ):
        check(Short(case, case.float32_bytes), 0)


def test_forgetting_one_token_shows() -> None:
    case = Case(SMALL, [300, 2])
    found = error(Forgetful(case, case.float32_bytes), 0, range(2))
    assert found > 100 * TorchSdpa.tolerance


# -- candidates and cases -----------------------------------------------------------------------


def test_evicting_reads_a_quarter_of_the_tokens() -> None:
    case = Case(SMALL, [1024] * 2)
    whole, quarter = VllmBf16(case, 2**20), VllmBf16Evicted(case, 2**20)
    assert whole.bytes_read == 2 * 1024 * 2 * 2 * 32 * 2
    assert quarter.bytes_read / whole.bytes_read == pytest.approx(0.25, abs=0.01)
    assert quarter.held(0, 1)[0].shape == (2, quarter.lengths[1], 32)
    # A chunk's own tokens are never evicted while they attend.
    assert VllmBf16Evicted(Case(SMALL, [512], 256), 1).lengths == [256 + 64]


@pytest.mark.parametrize("kind", CANDIDATES, ids=lambda c: c.name)
def test_copies_fill_the_working_set(kind: type[Candidate]) -> None:
    case = Case(SMALL, [PAGE * 2])
    candidate = kind(case, 10**6)
    assert 10**6 <= candidate.sets * candidate.bytes_read < 10**6 + candidate.bytes_read
    first, last = (candidate.held(i, 0)[0] for i in (0, candidate.sets - 1))
    assert not torch.equal(first, last)


def machine(monkeypatch: pytest.MonkeyPatch, cache: int, free: int) -> None:
    monkeypatch.setattr(cases, "cache_bytes", lambda: cache)
    monkeypatch.setattr(cases, "free_bytes", lambda: free)


def test_copies_outgrow_the_cache_where_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for known in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        assert cases.cache_bytes() >= 1024 * int(known.read_text().strip().rstrip("K"))
    assert 0 < cases.free_bytes() < 2**50
    machine(monkeypatch, 32 * MB, 64 * GB)
    assert cases.sizes([5 * MB] * 14) == cases.Sizes(192 * MB, 192 * MB, False)
    machine(monkeypatch, 300 * MB, 64 * GB)
    assert cases.sizes([5 * MB] * 14) == cases.Sizes(1200 * MB, 1200 * MB, False)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("free", [24 * GB, 4 * GB, GB])
@pytest.mark.parametrize("cache", [300 * MB, 32 * MB])
def test_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch, cache: int, free: int, quick: bool
) -> None:
    """Whatever the size of the CPU's cache, no more than half of the free memory is used, and data
    is cold."""
    machine(monkeypatch, cache, free)
    once = [5 * MB] * 14
    found = cases.sizes(once, quick)
    assert found.read + sum(found.copies + n for n in once) <= free // 2
    assert found.flush == (found.copies < 4 * cache)
    assert found.cut is None or found.cut > found.copies
    if quick:
        assert found.copies <= 128 * MB
    with pytest.raises(cases.TooLarge, match=r"needs \d.* GB, and may take"):
        cases.sizes([free // 4] * 3, quick)


def test_what_memory_does_not_allow_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, 300 * MB, 3 * GB)
    args = argparse.Namespace(
        shapes=["llama"], contexts=[128, 32768], batches=[1], codecs=["raw"], rounds=3, quick=False
    )
    wanted = list(main.jobs(args))
    said = capsys.readouterr().err
    assert ("decode", 32768) not in [(t, w["context"]) for t, w, _ in wanted]
    assert "decode {'shape': 'llama', 'batch': 1, 'context': 32768} is left out: it needs" in said
    assert "memory: the copies of each kernel's data take" in said
    assert ("decode", 128) in [(t, w["context"]) for t, w, _ in wanted]


# -- timing -------------------------------------------------------------------------------------


def test_bursts_go_round_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(timing, "now", lambda: (float(next(clock)), 0.5 * next(clock)))
    seen: list[int] = []
    burst = timing.Burst(seen.append, 3, 7.0)  # a call seems to take 2 seconds: 4 a burst
    assert seen == [0, 1]
    parts = burst()
    assert seen == [0, 1, 2, 0, 1, 2]
    assert parts == {"call": (2.0 / 4, 1.0 / 4)}


def test_a_flushed_burst_reads_no_copy_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(timing, "now", lambda: (float(next(clock)), 0.5 * next(clock)))
    seen: list[int] = []
    burst = timing.Burst(seen.append, 3, 70.0, lambda: seen.append(-1))
    assert seen == [-1, 0, -1, 1]
    burst()
    assert seen[4:] == [-1, 2, 0, 1]


def test_turns_are_taken_in_changing_order() -> None:
    order: list[str] = []

    def burst(name: str) -> Any:
        return lambda: (order.append(name), {"call": (1.0, 1.0)})[1]

    found = timing.take_turns({name: burst(name) for name in "abc"}, 8)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 1
    assert {name: len(parts) for name, parts in found.items()} == {"a": 8, "b": 8, "c": 8}


def test_quartiles_and_ratios() -> None:
    assert timing.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0)
    assert timing.ratios([2.0, 30.0], [1.0, 10.0]) == [2.0, 3.0]
    with pytest.raises(ValueError):
        timing.ratios([1.0], [1.0, 2.0])


def test_reader_reads_what_it_says() -> None:
    read = Reader(2**20 + 3)
    assert read.bytes == 2**20
    read(0)


# -- end to end ---------------------------------------------------------------------------------


def test_a_tiny_decode_case_end_to_end(run: Run) -> None:
    names = [BASELINE.name, "vllm-fp32"]
    job = {"kind": "attention", "shape": "smol", "lengths": [200, 200], "query_len": 1}
    result = worker.handle(
        {**job, "names": names, "rounds": 3, "seconds": 0.001, "sizes": SIZES | {"flush": True}}
    )
    assert list(result["candidates"]) == names
    report = main.Report(run, 1)
    lines = report.attention("decode", {"shape": "smol", "batch": 2, "context": 200}, result)
    report.bandwidth()
    assert [line[4] for line in lines] == names
    rows = {(r["policy"], r["metric"]): r for r in run.rows}
    speedup = rows["vllm-fp32", "speedup_vs_vllm_bf16"]
    assert speedup["mode"] == "smol,batch=2,threads=1" and speedup["n"] == 3
    assert 0 < speedup["low"] <= speedup["value"] <= speedup["high"]
    assert rows[BASELINE.name, "bandwidth_share"]["value"] > 0
    assert rows[BASELINE.name, "relative_error"]["value"] < VllmBf16.tolerance
    assert (BASELINE.name, "speedup_vs_vllm_bf16") not in rows
    assert rows[result["read"]["way"], "read_bytes_per_s"]["task"] == "bandwidth"


def test_figures_follow_from_times(run: Run) -> None:
    """A noisy round slows everything in it, which changes no ratio or share. One thread is timed by
    the CPU clock, two by the wall clock."""
    noise = [1.0, 4.0, 2.0]

    def calls(wall: float, cpu: float) -> list[list[float]]:
        return [[wall * n, cpu * n] for n in noise]

    result = {
        "read": {"calls": calls(2.0, 1.0), "bytes": 1000, "way": "sum"},
        "candidates": {
            "vllm-bf16": {"calls": calls(4.0, 2.0), "bytes": 500, "error": 1e-3},
            "vllm-bf16-evicted-4x": {"calls": calls(2.0, 0.5), "bytes": 125, "error": 1e-3},
        },
    }
    where = {"shape": "smol", "batch": 1, "context": 64}
    expected = {1: (4.0, 0.25), 2: (2.0, 0.25)}
    for threads in (1, 2):
        run.rows.clear()
        main.Report(run, threads).attention("decode", where, result)
        rows = {(r["policy"], r["metric"]): r for r in run.rows}
        speedup = rows["vllm-bf16-evicted-4x", "speedup_vs_vllm_bf16"]
        share = rows["vllm-bf16", "bandwidth_share"]
        assert (speedup["value"], share["value"]) == expected[threads]
        assert speedup["low"] == speedup["high"] == speedup["value"]
        assert speedup["budget"] == 0.25 and speedup["codec"] == "raw"
    run.rows.clear()
    main.Report(run, 1).attention("prefill", where, result)
    assert not [r for r in run.rows if r["metric"] == "bandwidth_share"]


@pytest.mark.parametrize("name", compaction.POLICIES)
def test_the_compaction_that_is_timed_is_the_plugins(name: str) -> None:
    case = Case(SMALL, [1000], 64)
    layers = compaction.Layers(case, case.float32_bytes)
    assert layers.sets == 2
    assert not torch.equal(*(layers.view(i, frozenset()).keys for i in range(2)))
    assert layers.candidates == (1000 - 16) // PAGE * PAGE  # the window stays raw
    assert layers.keep == 2 * PAGE  # a quarter of 1000 is too little for window and sinks
    policy, spent = policies.get(name), {}
    kept = layers.compact(policy, 1, spent)
    view = layers.view(1, policy.needs)
    keep = torch.full((2,), layers.keep)
    assert torch.equal(kept, policy.select(view, choice.scored(policy, view)[0], keep))
    assert kept[:, :4].all() and kept.sum(1).tolist() == [layers.keep] * 2
    assert set(spent) == set(compaction.STAGES)
    assert spent["total"][0] >= spent["score"][0] + spent["select"][0] > 0


def test_compaction_end_to_end(run: Run) -> None:
    job = {"kind": "compaction", "shape": "smol", "context": 600}
    result = worker.handle({**job, "rounds": 2, "seconds": 0.001, "sizes": SIZES})
    lines = main.Report(run, 1).compaction({"shape": "smol", "batch": 1, "context": 600}, result)
    assert [line[3] for line in lines] == list(compaction.POLICIES)
    row = next(r for r in run.rows if r["policy"] == "kvcrush" and "stage=select" in r["mode"])
    assert row["mode"] == "smol,batch=1,threads=1,stage=select"
    assert row["metric"] == "seconds" and row["value"] > 0 and row["n"] == 2


def test_filters(capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(
        shapes=["llama"], contexts=[128, 2048], batches=[1, 8], codecs=["raw"], rounds=3, quick=True
    )
    wanted = list(main.jobs(args))
    assert [(t, w["batch"], w["context"]) for t, w, _ in wanted] == [
        ("decode", 1, 128),
        ("decode", 1, 2048),
        ("decode", 8, 128),
        ("decode", 8, 2048),
        ("prefill", 1, 4096),
        ("compaction", 1, 2048),
    ]
    assert "128 tokens is never compacted" in capsys.readouterr().err
    args.codecs = []
    assert next(main.jobs(args))[2]["names"] == [BASELINE.name]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threads", "4096"], "there are"),
        (["--contexts", "0"], "0 is not 1 or more"),
        (["--codecs", "int3"], "invalid choice"),
    ],
)
def test_bad_arguments(
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["kernels", *flags])
    with pytest.raises(SystemExit) as caught:
        main.parse()
    assert caught.value.code == 2 and message in capsys.readouterr().err
