"""What the plugin does to vLLM's configuration, without starting an engine."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_kvcrush import gate


@pytest.fixture
def configure(model_path: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    def create(**more: Any) -> Any:
        arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, **more}
        return EngineArgs(model=model_path, **arguments).create_engine_config()

    return create


ACTIVE = {"kvcrush": {"policy": "kvcrush", "budget": 0.25}}


def test_without_a_policy_nothing_changes(configure: Any) -> None:
    config = configure()
    assert config.additional_config == {}
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories

    # One installed by entry point would turn stats on in every server.
    assert not [f for f in load_stat_logger_plugin_factories() if "kvcrush" in repr(f).lower()]


def test_with_a_policy_scheduler_and_worker_are_ours(configure: Any) -> None:
    config = configure(additional_config=ACTIVE, block_size=32)
    assert config.scheduler_config.scheduler_cls.startswith("vllm_kvcrush.engine.scheduler.")
    assert config.parallel_config.worker_cls == "vllm_kvcrush.engine.worker.KVCrushCPUWorker"
    assert config.additional_config["kvcrush"]["config"]["window"] == 16


@pytest.mark.parametrize(
    ("kvcrush", "says"),
    [
        ({"policy": "kvcrush", "budget": 2.5}, "--kv-budget=2.5"),
        (
            {"policy": "crush"},
            "choose one of streaming, snapkv, h2o, kvcrush, int8, int4, tc4, tc6, tc8, auto, mikv, "
            "none",
        ),
        ({"budget": 0.5}, "add --kv-policy=kvcrush"),
        ({"policy": "kvcrush", "bugdet": 0.5}, "bugdet"),
        ({"policy": "kvcrush", "budget": 64}, "smallest budget is 96"),
        ({"policy": "kvcrush", "budget": 0.5, "budget_max": 0.25}, "--kv-budget-max=0.25"),
    ],
)
def test_bad_settings_are_one_sentence(configure: Any, kvcrush: Any, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        configure(additional_config={"kvcrush": kvcrush}, block_size=32)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_all_offenders_are_named_at_once(configure: Any) -> None:
    with pytest.raises(ValueError) as caught:
        configure(
            additional_config=ACTIVE,
            block_size=32,
            enable_chunked_prefill=False,
            max_num_batched_tokens=2048,
            scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler",
        )
    assert "prompts read in one piece" in str(caught.value)
    assert "scheduler class vllm.v1.core.sched.scheduler.Scheduler" in str(caught.value)


def test_an_unverified_vllm_is_refused_only_with_a_policy(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "distribution", lambda: ("vllm", "0.33.1"))
    assert configure().scheduler_config.scheduler_cls is None
    with pytest.raises(ValueError, match=r"vllm 0\.33\.1 was not verified"):
        configure(additional_config=ACTIVE, block_size=32)
