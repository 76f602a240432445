"""The device benchmark without a device: what crashes and hangs cost, and which figures follow."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import pathlib
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_device import flash, kernels, machine, serving, suite
from benchmarks.gpu_device.cases import FLASH, OURS, Case, cases
from benchmarks.gpu_device.suite import Journal
from benchmarks.kernels.check import attention
from benchmarks.report import ROOT, Run
from benchmarks.serving.__main__ import parser
from vllm_kvcrush import gate

CASE = Case("decode", "llama", 8, 8192, 1, (FLASH, *OURS))


@pytest.fixture
def run(tmp_path: pathlib.Path) -> Run:
    args = argparse.Namespace(json=tmp_path / "g.json", quick=False, restart=False)
    return Run("gpu_device", args)


def write(path: pathlib.Path, *lines: dict[str, Any], end: str = "") -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


# -- correctness ---------------------------------------------------------------------------------


def ended(test: str, outcome: str, message: str = "") -> dict[str, Any]:
    return {"test": test, "outcome": outcome, "seconds": 1.0, "message": message}


def test_a_journal_tells_what_is_left(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "journal"
    assert Journal.read(path).collected == []
    write(
        path,
        {"collected": ["a", "b", "c"]},
        {"began": "a"},
        ended("a", "passed"),
        {"began": "b"},
        end='{"test": "b", "outc',  # killed while it wrote this line
    )
    known = Journal.read(path)
    assert known.left == ["b", "c"] and known.running == "b"


def test_a_failing_teardown_is_a_failure(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "journal"
    write(path, {"collected": ["a"]}, ended("a", "passed"), ended("a", "failed", "late"))
    assert Journal.read(path).tests["a"]["message"] == "late"
    write(path, {"collected": ["a"]}, ended("a", "failed", "first"))
    assert Journal.read(path).tests["a"]["outcome"] == "failed"


def suite_of(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, body: str) -> pathlib.Path:
    """Makes a folder of tests that is taken for the repository, and returns the path of its
    journal."""
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    (folder / "test_it.py").write_text(f"import os, time\n{body}")
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    # Here the plugin comes from the repository, which is not the folder that the tests run in.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path / "journal"


def test_a_crash_and_a_hang_cost_one_test_each(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = (
        "def test_a(): pass\ndef test_b(): os._exit(3)\ndef test_c(): assert False, 'wrong'\n"
        "def test_d(): time.sleep(600)\ndef test_e(): pass\n"
    )
    path = suite_of(tmp_path, monkeypatch, body)
    monkeypatch.setattr(suite, "_TEST_SECONDS", 3)
    known = suite.run(path, ["test_it.py"], interpret=True, seconds=120)
    found = suite.summary(known)
    outcomes = [list(counts) for counts in found["groups"].values()]
    assert outcomes == [["passed"], ["failed"], ["failed"], ["failed"], ["passed"]]
    messages = {f["test"].split("::")[1]: f["message"] for f in found["failures"]}
    assert messages.keys() == {"test_b", "test_c", "test_d"}
    assert "ended with status 3" in messages["test_b"] and "wrong" in messages["test_c"]
    assert messages["test_d"] == "hung"


def test_what_is_known_is_not_run_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = suite_of(tmp_path, monkeypatch, "def test_a(): assert False\ndef test_b(): pass\n")
    a, b = (f"tests/gpu/test_it.py::test_{x}" for x in "ab")
    write(path, {"collected": [a, b]}, {"began": a}, ended(a, "passed"))
    known = suite.run(path, ["test_it.py"], interpret=True, seconds=60)
    assert [known.tests[x]["outcome"] for x in (a, b)] == ["passed", "passed"]
    began = time.monotonic()
    suite.run(path, ["test_it.py"], interpret=True, seconds=60)
    assert time.monotonic() - began < 1  # no process was started


def test_without_time_nothing_is_run(tmp_path: pathlib.Path) -> None:
    known = suite.run(tmp_path / "journal", ["test_it.py"], interpret=True, seconds=0)
    assert not known.collected and not known.tests


def test_messages_name_no_paths() -> None:
    text = f"{ROOT}/tests/gpu/x.py and {pathlib.Path.home()}/y"
    assert machine.anonymous(text, ROOT) == "./tests/gpu/x.py and ~/y"


# -- kernels -------------------------------------------------------------------------------------


def candidate(seconds: float, **more: Any) -> dict[str, Any]:
    times = {"eager": [2 * seconds] * 3, "graph": [seconds] * 3}
    return {
        **{"bytes": 1e6, "flops": 4e6, "error": None, "notes": [], "version": None},
        **{"seconds": times, **more},
    }


class FakeWorker:
    """Breaks at every request that contains one of `broken`, as a device that a kernel broke."""

    def __init__(self, *broken: str):
        self.broken, self.asked = broken, []  # type: tuple[str, ...], list[list[str]]

    def ask(self, timeout: float, kind: str, case: dict[str, Any], **_: Any) -> Any:
        names = list(case["candidates"])
        self.asked.append(names)
        if set(names) & set(self.broken):
            raise SystemExit(f"{ROOT}: an illegal memory access")
        found = {name: candidate(1e-5) for name in names if name != FLASH}
        missing = {FLASH: "not importable"} if FLASH in names else {}
        return {"candidates": found, "missing": missing, "copy": [1e12] * 3, "product": [1e12] * 3}


def test_one_candidate_that_breaks_the_device_hides_no_other(run: Run) -> None:
    worker: Any = FakeWorker("int8")
    result = kernels.measure(worker, CASE, {}, 1)
    assert worker.asked == [[FLASH, *OURS], [FLASH], ["raw"], ["int8"], ["int4"]]
    assert result["missing"] == {FLASH: "not importable", "int8": ".: an illegal memory access"}
    kernels.add_rows(run, {CASE: result})
    seconds = {r["policy"]: r["value"] for r in run.rows if r["metric"] == "seconds"}
    assert seconds.pop(FLASH) is None and seconds.pop("kvcrush-int8") is None
    assert seconds == {"kvcrush-raw": 1e-5, "kvcrush-int4": 1e-5}
    assert all(r["n"] == 0 for r in run.rows if r["value"] is None)


def test_figures(run: Run) -> None:
    result = {
        "candidates": {FLASH: candidate(1e-5), "int4": candidate(4e-6, error=0.01)},
        "missing": {},
        "copy": [5e11] * 3,
        "product": [1e12] * 3,
    }
    prefill = Case("prefill", "llama", 1, 8192, 2048, (FLASH, "int4"))
    kernels.add_rows(run, {CASE: result, prefill: result})

    def value(task: str, metric: str, mode: str) -> float:
        (row,) = [
            r
            for r in run.rows
            if (r["task"], r["metric"], r["policy"]) == (task, metric, "kvcrush-int4")
            and r["mode"].endswith(mode)
        ]
        return float(row["value"])

    assert value("decode", "seconds", ",graph") == 4e-6
    assert value("decode", "seconds", ",eager") == 8e-6
    assert value("decode", "speedup_vs_flash_attention", ",graph") == pytest.approx(2.5)
    assert value("decode", "bandwidth_share", ",graph") == pytest.approx(0.5)
    assert value("prefill", "product_share", ",graph") == pytest.approx(1.0)
    assert value("decode", "relative_error", "rows=1") == 0.01
    limits = {r["metric"] for r in run.rows if r["task"] == "limits"}
    assert limits == {"copy_bytes_per_s", "product_flops_per_s"}
    shown = kernels.tables(run.rows)
    assert "| 4.0 µs | 50% | 2.50 |" in shown


def test_cases_out_of_time_are_named_and_finished_ones_kept(run: Run) -> None:
    worker: Any = FakeWorker()
    found, late = kernels.run_all(run, worker, False, None, time.monotonic() + 60)
    assert not late and len(found) == len(cases(False)) == len({c.name for c in found})
    again, late = kernels.run_all(run, worker, False, None, time.monotonic() - 60)
    assert again == found and not late  # an earlier run's
    fresh = Run(
        "gpu_device",
        argparse.Namespace(json=run.path.with_name("h.json"), quick=False, restart=False),
    )
    assert kernels.run_all(fresh, worker, False, None, time.monotonic() - 60) == (
        {},
        [c.name for c in cases(False)],
    )


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int,
    seqused_k: Tensor, max_seqlen_k: int, softmax_scale: float, causal: bool,
    block_table: Tensor, fa_version: int,
) -> None:  # fmt: skip
    """Computes in plain torch what FlashAttention does."""
    assert causal and fa_version == 3 and max_seqlen_k == int(seqused_k.max())
    for i, n in enumerate(seqused_k.tolist()):
        rows = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        assert rows.stop - rows.start == max_seqlen_q
        key, value = (x[block_table[i].long()].flatten(0, 1)[:n].transpose(0, 1) for x in (k, v))
        out[rows] = attention(q[rows], key, value, softmax_scale)


def test_flash_attention_is_asked_for_what_ours_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "load", lambda size: (paged_attention, 3))
    case = Case("prefill", "tiny", 2, 40, 5, (FLASH,), block_size=16)
    one = flash.Flash(case, torch.float32, "cpu", 1)
    (call,) = one.calls()
    call()
    for seq in range(2):
        rows = slice(5 * seq, 5 * seq + 5)
        want = attention(one.query[rows], *one.tokens(seq), 64**-0.5)
        torch.testing.assert_close(one.out[rows], want.float())
    # All of these are arguments of vLLM's own, which cannot be imported without a GPU's build.
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    source = pathlib.Path(spec.submodule_search_locations[0], "vllm_flash_attn")
    tree = ast.parse((source / "flash_attn_interface.py").read_text())
    (theirs,) = [
        {argument.arg for argument in node.args.args}
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "flash_attn_varlen_func"
    ]
    assert set(inspect.signature(paged_attention).parameters) <= theirs


@pytest.mark.parametrize("dry", [True, False])
def test_every_part_of_the_kernels_is_among_the_cases(dry: bool) -> None:
    found = cases(dry)
    tasks = {case.task for case in found}
    assert tasks == {"decode", "prefill", "store", "gather", "encode", "scores", "compact"}
    for case in found:
        assert case.rows <= case.context
        # Raw tokens of a call fit any card that serves such a model.
        assert case.batch * case.context <= 2**20


# -- serving -------------------------------------------------------------------------------------


def test_the_gate_decides_whether_the_pair_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gate.UNVERIFIED_GPU, raising=False)
    why = serving.refusal()
    assert why is not None and "platform cuda" in why and gate.UNVERIFIED_GPU in why
    monkeypatch.setenv(gate.UNVERIFIED_GPU, "1")
    why = serving.refusal()
    assert why is None or "platform" not in why


def test_the_pair_is_what_the_serving_benchmark_takes(tmp_path: pathlib.Path) -> None:
    args = parser().parse_args(serving.arguments(tmp_path, tmp_path / "s.json"))
    assert args.dtype == "bfloat16" and args.model == tmp_path
    assert "--attention-backend=TRITON_ATTN" in args.policy_flags
