"""Modes that need another engine: asynchronous scheduling, tensor parallelism, LoRA."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from tests.engine.conftest import BLOCK, ENVIRONMENT, HERE, Engine

pytestmark = pytest.mark.engine

POLICIES = ("streaming", "snapkv", "h2o", "kvcrush")
MEASURED = ("tc6", "auto", "mikv")  # with tables from statistics at start-up


def run(tmp_path: pathlib.Path, job: dict[str, Any], *flags: str, **environment: str) -> Any:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(HERE / "run_mode.py"), str(path), *flags],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **ENVIRONMENT, **environment},
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    assert lines, done.stderr[-4000:] + done.stdout[-2000:]
    return json.loads(lines[0].removeprefix("RESULT "))


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


def test_asynchronous_scheduling_gives_the_same_tokens(
    engine: Engine, ids: list[int], model_path: str, tmp_path: pathlib.Path
) -> None:
    prompts = [ids[300:800], ids[900:1100], ids[1200:1520]]
    extra: list[dict[str, Any]] = [{"kv_budget": 160}, {"kv_policy": "none"}, {"kv_policy": "h2o"}]
    expected = [
        list(r.outputs[0].token_ids)
        for r in engine.generate(prompts, [engine.params(70, **e) for e in extra])
    ]
    job = {"prompts": prompts, "max_tokens": 70, "extra": extra}
    result = run(
        tmp_path,
        {"engine": engine_arguments(model_path), "jobs": [job]},
        "--async",
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )
    assert result["async"] and "KVCrushAsyncScheduler" in result["scheduler"]
    (answers,) = result["jobs"]
    assert [a["tokens"] for a in answers] == expected
    assert [a["details"]["compactions"] for a in answers] == [4, 0, 3]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, model_path: str) -> str:
    """A small random Llama with 4 KV heads, so that two ranks own two each."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(path)
    return str(path)


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
    """An installed package with a policy of its own."""
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
    names = (*POLICIES, *MEASURED, "none", "lopsided")
    prompts = [ids[i * 50 : i * 50 + 400] for i in range(len(names))]
    extra = [{"kv_policy": name} for name in names]
    return {"prompts": prompts, "max_tokens": 40, "extra": extra}


def run_tiny(
    tiny: str, job: dict[str, Any], tmp_path: pathlib.Path, ranks: int = 1, **arguments: Any
) -> list[dict[str, Any]]:
    cores = [str(core) for core in sorted(os.sched_getaffinity(0)) * 2]
    engine = engine_arguments(tiny, tensor_parallel_size=ranks, **arguments)
    engine["additional_config"]["kvcrush"]["policy"] = "auto"
    answers: list[dict[str, Any]] = run(
        tmp_path,
        {"engine": engine, "jobs": [job]},
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        # One memory node holds both ranks here, which vLLM does not bind by itself.
        VLLM_CPU_OMP_THREADS_BIND="|".join(cores[:ranks]),
    )["jobs"][0]
    return answers


@pytest.fixture(scope="module")
def alone(
    tiny: str, tiny_job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """One rank, eager."""
    answers = run_tiny(tiny, tiny_job, tmp_path_factory.mktemp("alone"))
    assert all(a["details"]["compactions"] >= 1 for a in answers[:-2])
    assert "policy_failures" not in answers[-1]["details"]
    assert len({tuple(a["tokens"]) for a in answers}) > 1
    return answers


def test_tensor_parallel_ranks_agree(
    tiny: str, tiny_job: dict[str, Any], alone: list[dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    both = run_tiny(tiny, tiny_job, tmp_path, ranks=2)
    for policy, a, b in zip((*POLICIES, *MEASURED, "none"), alone[:-1], both[:-1], strict=True):
        assert a["tokens"] == b["tokens"], policy
        assert a["details"] == b["details"]
    # A policy that fails on one of them hangs none.
    assert len(both[-1]["tokens"]) == tiny_job["max_tokens"]
    details = both[-1]["details"]
    assert details["policy_failures"] == details["compactions"] >= 1


def test_a_compiled_model_gives_the_same_tokens(
    tiny: str, tiny_job: dict[str, Any], alone: list[dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    """What a server without --enforce-eager does."""
    compiled = run_tiny(tiny, tiny_job, tmp_path, enforce_eager=False)
    for policy, a, b in zip(
        (*POLICIES, *MEASURED, "none", "lopsided"), alone, compiled, strict=True
    ):
        assert a["tokens"] == b["tokens"], policy
        assert a["details"] == b["details"]


def test_lora_requests_are_compacted(
    tiny: str, ids: list[int], tmp_path: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapter = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny),
        LoraConfig(
            r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        ),
    )
    model.save_pretrained(adapter)
    prompt = ids[300:700]
    part = {"prompts": [prompt], "max_tokens": 30}
    result = run(
        tmp_path,
        {
            "engine": engine_arguments(tiny, enable_lora=True, max_lora_rank=8),
            "jobs": [
                {**part, "extra": [{}], "lora": str(adapter)},
                {**part, "extra": [{}]},
                {**part, "extra": [{}], "lora": str(adapter)},
            ],
        },
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )
    with_lora, without, again = (job[0] for job in result["jobs"])
    assert with_lora["details"]["compactions"] >= 1 and without["details"]["compactions"] >= 1
    # The prefix cache keeps adapters apart, and the same adapter repeats itself.
    assert with_lora["tokens"] == again["tokens"] != without["tokens"]
