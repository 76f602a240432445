"""The V2 runner on two ranks, with LoRA: an engine in processes of its own."""

from __future__ import annotations

import pathlib
from typing import Any

from tests.engine.modes import run, save_adapter
from tests.gpu.v2.engine import Engine, arguments
from tests.gpu.v2.test_runner import prompts

# Choices by a head alone, by all heads together, unequal pages, log biases, and shards of tables.
POLICIES = ("snapkv", "int4", "tova", "keepkv(adakv(h2o))", "auto", "none")


def test_two_ranks_and_lora(
    model: str, tables: str, v2_fitted: Engine, tmp_path: pathlib.Path
) -> None:
    texts = prompts(140, 150, 130, 160, 145, 60, seed=11)
    extra: list[dict[str, Any]] = [{"kv_policy": policy} for policy in POLICIES]
    alone = v2_fitted.run(texts, 6, extra)
    job = {"prompts": texts, "max_tokens": 6, "extra": extra}
    adapted = {
        "prompts": texts[:1],
        "max_tokens": 6,
        "extra": extra[:1],
        "lora": save_adapter(model, tmp_path),
    }
    engine = arguments(model, tables=tables) | {"enable_lora": True, "max_lora_rank": 8}
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    both = run(
        tmp_path,
        {"engine": engine | ranks, "jobs": [job, adapted]},
        VLLM_USE_V2_MODEL_RUNNER="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )
    answers, (with_lora,) = both["jobs"]
    assert [a["tokens"] for a in answers] == [a.tokens for a in alone]
    assert [a["details"]["compactions"] for a in answers] == [a.compactions for a in alone]
    assert not any("policy_failures" in a["details"] for a in answers)
    # An adapter changes what is said, as it does under V1.
    first = run(tmp_path, {"engine": engine, "jobs": [adapted]}, VLLM_USE_V2_MODEL_RUNNER="0")
    assert with_lora["tokens"] == first["jobs"][0][0]["tokens"] != answers[0]["tokens"]
    assert with_lora["details"]["compactions"] == answers[0]["details"]["compactions"] >= 1
