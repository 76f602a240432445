"""What `register` does to a vLLM, without one: stand-ins for its `EngineArgs`."""

from __future__ import annotations

import argparse
import logging
import sys
import types
from dataclasses import dataclass, field
from types import SimpleNamespace as Namespace
from typing import Any, ClassVar

import pytest
from torch import Tensor

from vllm_kvcrush import gate, plugin, policies
from vllm_kvcrush.config import ConfigError, Settings
from vllm_kvcrush.policies import View
from vllm_kvcrush.policies.snapkv import SnapKV


def make_engine_args() -> Any:
    @dataclass
    class EngineArgs:
        model: str = "m"
        additional_config: Any = field(default_factory=dict)

        @staticmethod
        def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser.add_argument("--additional-config", type=plugin._json_object, default={})
            parser.add_argument("model")
            return parser

        @classmethod
        def from_cli_args(cls, args: argparse.Namespace) -> Any:
            return cls(args.model, args.additional_config)

        def create_engine_config(self, usage_context: Any = None, headless: bool = False) -> Any:
            return Namespace(additional_config=self.additional_config)

    return EngineArgs


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(plugin, "_not_ours", set())
    monkeypatch.setattr(plugin, "_problem", None)
    monkeypatch.setattr(gate, "distribution", lambda: ("vllm", "0.32.0"))
    # vLLM and others, once imported, keep lines of its loggers from pytest.
    logger = logging.getLogger("tests.kvcrush")
    logger.setLevel(logging.WARNING)
    monkeypatch.setattr(plugin, "logger", logger)
    # Another test checks what the real vLLM has.
    monkeypatch.setattr(plugin.server, "wrap", lambda owner, name, make: None)
    monkeypatch.setattr(plugin.server, "register", lambda: None)


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns the list of the settings that `configure` is called with, which takes any
    configuration."""
    calls: list[Any] = []
    monkeypatch.setattr(plugin, "configure", lambda config, settings: calls.append(settings))
    return calls


def register(monkeypatch: pytest.MonkeyPatch, engine_args: Any) -> Any:
    """Registers with a vLLM that has this `EngineArgs`, or none."""
    module = types.ModuleType("vllm.engine.arg_utils")
    if engine_args is not None:
        module.EngineArgs = engine_args  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", module)
    plugin.register()
    return engine_args


def parse(engine_args: Any, *argv: str) -> Any:
    parser = argparse.ArgumentParser(exit_on_error=True)
    return engine_args.from_cli_args(engine_args.add_cli_args(parser).parse_args(list(argv)))


def without(name: str) -> Any:
    engine_args = make_engine_args()
    delattr(engine_args, name)
    return engine_args


def odd(name: str, value: Any) -> Any:
    engine_args = make_engine_args()
    setattr(engine_args, name, value)
    return engine_args


@pytest.mark.parametrize(
    "engine_args",
    [
        None,
        Namespace(),
        without("add_cli_args"),
        without("from_cli_args"),
        without("create_engine_config"),
        odd("add_cli_args", None),
        odd("from_cli_args", staticmethod(lambda: None)),
        odd("create_engine_config", lambda self: None),
    ],
)
def test_a_vllm_without_a_place_for_us_goes_on(
    engine_args: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = dict(vars(engine_args)) if engine_args is not None else {}
    with caplog.at_level(logging.WARNING):
        register(monkeypatch, engine_args)
        plugin.register()
    (line,) = caplog.messages
    assert "stays out of it: no request is compressed" in line and "\n" not in line
    if isinstance(engine_args, type):
        after = dict(vars(engine_args))
        # None of the three is wrapped if one cannot be.
        for name in ("add_cli_args", "from_cli_args", "create_engine_config"):
            assert after.get(name) is before.get(name)
        assert engine_args(model="x").additional_config == {}
        # But settings that nothing would follow are refused.
        with pytest.raises(plugin.Refused, match="cannot be followed: vllm-kvcrush finds no"):
            engine_args(additional_config={"kvcrush": {"policy": "int4"}})


def test_flags_that_vllm_has_itself_are_left_to_it(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    configured: list[Any],
) -> None:
    engine_args = make_engine_args()
    add = engine_args.add_cli_args

    def with_its_own(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add(parser).add_argument("--kv-budget")
        return parser

    engine_args.add_cli_args = staticmethod(with_its_own)
    register(monkeypatch, engine_args)
    made = parse(engine_args, "--kv-budget=7GiB", "m")
    assert made.additional_config == {}
    assert "this vLLM has flags of the same name: kv_budget" in caplog.text
    made.create_engine_config()
    with pytest.raises(SystemExit):
        parse(engine_args, "--kv-policy=int4", "m")


def test_without_a_policy_nothing_changes(
    monkeypatch: pytest.MonkeyPatch, configured: list[Any]
) -> None:
    engine_args = register(monkeypatch, make_engine_args())
    made = parse(engine_args, "m")
    assert vars(made) == {"model": "m", "additional_config": {}}
    assert made.create_engine_config("context", headless=True).additional_config == {}
    assert configured == []


@pytest.mark.parametrize("name", ["wrap", "register"])
def test_a_vllm_whose_front_end_is_another_serves_without_us(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    configured: list[Any],
) -> None:
    def broken(*args: Any) -> None:
        raise AttributeError("no such thing in this vLLM")

    monkeypatch.setattr(plugin.server, name, broken)
    engine_args = register(monkeypatch, make_engine_args())
    (line,) = caplog.messages
    assert "stays out of it" in line and "no such thing" in line
    made = parse(engine_args, "m")
    assert made.create_engine_config().additional_config == {}
    # Whoever asks for a policy is refused.
    with pytest.raises(ValueError, match="no such thing"):
        engine_args(additional_config={"kvcrush": {"policy": "int4"}}).create_engine_config()
    with pytest.raises(SystemExit) as caught:
        parse(engine_args, "--kv-policy=int4", "m")
    assert caught.value.code == 2 and configured == []
    said = capsys.readouterr().err
    # Either vLLM does not know the flag, or we say why it cannot be followed.
    assert "no such thing" in said or "unrecognized arguments: --kv-policy" in said


def test_policies_with_one_name_do_not_stop_the_parser(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm_kvcrush import policies

    def clash() -> tuple[str, ...]:
        raise ValueError("entry points a:A and b:B both bring a policy 'x'")

    monkeypatch.setattr(policies, "names", clash)
    engine_args = register(monkeypatch, make_engine_args())
    assert parse(engine_args, "m").model == "m"
    with pytest.raises(SystemExit):
        parse(engine_args, "--kv-policy=int4", "m")
    assert "--kv-policy cannot be used: entry points a:A and b:B" in capsys.readouterr().err


def test_an_engine_args_of_flags_can_be_made_of_its_fields(
    monkeypatch: pytest.MonkeyPatch,
    configured: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`LLM.from_engine_args`, which `vllm bench latency` and `throughput` use, does so."""
    engine_args = register(monkeypatch, make_engine_args())
    made = parse(engine_args, "--kv-policy=int4", "--kv-budget=0.5", "m")
    again = engine_args(**vars(made))
    assert again == made
    config = again.create_engine_config(Namespace(name="LLM_CLASS"))
    assert config.additional_config["kvcrush"]["policy"] == "int4"
    assert [settings.policy for settings in configured] == ["int4"]
    # What is found later is one sentence there, too.
    monkeypatch.setattr(plugin, "configure", refuse)
    with pytest.raises(SystemExit):
        again.create_engine_config()
    assert capsys.readouterr().err == "vllm: error: not with this.\n"
    # Whoever gives it in code gets an exception.
    with pytest.raises(plugin.Refused, match="not with this"):
        engine_args(
            additional_config={"kvcrush": {"policy": "int4"}},
        ).create_engine_config()


def refuse(config: Any, settings: Any) -> None:
    raise plugin.Refused("not with this.")


def given(engine_args: Any, *argv: str) -> Any:
    return parse(engine_args, *argv).additional_config["kvcrush"]


def test_flags_and_additional_config_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    engine_args = register(monkeypatch, make_engine_args())
    extra = '--additional-config={"kvcrush": {"policy": "int4", "budget": 0.5}, "other": 1}'
    made = parse(engine_args, extra, "--kv-budget=0.125", "--kv-min-tokens=64", "m")
    assert made.additional_config == {
        "kvcrush": {"policy": "int4", "budget": "0.125", "min_tokens": "64"},
        "other": 1,
    }
    every = given(
        engine_args,
        "m",
        "--kv-policy=int4",
        "--kv-budget-max=0.5",
        '--kv-policy-config={"window": 8}',
        "--kv-policy-allow",
        "int8",
        "int4",
    )
    assert every == {
        "policy": "int4",
        "budget_max": "0.5",
        "config": {"window": 8},
        "allow": ["int8", "int4"],
    }
    assert given(engine_args, "--kv-policy=int4", "--kv-policy-allow=int8,int4", "m")["allow"] == [
        "int8,int4"
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--kv-budget=0.5"], "add --kv-policy=kvcrush"),
        (["--kv-policy=nope"], "--kv-policy='nope' is not a policy"),
        (["--kv-policy=int4", "--kv-min-tokens=few"], "--kv-min-tokens='few' is not allowed"),
        (["--kv-policy=int4", "--kv-policy-allow=nope,int8"], "--kv-policy-allow='nope' is not"),
        (
            ["--kv-policy=int4", "--kv-policy-allow="],
            "--kv-policy-allow='' lacks a policy's name: choose",
        ),
        (['--additional-config={"kvcrush": 3}'], "configured without a policy"),
    ],
)
def test_bad_flags_are_one_sentence(
    argv: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine_args = register(monkeypatch, make_engine_args())
    with pytest.raises(SystemExit) as caught:
        parse(engine_args, *argv, "m")
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


# -- policies that fail before anybody asked for them ----------------------------------------------


@dataclass
class Broken(SnapKV):
    name: ClassVar[str] = "broken"

    def select(self, view: View, scores: Tensor, keep: Tensor) -> Tensor:
        return ~super().select(view, scores, keep - 1)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(policies._CLASSES, "broken", Broken)


@pytest.mark.parametrize(
    ("asked", "key"),
    [({"policy": "broken"}, "--kv-policy"), ({"allow": "snapkv,broken"}, "--kv-policy-allow")],
)
def test_a_policy_that_fails_its_dry_run_is_refused(
    broken: None, asked: dict[str, Any], key: str
) -> None:
    settings = Settings.from_dict({"policy": "snapkv", **asked})
    with pytest.raises(ConfigError, match=f"{key}: the policy broken fails: .*as many slots"):
        plugin._tried(settings, 32)


def test_a_policy_that_needs_an_unknown_rotary_embedding_is_refused() -> None:
    named = Settings.from_dict({"policy": "kvcrush(expected_attention)"})
    with pytest.raises(ConfigError, match=r"--kv-policy: .* rotary embedding"):
        plugin._tried(named, 32, with_rope=False)
    tried, warnings = plugin._tried(Settings.from_dict({"policy": "snapkv"}), 32, with_rope=False)
    left_out = {"expected_attention", "rerotate", "duo", "surfacelogic"}
    assert len(warnings) == len(left_out) and not left_out & set(tried.allow)
    assert "keydiff" in tried.allow


def test_a_second_pass_is_for_the_operator_to_allow() -> None:
    settings = Settings.from_dict({"policy": "snapkv"})
    assert "kvzip" not in settings.allow
    assert plugin._tried(settings, 32, no_repeat="there is none") == (settings, [])
    for asked in ({"policy": "kvcrush(kvzip)"}, {"policy": "snapkv", "allow": "kvzip,none"}):
        named = Settings.from_dict(asked)
        assert plugin._tried(named, 32) == (named, [])
        with pytest.raises(
            ConfigError, match=r"the policy (kvcrush\()?kvzip.* fails: there is none"
        ):
            plugin._tried(named, 32, no_repeat="there is none")


def test_what_cannot_repeat_a_context_is_named() -> None:
    config = Namespace(
        use_v2_model_runner=False,
        lora_config=None,
        scheduler_config=Namespace(async_scheduling=False),
        parallel_config=Namespace(tensor_parallel_size=1, data_parallel_size=1),
        model_config=Namespace(
            is_multimodal_model=False, enable_prompt_embeds=False, skip_tokenizer_init=False
        ),
    )
    assert gate.no_repeat(config) is None
    config.use_v2_model_runner, config.parallel_config.tensor_parallel_size = True, 2
    assert gate.no_repeat(config) == (
        "the model cannot repeat its context with the V2 model runner and several ranks"
    )
    config.use_v2_model_runner, config.parallel_config.tensor_parallel_size = False, 1
    config.parallel_config.data_parallel_size = 2
    assert str(gate.no_repeat(config)).endswith("with several ranks")
    config.parallel_config.data_parallel_size, config.lora_config = 1, object()
    config.scheduler_config.async_scheduling = True
    for option in vars(config.model_config):
        setattr(config.model_config, option, True)
    assert str(gate.no_repeat(config)).endswith(
        "with asynchronous scheduling and LoRA and a multimodal model and prompt embeddings and "
        "--skip-tokenizer-init"
    )


def test_a_policy_that_nobody_named_is_left_out_with_a_warning(broken: None) -> None:
    settings = Settings.from_dict({"policy": "snapkv"})
    assert "broken" in settings.allow
    tried, (warning,) = plugin._tried(settings, 32)
    assert set(settings.allow) - set(tried.allow) == {"broken"}
    assert "clients may not ask for the policy broken" in warning
    every, none = plugin._tried(tried, 32)
    assert every.allow == tried.allow and not none
