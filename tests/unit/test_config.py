"""Settings, budgets and request parameters."""

from __future__ import annotations

import json

import pytest

from vllm_kvcrush.config import ConfigError, RequestParams, Settings, parse_budget

BLOCK, LONGEST = 16, 8192


def settings(**raw: object) -> Settings:
    return Settings.from_dict({"policy": "kvcrush", **raw})


def refused(made: Settings, **extra_args: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        made.validate_request(extra_args, BLOCK, LONGEST)
    return caught.value


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        (0.25, 0.25),
        ("0.25", 0.25),
        (1, 1.0),
        (1.0, 1.0),
        ("1", 1.0),
        (" 4096 ", 4096),
        (4096, 4096),
        (4096.0, 4096),
        (2**31 - 1, 2**31 - 1),
        (1e-9, 1e-9),
    ],
)
def test_budgets(given: object, budget: float) -> None:
    parsed = parse_budget(given, "--kv-budget")
    assert parsed == budget
    # A fraction and a number of tokens are told apart by type.
    assert type(parsed) is type(budget)


@pytest.mark.parametrize(
    "given",
    [0, 0.0, -1, -0.5, 1.5, 4096.5, 2**31, 10**30, True, False, None, [], {}, "", "many", "nan",
     "inf", "-3", "0", "25%", "²", float("nan"), float("inf")],
)  # fmt: skip
def test_bad_budgets_name_the_parameter(given: object) -> None:
    with pytest.raises(ConfigError, match=r"--kv-budget=.* is not a KV budget: give") as caught:
        parse_budget(given, "--kv-budget")
    assert caught.value.key == "--kv-budget"


def test_defaults() -> None:
    made = settings()
    assert (made.policy, made.budget, made.budget_max) == ("kvcrush", 0.25, None)
    assert set(made.allow) == {"none", "streaming", "snapkv", "h2o", "kvcrush", "int8", "int4"}


def test_round_trip_through_json() -> None:
    made = settings(
        budget="512",
        budget_max=0.5,
        allow="snapkv, none",
        config={"window": "8", "sinks": 0, "kvcrush": {}},
    )
    again = Settings.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    assert made.allow == ("kvcrush", "snapkv", "none")  # the default policy is always allowed
    assert (made.window, made.sinks, made.budget) == (8, 0, 512)


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ({"policy": "nope"}, "--kv-policy"),
        ({"policy": ["kvcrush"]}, "--kv-policy"),
        ({"budget": 0}, "--kv-budget"),
        ({"budget_max": "x"}, "--kv-budget-max"),
        ({"allow": "kvcrush,nope"}, "--kv-policy-allow"),
        ({"allow": 5}, "--kv-policy-allow"),
        ({"typo": 1}, "typo"),
        ({"config": [1]}, "--kv-policy-config"),
        ({"config": {"typo": 1}}, "--kv-policy-config"),
        ({"config": {"none": {}}}, "--kv-policy-config"),
        ({"config": {"window": 0}}, "--kv-policy-config.window"),
        ({"config": {"window": True}}, "--kv-policy-config.window"),
        ({"config": {"window": 1.5}}, "--kv-policy-config.window"),
        ({"config": {"sinks": -1}}, "--kv-policy-config.sinks"),
        ({"config": {"prefill_interval": 15}}, "--kv-policy-config.prefill_interval"),
        ({"config": {"decode_interval": 0}}, "--kv-policy-config.decode_interval"),
        ({"config": {"kvcrush": 3}}, "--kv-policy-config.kvcrush"),
        ({"config": {"kvcrush": {"typo": 1}}}, "--kv-policy-config.kvcrush"),
        ({"config": {"h2o": {"typo": 1}}}, "--kv-policy-config.h2o"),
    ],
)
def test_bad_settings_name_the_flag(raw: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**raw)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


def test_start_up_refuses_what_no_request_could_use() -> None:
    settings(budget=48).check(BLOCK, LONGEST)
    with pytest.raises(ConfigError, match="smallest budget is 48"):
        settings(budget=47).check(BLOCK, LONGEST)
    with pytest.raises(ConfigError, match="--kv-budget-max=8 tokens is too small"):
        settings(budget=48, budget_max=8).check(BLOCK, LONGEST)
    with pytest.raises(ConfigError, match="above --kv-budget-max"):
        settings(budget=0.5, budget_max=0.25).check(BLOCK, LONGEST)


def test_a_request_takes_defaults_and_overrides() -> None:
    made = settings()
    assert made.validate_request(None, BLOCK, LONGEST) == RequestParams("kvcrush", 0.25)
    asked = {"kv_policy": "h2o", "kv_budget": "64", "other": object(), "kv_transfer_params": {}}
    assert made.validate_request(asked, BLOCK, LONGEST) == RequestParams("h2o", 64)
    assert made.validate_request({"kv_budget": None}, BLOCK, LONGEST).budget == 0.25


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ({"kv_buget": 0.5}, "kv_buget"),
        ({"kv_policy": "nope"}, "kv_policy"),
        ({"kv_policy": 3}, "kv_policy"),
        ({"kv_policy": {"a": 1}}, "kv_policy"),
        ({"kv_budget": 0}, "kv_budget"),
        ({"kv_budget": 47}, "kv_budget"),
        ({"kv_budget": [0.5]}, "kv_budget"),
    ],
)
def test_bad_requests_name_the_parameter(asked: dict[str, object], key: str) -> None:
    error = refused(settings(), **asked)
    assert error.key == key
    assert key in str(error)
    assert str(error).endswith(".")


def test_only_allowed_policies() -> None:
    made = settings(allow=["snapkv"])
    made.validate_request({"kv_policy": "kvcrush"}, BLOCK, LONGEST)
    made.validate_request({"kv_policy": "snapkv"}, BLOCK, LONGEST)
    assert refused(made, kv_policy="none").key == "kv_policy"


@pytest.mark.parametrize(
    ("cap", "within", "above"),
    [
        (0.5, 0.5, 0.51),
        (0.5, LONGEST // 2, LONGEST // 2 + 1),
        (1024, 1024, 1025),
        (1024, 1024 / LONGEST, 1025 / LONGEST),
    ],
)
def test_a_cap_compares_fractions_and_tokens(cap: float, within: float, above: float) -> None:
    made = settings(budget=0.1, budget_max=cap)
    made.validate_request({"kv_budget": within}, BLOCK, LONGEST)
    assert refused(made, kv_budget=above).key == "kv_budget"
    # Opting out would be the largest budget of all.
    assert refused(made, kv_policy="none").key == "kv_policy"
    assert refused(made, kv_budget=1.0).key == "kv_budget"


def test_inactive_requests_have_a_raw_plan() -> None:
    made = settings()
    for params in (RequestParams("none", 0.25), RequestParams("kvcrush", 1.0)):
        assert not params.active
        assert made.plan(params, 1000, BLOCK).never
    active = made.plan(RequestParams("kvcrush", 0.25), 1000, BLOCK)
    assert not active.never
    assert (active.window, active.sinks, active.num_prompt_tokens) == (16, 4, 1000)


def test_a_budget_without_a_policy_is_refused() -> None:
    settings = Settings.from_dict({"policy": "none"})
    with pytest.raises(ConfigError, match="name a kv_policy") as caught:
        settings.validate_request({"kv_budget": 0.5}, 32, 4096)
    assert caught.value.key == "kv_budget"
    assert settings.validate_request({"kv_budget": 0.5, "kv_policy": "h2o"}, 32, 4096).active
    assert not settings.validate_request({"kv_budget": 1.0}, 32, 4096).active
    assert not settings.validate_request({}, 32, 4096).active
