"""Modes that need another engine: asynchronous scheduling, tensor parallelism, LoRA."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import pytest

from tests.engine.conftest import BLOCK
from tests.engine.modes import run, save_adapter

pytestmark = pytest.mark.engine

POLICIES = ("streaming", "snapkv", "h2o", "kvcrush", "tova", "cam", "cake", "d2o", "fair(tova)")
MEASURED = ("tc6", "auto", "mikv")  # with tables from statistics at start-up
NAMES = (*POLICIES, *MEASURED, "none", "lopsided")


def engine_arguments(model: str, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": BLOCK,
        "max_model_len": 2048,
        "kv_cache_memory_bytes": 256 * 2**20,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 16,
        "additional_config": {
            "kvcrush": {
                "policy": "kvcrush",
                "budget": 0.25,
                "min_tokens": 0,
                "config": {"prefill_interval": 256, "decode_interval": 32},
            }
        },
        **more,
    }


LOPSIDED = """
from dataclasses import dataclass
from typing import ClassVar

from vllm.distributed import get_tensor_model_parallel_rank
from vllm_kvcrush.policies.kvcrush import KVCrush

@dataclass
class Lopsided(KVCrush):
    '''Goes wrong on the second rank only, in each layer in another way.'''

    name: ClassVar[str] = "lopsided"

    def score(self, view):
        if self._second() and view.layer == 0:
            raise RuntimeError("a rank of its own")
        return super().score(view)

    def select(self, view, scores, keep):
        kept = super().select(view, scores, keep)
        if self._second() and view.layer == 1:
            raise RuntimeError("after a collective")
        if self._second() and view.layer == 2:
            view.all_heads(scores)
        return kept

    @staticmethod
    def _second():
        try:
            return get_tensor_model_parallel_rank() == 1
        except AssertionError:  # a front end has no ranks
            return False
"""


@pytest.fixture(scope="module", autouse=True)
def third_party(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Installs a package with a policy of its own."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "lopsided.py").write_text(LOPSIDED)
    about = folder / "lopsided-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lopsided\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[vllm_kvcrush.policies]\nlopsided = lopsided:Lopsided\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def tiny_job(ids: list[int]) -> dict[str, Any]:
    prompts = [ids[900 + i * 50 : 1300 + i * 50] for i in range(len(NAMES))]
    spans = {"fair(tova)": {"kv_spans": "0:90,90:200,200:400"}}
    extra = [{"kv_policy": name, **spans.get(name, {})} for name in NAMES]
    return {"prompts": prompts, "max_tokens": 40, "extra": extra}


def run_tiny(
    tiny_model: str,
    jobs: list[dict[str, Any]],
    tmp_path: pathlib.Path,
    *flags: str,
    ranks: int = 1,
    **arguments: Any,
) -> dict[str, Any]:
    engine = engine_arguments(tiny_model, tensor_parallel_size=ranks, **arguments)
    engine["additional_config"]["kvcrush"]["policy"] = "auto"
    result: dict[str, Any] = run(
        tmp_path,
        {"engine": engine, "jobs": jobs},
        *flags,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )
    return result


@pytest.fixture(scope="module")
def alone(
    tiny_model: str, tiny_job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Returns the answers of one rank, in eager mode and with synchronous scheduling."""
    result = run_tiny(tiny_model, [tiny_job], tmp_path_factory.mktemp("alone"))
    assert not result["async"] and "KVCrushScheduler" in result["scheduler"]
    answers: list[dict[str, Any]] = result["jobs"][0]
    assert all(a["details"]["compactions"] >= 1 for a in answers[:-2])
    assert "policy_failures" not in answers[-1]["details"]
    assert len({tuple(a["tokens"]) for a in answers}) > 1
    return answers


def assert_same(
    names: tuple[str, ...], wanted: list[dict[str, Any]], found: list[dict[str, Any]]
) -> None:
    """Asserts that the answers are the same, of policies whose tables and losses were measured up
    to a token: sums in another order may round a key or a value to another code, which may change a
    near tie of the random model."""
    turned = []
    for name, a, b in zip(names, wanted, found, strict=True):
        assert a["details"] == b["details"], name
        if a["tokens"] != b["tokens"]:
            turned.append(name)
            assert a["tokens"][0] == b["tokens"][0], name
    assert set(turned) <= set(MEASURED), turned


def test_tensor_parallel_ranks_agree(
    tiny_model: str, tiny_job: dict[str, Any], alone: list[dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    both = run_tiny(tiny_model, [tiny_job], tmp_path, ranks=2)["jobs"][0]
    assert_same(NAMES[:-1], alone[:-1], both[:-1])
    # A policy that fails on one of them hangs none.
    assert len(both[-1]["tokens"]) == tiny_job["max_tokens"]
    details = both[-1]["details"]
    assert details["policy_failures"] == details["compactions"] >= 1


def test_a_compiled_model_gives_the_same_tokens(
    tiny_model: str, tiny_job: dict[str, Any], alone: list[dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    """A server without --enforce-eager runs such a model."""
    compiled = run_tiny(tiny_model, [tiny_job], tmp_path, enforce_eager=False)["jobs"][0]
    assert_same(NAMES, alone, compiled)


def test_asynchronous_scheduling_and_lora(
    tiny_model: str,
    tiny_job: dict[str, Any],
    alone: list[dict[str, Any]],
    ids: list[int],
    tmp_path: pathlib.Path,
) -> None:
    """In an engine with both, requests without an adapter get the tokens of synchronous scheduling,
    and those with one are compacted too."""
    part = {"prompts": [ids[300:700]], "max_tokens": 30, "extra": [{}]}
    with_adapter = {**part, "lora": save_adapter(tiny_model, tmp_path)}
    result = run_tiny(
        tiny_model,
        [tiny_job, with_adapter, part, with_adapter],
        tmp_path,
        "--async",
        enable_lora=True,
        max_lora_rank=8,
    )
    assert result["async"] and "KVCrushAsyncScheduler" in result["scheduler"]
    answers, (with_lora,), (without,), (again,) = result["jobs"]
    for policy, a, b in zip(NAMES, alone, answers, strict=True):
        assert a["tokens"] == b["tokens"], policy
        assert a["details"] == b["details"]
    assert with_lora["details"]["compactions"] >= 1 and without["details"]["compactions"] >= 1
    # The prefix cache keeps adapters apart, and the same adapter repeats itself.
    assert with_lora["tokens"] == again["tokens"] != without["tokens"]
