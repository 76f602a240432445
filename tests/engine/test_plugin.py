"""What the plugin does to vLLM's configuration, without starting an engine."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from vllm_kvcrush import gate
from vllm_kvcrush.config import Settings


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

    # A stat logger that is installed by entry point would turn stats on in every server.
    assert not [f for f in load_stat_logger_plugin_factories() if "kvcrush" in repr(f).lower()]


def test_with_a_policy_scheduler_and_worker_are_ours(configure: Any) -> None:
    config = configure(additional_config=ACTIVE, block_size=32)
    assert config.scheduler_config.scheduler_cls.startswith("vllm_kvcrush.engine.scheduler.")
    assert (
        config.parallel_config.worker_cls
        == "vllm_kvcrush.engine.worker.cpu_worker.KVCrushCPUWorker"
    )
    assert config.additional_config["kvcrush"]["config"]["window"] == 16


@pytest.mark.parametrize(
    ("kvcrush", "says"),
    [
        ({"policy": "kvcrush", "budget": 2.5}, "--kv-budget=2.5"),
        (
            {"policy": "crush"},
            "choose one of streaming, lacache, knorm, keydiff, lagkv, infinipot, snapkv, tova, "
            "h2o, expected_attention, gkv, rkv, critic, gui_kv, kvzip, kvcrush, mikv, adakv, "
            "keepkv, fair, rerotate, pyramidkv, cake, duo, surfacelogic, d2o, cam, composed, "
            "int8, int4, tc4, tc6, tc8, tada, gear, auto, none",
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


def test_what_costs_no_other_code_compiles_nothing_anew(configure: Any) -> None:
    """vLLM caches compiled models under this hash."""
    import dataclasses
    import pickle

    from vllm.config.utils import replace

    def key(**kvcrush: Any) -> str:
        active = {"policy": "kvcrush", "budget": 0.25, **kvcrush}
        return configure(additional_config={"kvcrush": active}, block_size=32).compute_hash()

    first = key()
    changes = ({"budget": 0.5}, {"budget": 512, "policy": "int4"}, {"config": {"window": 8}})
    assert {key(**change) for change in changes} == {first}
    config = configure(additional_config={**ACTIVE, "other": 1}, block_size=32)
    assert config.compute_hash() not in (first, configure(block_size=32).compute_hash())
    # It stays what it is wherever vLLM copies it to, also to its workers.
    for copy in (replace(config), dataclasses.replace(config), pickle.loads(pickle.dumps(config))):
        assert copy.compute_hash() == config.compute_hash()
        assert copy.additional_config["kvcrush"] == config.additional_config["kvcrush"]
        assert copy.additional_config["other"] == 1


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("kv-policy-allow: [int8, int4]\n", ()),
        ("kv-policy-allow:\n- int8\n- int4\n", ()),
        ("kv-policy-allow: int8,int4\n", ()),
        ("kv-policy-allow: int8, int4\n", ()),
        ("", ("--kv-policy-allow", "int8", "int4")),
        ("", ("--kv-policy-allow=int8,int4",)),
        ("", ("--kv-policy-allow", "int8,int4", "--seed=1")),
    ],
)
def test_policies_as_a_list_and_as_a_string(
    text: str, rest: tuple[str, ...], model_path: str, tmp_path: pathlib.Path
) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    path = tmp_path / "serve.yaml"
    path.write_text(
        text
        + f"""
model: {model_path}
kv-policy: auto
kv-budget: 0.5
kv-min-tokens: 64
kv-policy-config:
  window: 8
  kvcrush: {{anchor: mean}}
"""
    )
    parser = FlexibleArgumentParser()
    make_arg_parser(parser.add_subparsers().add_parser("serve"))
    args = parser.parse_args(["serve", "--config", str(path), *rest])
    given = AsyncEngineArgs.from_cli_args(args)
    assert (args.model_tag, args.model) == (None, model_path), "no policy is taken for the model"
    settings = Settings.from_dict(given.additional_config["kvcrush"])
    assert settings.allow == ("auto", "int8", "int4")
    assert (settings.budget, settings.min_tokens, settings.window) == (0.5, 64, 8)
    assert settings.options == {"kvcrush": {"anchor": "mean"}}


def test_stale_tables_in_the_default_place_are_one_warning(
    configure: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, model_path: str
) -> None:
    from vllm_kvcrush import plugin
    from vllm_kvcrush.codecs.transform import tables as transform_tables
    from vllm_kvcrush.codecs.transform.tables import model_config

    monkeypatch.setenv("VLLM_KVCRUSH_CACHE", str(tmp_path))
    place = transform_tables.default_path(model_config(model_path))
    assert place is not None
    place.parent.mkdir()
    place.write_bytes(b"from another release")
    said: list[str] = []
    monkeypatch.setattr(plugin.logger, "warning", lambda form, *args: said.append(form % args))
    config = configure(
        additional_config={"kvcrush": {"policy": "streaming"}}, block_size=32
    ).additional_config["kvcrush"]
    assert config["fitted"] == {} and len(said) == 1
    assert f"Transform tables are not used: {place} is damaged" in said[0]
    with pytest.raises(ValueError, match=r"--kv-policy=auto: .* is damaged"):
        configure(additional_config={"kvcrush": {"policy": "auto"}}, block_size=32)


def test_a_cache_of_another_type_is_refused(configure: Any) -> None:
    asked: dict[str, Any] = {"additional_config": ACTIVE, "kv_cache_dtype": "bfloat16"}
    configure(**asked, dtype="bfloat16")
    with pytest.raises(ValueError, match="of another type than the model's, bfloat16 beside float"):
        configure(**asked)


# Small models as their configurations describe them; what refuses each of them.
SMALL = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMALL}
MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": (LLAMA, []),
    "llama without rope_theta": ({**LLAMA, "rope_scaling": None}, []),
    "heads of 100": ({**LLAMA, "head_dim": 100}, ["heads of 100 channels"]),
    "gpt-oss": (
        {
            **SMALL,
            "model_type": "gpt_oss",
            "architectures": ["GptOssForCausalLM"],
            "head_dim": 64,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        ["sliding-window attention", "attention sinks that are weights"],
    ),
    "gemma 2": (
        {
            **SMALL,
            "model_type": "gemma2",
            "architectures": ["Gemma2ForCausalLM"],
            "head_dim": 64,
            "attn_logit_softcapping": 50.0,
            "sliding_window": 4096,
        },
        ["soft-capped attention scores", "sliding-window attention"],
    ),
    "qwen3-next": (
        {
            **SMALL,
            "model_type": "qwen3_next",
            "architectures": ["Qwen3NextForCausalLM"],
            "head_dim": 64,
            "full_attention_interval": 2,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_value_head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        ["Mamba, linear-attention or hybrid layers"],
    ),
    "granite with sinks": (
        {
            **SMALL,
            "model_type": "granite",
            "architectures": ["GraniteForCausalLM"],
            "attention_sinks": True,
        },
        ["attention sinks that are weights"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_plan_and_server_refuse_the_same_models(
    name: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_kvcrush.codecs.transform import tables as transform_tables
    from vllm_kvcrush.codecs.transform.tables import model_config
    from vllm_kvcrush.tools import cli

    written, words = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(written))
    status = cli.main(["plan", str(tmp_path), "--context", "2048", "--block-size", "32"])
    said = capsys.readouterr().err
    assert status == (2 if words else 0), said
    arguments = EngineArgs(
        model=str(tmp_path),
        skip_tokenizer_init=True,
        enforce_eager=True,
        block_size=32,
        max_model_len=2048,
        additional_config=ACTIVE,
    )
    if words:
        with pytest.raises(ValueError, match="--kv-policy cannot run with: ") as caught:
            arguments.create_engine_config()
        for word in words:
            assert word in said and word in str(caught.value)
        return
    config = arguments.create_engine_config().model_config.hf_text_config.to_dict()
    # Tools find the tables that the server looks for.
    assert transform_tables.default_path(model_config(tmp_path)) == transform_tables.default_path(
        config
    )


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
    monkeypatch.setattr(gate, "distribution", lambda: ("vllm", "0.34.1"))
    assert configure().scheduler_config.scheduler_cls is None
    with pytest.raises(ValueError, match=r"vllm 0\.34\.1 was not verified"):
        configure(additional_config=ACTIVE, block_size=32)


def test_a_vllm_that_was_changed_is_refused_only_with_a_policy(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_kvcrush.compat import check

    monkeypatch.setattr(check, "refusal", lambda: "vLLM 0.32.9 is not what it was.")
    assert configure().scheduler_config.scheduler_cls is None
    with pytest.raises(ValueError, match=r"vLLM 0\.32\.9 is not what it was"):
        configure(additional_config=ACTIVE, block_size=32)


def test_the_size_of_a_block_is_final_before_anything_follows_from_it(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.33 chooses it after the model is loaded, and until then has 16."""
    from vllm.platforms.cpu import CpuPlatform

    from vllm_kvcrush import plugin

    def choose_late(vllm_config: Any) -> None:
        if not vllm_config.cache_config.user_specified_block_size:
            vllm_config.cache_config.block_size = 16

    check = CpuPlatform.check_and_update_config

    @staticmethod
    def check_and_update_config(vllm_config: Any) -> None:
        check(vllm_config)
        choose_late(vllm_config)

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", check_and_update_config)
    said: list[str] = []
    monkeypatch.setattr(plugin.logger, "info", lambda form, *args: said.append(form % args))
    assert configure().cache_config.block_size == 16
    config = configure(additional_config={"kvcrush": {"policy": "int4"}})
    assert config.cache_config.block_size == gate.CPU_BLOCK_SIZE == 128
    assert any("blocks of 128 tokens" in line for line in said)
    choose_late(config)
    assert config.cache_config.block_size == 128, "nobody chooses another one later"
    with pytest.raises(ValueError, match="smallest budget is 384"):
        configure(additional_config={"kvcrush": {"policy": "kvcrush", "budget": 64}})
    assert configure(additional_config=ACTIVE, block_size=32).cache_config.block_size == 32
