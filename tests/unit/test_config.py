"""Settings, budgets and request parameters."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcrush import config, policies, spec
from vllm_kvcrush.codecs import PACKED
from vllm_kvcrush.codecs.transform import tables as transform_tables
from vllm_kvcrush.config import (
    AdditionalConfig,
    ConfigError,
    Demands,
    RequestParams,
    Settings,
    parse_budget,
    parse_spans,
)
from vllm_kvcrush.plan import Packing

BLOCK, LONGEST = 16, 8192
# Head sizes and bytes of a channel; what heads of a model of 60 hold in fitted pages of 128 tokens.
PAGE = [64, 64, 4]
FITTED = {"tc4": [[[752, 30], [816, 30]]], "tc8": [[[1312, 20], [1408, 40]]]}


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
    packing = ("int8", "int4", "tc4", "tc6", "tc8", "tada", "gear")
    usual = (name for name in policies.BUILT_IN if name not in policies.OPT_IN)
    assert made.allow == (*usual, *packing, "auto", "none")
    assert (made.page, made.fitted, made.tables) == (None, {}, None)
    assert (made.options, made.clients) == ({}, {})


def test_round_trip_through_json() -> None:
    made = settings(
        budget="512",
        budget_max=0.5,
        allow="snapkv, none",
        min_tokens="100",
        pressure="0.8",
        canary="0.001",
        protect_system="0.3",
        config={
            "window": "8",
            "sinks": 0,
            "kvcrush": {"base": {"policy": "snapkv", "pool": 3}},
            "tables": "model.safetensors",
            "clients": {"kvcrush": {"ratio": [0, 0.5], "anchor": ["mean", "random"]}},
        },
        page=PAGE,
        fitted=FITTED,
    )
    again = Settings.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    assert made.clients == {"kvcrush": {"ratio": [0, 0.5], "anchor": ["mean", "random"]}}
    assert made.allow == ("kvcrush", "snapkv", "none")  # the default policy is always allowed
    assert (made.window, made.sinks, made.budget, made.min_tokens) == (8, 0, 512, 100)
    assert made.pressure == 0.8 and made.canary == 0.001 and made.protect_system == 0.3
    assert (made.tables, made.page) == ("model.safetensors", (64, 64, 4))
    assert made.fitted == {"tc4": (((752, 30), (816, 30)),), "tc8": (((1312, 20), (1408, 40)),)}


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ({"policy": "nope"}, "--kv-policy"),
        ({"policy": ["kvcrush"]}, "--kv-policy"),
        ({"budget": 0}, "--kv-budget"),
        ({"budget_max": "x"}, "--kv-budget-max"),
        ({"allow": "kvcrush,nope"}, "--kv-policy-allow"),
        ({"allow": 5}, "--kv-policy-allow"),
        ({"allow": ""}, "--kv-policy-allow"),
        ({"allow": []}, "--kv-policy-allow"),
        ({"allow": ["kvcrush", 5]}, "--kv-policy-allow"),
        ({"min_tokens": -1}, "--kv-min-tokens"),
        ({"min_tokens": "few"}, "--kv-min-tokens"),
        ({"min_tokens": 0.5}, "--kv-min-tokens"),
        ({"min_tokens": 2**24 + 1}, "--kv-min-tokens"),
        ({"pressure": 0}, "--kv-pressure"),
        ({"pressure": "1.01"}, "--kv-pressure"),
        ({"pressure": "half"}, "--kv-pressure"),
        ({"pressure": True}, "--kv-pressure"),
        ({"pressure": float("nan")}, "--kv-pressure"),
        ({"canary": -0.1}, "--kv-canary"),
        ({"canary": "1.01"}, "--kv-canary"),
        ({"canary": "few"}, "--kv-canary"),
        ({"canary": True}, "--kv-canary"),
        ({"canary": float("nan")}, "--kv-canary"),
        ({"protect_system": -0.1}, "--kv-protect-system"),
        ({"protect_system": "1.01"}, "--kv-protect-system"),
        ({"protect_system": "system"}, "--kv-protect-system"),
        ({"protect_system": [0.5]}, "--kv-protect-system"),
        ({"protect_system": float("nan")}, "--kv-protect-system"),
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
        ({"config": {"tables": 3}}, "--kv-policy-config.tables"),
        ({"config": {"kvcrush": 3}}, "--kv-policy-config.kvcrush"),
        ({"config": {"kvcrush": {"typo": 1}}}, "--kv-policy-config.kvcrush"),
        ({"config": {"h2o": {"typo": 1}}}, "--kv-policy-config.h2o"),
        ({"config": {"kvcrush": {"base": "kvcrush"}}}, "--kv-policy-config.kvcrush"),
        ({"config": {"fair": {"base": "nope"}}}, "--kv-policy-config.fair"),
        ({"config": {"fair": {"base": "snapkv@int8"}}}, "--kv-policy-config.fair"),
        ({"policy": "kvcrush(ratio=7)"}, "--kv-policy"),
        ({"policy": "kvcrush(nope)"}, "--kv-policy"),
        ({"policy": "kvcrush(none)"}, "--kv-policy"),
        ({"policy": "snapkv(h2o)"}, "--kv-policy"),
        ({"policy": "kvcrush(snapkv"}, "--kv-policy"),
        ({"policy": "snapkv@int5"}, "--kv-policy"),
        ({"allow": "kvcrush(nope)"}, "--kv-policy-allow"),
        ({"allow": [{"policy": "fair", "base": "none"}]}, "--kv-policy-allow"),
        ({"config": {"clients": 5}}, "--kv-policy-config.clients"),
        ({"config": {"clients": {"kvcrush": 5}}}, "--kv-policy-config.clients"),
        ({"config": {"clients": {"nope": {}}}}, "--kv-policy-config.clients"),
        ({"config": {"clients": {"none": {}}}}, "--kv-policy-config.clients"),
        ({"config": {"clients": {"kvcrush": {"ratios": [0, 1]}}}}, "--kv-policy-config.clients"),
        ({"config": {"clients": {"kvcrush": {"base": ["h2o"]}}}}, "--kv-policy-config.clients"),
        ({"config": {"clients": {"streaming": {"x": [0, 1]}}}}, "--kv-policy-config.clients"),
        ({"config": {"clients": {"kvcrush": {"ratio": 0.5}}}}, "--kv-policy-config.clients"),
        ({"config": {"clients": {"kvcrush": {"ratio": []}}}}, "--kv-policy-config.clients"),
    ],
)
def test_bad_settings_name_the_flag(raw: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**raw)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "allow", ["int8,int4", "int8, int4", ["int8", "int4"], ["int8,int4"], ["int8", "int8,int4"]]
)
def test_a_list_of_policies_in_any_form(allow: object) -> None:
    assert settings(allow=allow).allow == ("kvcrush", "int8", "int4")


@pytest.mark.parametrize(
    "allow",
    [
        "fair( kvcrush( ratio=0.5,anchor=mean ) ),int8",
        ["fair(kvcrush(anchor=mean, ratio=0.5))", "int8"],
        [{"policy": "fair", "base": {"policy": "kvcrush", "ratio": 0.5, "anchor": "mean"}}, "int8"],
        '{"policy": "fair", "base": {"policy": "kvcrush(anchor=mean)", "ratio": 0.5}}, int8',
        'fair(kvcrush(anchor="mean", ratio=0.5)), int8',
    ],
)
def test_policies_with_parameters_in_any_form(allow: object) -> None:
    made = settings(allow=allow)
    assert made.allow == ("kvcrush", "fair(kvcrush(anchor=mean, ratio=0.5))", "int8")
    assert Settings.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_a_comma_in_quotes_parts_nothing() -> None:
    with pytest.raises(ConfigError, match=r"--kv-policy-allow='nope' is not a policy"):
        settings(allow='kvcrush(anchor="a, (b"), nope')
    # An anchor of that name fails where policies are built.
    assert settings(allow='kvcrush(anchor="a, (b"), int8').allow[1:] == (
        'kvcrush(anchor="a, (b")',
        "int8",
    )


def test_policies_with_one_name_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def clash() -> tuple[str, ...]:
        raise ValueError("entry points a:A and b:B both bring a policy 'x'")

    monkeypatch.setattr(policies, "names", clash)
    with pytest.raises(ConfigError, match="--kv-policy cannot be used: entry points a:A and b:B"):
        settings()


def test_the_floor_reaches_the_plan() -> None:
    made = settings(min_tokens=300)
    plan = made.plan(RequestParams("kvcrush", 0.25), 40, BLOCK)
    assert plan.min_tokens == 300 and plan.first_compaction(299) is None
    assert made.plan(RequestParams("kvcrush", 64), 40, BLOCK).first_compaction(299) == 168
    assert settings(min_tokens=0).plan(RequestParams("kvcrush", 0.25), 40, BLOCK).min_tokens == 0


@pytest.mark.parametrize("floor", [0, 1, 100, 700, 5000])
@pytest.mark.parametrize("budget", [0.1, 0.5, 1.0, 96])
def test_most_blocks_is_the_bound_of_every_prompt(floor: int, budget: float) -> None:
    made = settings(
        budget=budget,
        min_tokens=floor,
        config={"prefill_interval": 100, "decode_interval": 75},
    )
    for length in (1, 99, 100, 640, 1000):
        params = RequestParams(made.policy, made.budget)
        bounds = [made.plan(params, p, BLOCK).bound(length) for p in range(1, length + 1)]
        assert made.most_blocks(length, BLOCK) == max(bounds)


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


# -- policies with parameters, and what clients may set --------------------------------------------

CLIENTS = {
    "kvcrush": {"ratio": [0, 0.5], "anchor": ["mean", "random"]},
    "snapkv": {"pool": [1, 3, 7]},
    "fair": {"fairness": [0.5, 1]},
}


def served(made: Settings, policy: object, **more: object) -> RequestParams:
    return made.validate_request({"kv_policy": policy, **more}, BLOCK, LONGEST)


@pytest.mark.parametrize(
    ("asked", "policy"),
    [
        ("kvcrush", "kvcrush"),
        ("kvcrush()", "kvcrush"),
        ("kvcrush(ratio=0.5)", "kvcrush(ratio=0.5)"),
        ("kvcrush(ratio=0)", "kvcrush(ratio=0)"),
        ("kvcrush(anchor=mean,ratio=0.1)", "kvcrush(anchor=mean, ratio=0.1)"),
        ("fair(kvcrush(snapkv(pool=3)))", "fair(kvcrush(snapkv(pool=3)))"),
        ("fair(base=kvcrush, fairness=0.75)", "fair(kvcrush, fairness=0.75)"),
        ({"policy": "fair", "base": "kvcrush"}, "fair(kvcrush)"),
        ('{"policy": "kvcrush", "ratio": 0.25}', "kvcrush(ratio=0.25)"),
        # Allowed as it is written, whoever may set what.
        ("kvcrush(h2o, level=page)", "kvcrush(h2o, level=page)"),
        ("kvcrush(level=page,h2o)", None),
        ("kvcrush( base = h2o , level=page)", "kvcrush(h2o, level=page)"),
    ],
)
def test_what_clients_may_compose(asked: object, policy: str | None) -> None:
    made = settings(
        allow=["snapkv", "fair", "kvcrush(h2o, level=page)"], config={"clients": CLIENTS}
    )
    if policy is None:
        assert refused(made, kv_policy=asked).key == "kv_policy"
        return
    params = served(made, asked)
    assert params.policy == policy and params.active
    # Counters have few labels, however many parameters clients vary.
    assert params.label == policy.partition("(")[0]
    assert made.plan(params, 1000, BLOCK).budget == 0.25


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("h2o", "choose one of kvcrush, snapkv, fair, int8"),
        ("kvcrush(h2o)", "choose one of kvcrush"),
        ("fair(kvcrush(h2o))", "choose one of kvcrush"),
        ("none", "choose one of kvcrush"),
        ("kvcrush(none)", "choose one of kvcrush"),
        ("kvcrush(level=page)", "kvcrush.level is not for clients to set"),
        ("kvcrush(seed=1)", "kvcrush.seed is not for clients to set"),
        ("int8(ratio=0.1)", "int8.ratio is not for clients to set"),
        ("fair(kvcrush(ratio=0.6))", "kvcrush.ratio=0.6 is not from 0 to 0.5"),
        ("kvcrush(ratio=-1)", "kvcrush.ratio=-1 is not from 0 to 0.5"),
        ("kvcrush(ratio=true)", "kvcrush.ratio=True is not from 0 to 0.5"),
        ("kvcrush(ratio=mean)", "kvcrush.ratio='mean' is not from 0 to 0.5"),
        ("kvcrush(ratio=null)", "kvcrush.ratio=None is not from 0 to 0.5"),
        ("kvcrush(anchor=zeros)", "kvcrush.anchor='zeros' is not one of mean, random"),
        ("kvcrush(anchor=3)", "kvcrush.anchor=3 is not one of mean, random"),
        ("snapkv(pool=5)", "snapkv.pool=5 is not one of 1, 3, 7"),
        ("snapkv(pool=3.0)", "snapkv.pool=3.0 is not one of 1, 3, 7"),
        ("snapkv(pool=true)", "snapkv.pool=True is not one of 1, 3, 7"),
        ("snapkv(kvcrush)", "snapkv wraps no other policy, so not kvcrush either"),
        ("kvcrush@int4", "no policy that is stores tokens in int4"),
        ("kvcrush@int8+tc4", "no policy that is stores tokens in tc4"),
        ("kvcrush@int9", "it names the codec 'int9', which is not one of raw, int8"),
        ("kvcrush(", "it lacks a policy's name; choose one of kvcrush"),
        ("", "it lacks a policy's name; choose one of"),
        ("kvcrush; snapkv", "it cannot be read from '; snapkv' on; choose one of"),
        ("fair(" * 5 + "kvcrush" + ")" * 5, "it wraps policies more than 4 deep; choose one of"),
        ("k" * 300, "it is longer than 256 characters; choose one of"),
        ({"base": "kvcrush"}, 'it has no "policy" with a name; choose one of'),
        (["kvcrush"], "it is not a policy's name; choose one of"),
        (None, "it is not a policy's name; choose one of"),
        pytest.param(10**5000, "it is not a policy's name; choose one of", id="digits"),
    ],
)
def test_what_clients_may_not_compose(asked: object, why: str) -> None:
    made = settings(allow=["snapkv", "fair", "int8"], config={"clients": CLIENTS})
    error = refused(made, kv_policy=asked)
    assert error.key == "kv_policy"
    assert f" is not served here: {why}" in str(error)
    assert str(error).endswith(".") and len(str(error)) < 300 and "\n" not in str(error)


def test_clients_may_store_in_the_codecs_that_are_served() -> None:
    made = settings(allow=["int8", "fair"], page=PAGE)
    params = made.validate_request({"kv_policy": "fair(kvcrush)@int8"}, 128, LONGEST)
    assert params.policy == "fair(kvcrush)@int8" and params.label == "fair"
    assert [p.codec for p in made.plan(params, 1000, 128).packings] == ["int8"]
    raw = made.validate_request({"kv_policy": "int8@raw"}, 128, LONGEST)
    assert made.plan(raw, 1000, 128).packings == ()
    # Only where regions may have pages of their own are they read.
    plain = settings(allow=["fair", "streaming"])
    assert not plain.owns_pages
    assert refused(plain, kv_policy="fair@int8").key == "kv_policy"


def test_servers_own_bases_are_what_is_stored() -> None:
    """Where --kv-policy-config names a base, the policy's name alone does not say how regions are
    stored."""
    for base, pages in (("adakv", True), ("keepkv(h2o)", True), ("h2o", False)):
        made = settings(allow="kvcrush", config={"kvcrush": {"base": base}})
        assert made.owns_pages == made.demands("kvcrush").pages == pages
    made = settings(policy="fair", allow="fair", config={"fair": {"base": "mikv"}}, page=PAGE)
    assert made.storage("fair") == spec.Storage(("int8", "tc8"), tiers=True)
    assert made.plan(RequestParams("fair", 0.25), 1000, 128).tiers
    assert made.needs_tables and made.owns_pages
    # A base that the request names comes first.
    assert made.storage("fair(snapkv)") == spec.Storage()
    assert made.storage("fair@int4") == spec.Storage(("int4",), tiers=True)


@pytest.mark.parametrize(
    ("policy", "demands"),
    [
        ("streaming", Demands()),
        ("snapkv", Demands(frozenset({"queries"}))),
        ("h2o", Demands(frozenset({"queries", "state"}), always=True)),
        ("fair(streaming)", Demands(frozenset({"positions"}), positions=True)),
        ("int4", Demands(tiled=True)),
        ("kvcrush(snapkv)@int4", Demands(frozenset({"queries"}))),
        ("adakv", Demands(frozenset({"queries"}), always=True, pages=True, positions=True)),
        ("keepkv", Demands(frozenset({"queries"}), pages=True, positions=True, merges=True)),
        (
            "adakv(keepkv(h2o))",
            Demands(frozenset({"queries", "state"}), *(True,) * 4),
        ),
    ],
)
def test_what_policies_ask_the_engine_for(policy: str, demands: Demands) -> None:
    made = settings()
    assert made.demands(policy) == demands
    assert made._built(policy) is made._built(policy), "built once"


def test_few_policies_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_MOST_POLICIES", 4)
    made = settings(config={"clients": {"kvcrush": {"seed": [0, 100]}}})
    for seed in range(10):
        assert served(made, f"kvcrush(seed={seed})").policy == f"kvcrush(seed={seed})"
    assert list(made._policies) == [f"kvcrush(seed={seed})" for seed in range(6, 10)]


# -- spans and protected tokens --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "spans"),
    [
        ([[0, 64], [128, 256]], ((0, 64), (128, 256))),
        ([0, 64, 128, 256], ((0, 64), (128, 256))),
        ("0:64,128:256", ((0, 64), (128, 256))),
        (" 0 : 64 , 64:65", ((0, 64), (64, 65))),
        ([("0", "64")], ((0, 64),)),
        ([[0, LONGEST]], ((0, LONGEST),)),
        ([[i, i + 1] for i in range(64)], tuple((i, i + 1) for i in range(64))),
        ([], ()),
        ("", ()),
        ((), ()),
    ],
)
def test_token_ranges(given: object, spans: tuple[tuple[int, int], ...]) -> None:
    assert parse_spans(given, "kv_spans", LONGEST) == spans


@pytest.mark.parametrize(
    "given",
    [
        None, 5, {}, True, "x", "0-64", "0:64:128", "0:64,", "0:²", ":", "0:" + "9" * 20,
        [0], [0, 1, 2], [[0]], [[0, 1, 2]], [[0, "x"]], [[0, 1.0]], [[False, True]], [None],
        [[0, 0]], [[5, 4]], [[-1, 4]], [[0, 64], [63, 70]], [[64, 70], [0, 64]],
        [[0, LONGEST + 1]], [[0, 10**5000]], [[0, "1" * 5000]], [[i, i + 1] for i in range(65)],
        [[[0, 1], [2, 3]]], ["0:64"], "0:1," * 70, [object()], [[0, 1]] * 10**5,
    ],
)  # fmt: skip
def test_bad_token_ranges_name_the_parameter(given: object) -> None:
    for key in ("kv_spans", "kv_protect"):
        with pytest.raises(ConfigError, match=rf"^{key}=.* is not a list of token ranges: give up"):
            parse_spans(given, key, LONGEST)
        error = refused(settings(policy="fair"), **{key: given})
        assert error.key == key and len(str(error)) < 300 and "\n" not in str(error)


def test_spans_and_protected_tokens_of_a_request() -> None:
    made = settings(allow=["fair", "none"])
    asked = {"kv_policy": "fair(kvcrush)", "kv_spans": "0:100,100:200", "kv_protect": [[10, 40]]}
    params = made.validate_request(asked, BLOCK, LONGEST)
    spans, protect = ((0, 100), (100, 200)), ((10, 40),)
    assert params == RequestParams("fair(kvcrush)", 0.25, spans, protect)
    assert params.protected == 30
    assert made.plan(params, 1000, BLOCK).protected == 30
    # Any policy keeps what is protected; spans are for those that look at them.
    assert served(made, "kvcrush", kv_protect=[[0, 9], [20, 30]]).protected == 19
    error = refused(made, kv_policy="kvcrush", kv_spans=[[0, 9]])
    assert error.key == "kv_spans" and "such as fair(kvcrush)." in str(error)
    assert served(made, "kvcrush", kv_spans=[]) == RequestParams("kvcrush", 0.25)
    nested = settings(policy="fair", allow=["kvcrush", "fair"])
    assert refused(nested, kv_policy="kvcrush(fair)", kv_spans=[[0, 9]]).key == "kv_spans"
    for key, value in (("kv_spans", [[0, 9]]), ("kv_protect", [[0, 9]]), ("kv_budget", 0.5)):
        error = refused(made, kv_policy="none", **{key: value})
        assert error.key == key and "has no effect with kv_policy='none'" in str(error)
    assert served(made, "none", kv_budget=1.0) == RequestParams("none", 1.0)


def test_budgets_hold_what_is_protected() -> None:
    made = settings()
    # 4 sinks and 30 tokens: three blocks, beside two of the tail.
    assert made.smallest_budget(BLOCK) == 48 and made.smallest_budget(BLOCK, 30) == 80
    protect = [[100, 130]]
    assert served(made, "kvcrush", kv_budget=80, kv_protect=protect).budget == 80
    error = refused(made, kv_budget=79, kv_protect=protect)
    assert error.key == "kv_budget"
    assert "4 sinks, 30 protected tokens and a window of 16 the smallest budget is 80" in str(error)
    # A share that is too small is raised to what must be kept, as far as the server's limit goes.
    params = served(made, "kvcrush", kv_budget=0.01, kv_protect=[[0, 4000]])
    plan = made.plan(params, 5000, BLOCK)
    assert plan.blocks(5000) * BLOCK >= 4000 + 4 + 16
    capped = settings(budget=0.1, budget_max=0.25)
    least = capped.smallest_budget(BLOCK, 2000)
    assert least <= LONGEST // 4
    served(capped, "kvcrush", kv_protect=[[0, 2000]])
    error = refused(capped, kv_protect=[[0, 3000]])
    assert error.key == "kv_protect"
    assert "keeps 3000 tokens, which is above this server's limit of 0.25" in str(error)
    tokens = settings(budget=512, budget_max=1024)
    assert refused(tokens, kv_protect=[[0, 1024]]).key in ("kv_protect", "kv_budget")
    assert refused(tokens, kv_budget=1024, kv_protect=[[0, 1020]]).key == "kv_budget"


# -- pages of the compressed region ---------------------------------------------------------------


def packings(policy: str, block: int = 128, **raw: object) -> tuple[Packing, ...]:
    return settings(page=PAGE, **raw).packings(policy, block)


def test_policies_say_the_same_codecs_as_plans_without_torch() -> None:
    assert set(spec._BUILT_IN) == set(policies.names())
    for name, stored in spec._BUILT_IN.items():
        policy = policies.get(name)
        assert settings().storage(name) == stored
        assert stored.tiers == policy.tiers
        assert stored.pages == (policy.allocates or policy.merges)
        assert stored.codecs == (spec.ALIASES.get(name) or policy.codecs)
    fitted = {name for name in (*policies.names(), "none") if settings(policy=name).needs_tables}
    assert fitted == {"tc4", "tc6", "tc8", "auto", "mikv"}


def test_packings_of_policies_with_one_codec() -> None:
    assert settings().packings("kvcrush", 128) == ()  # raw pages need no sizes
    with pytest.raises(ValueError, match="int8 needs the model's head sizes"):
        settings().packings("int8", 128)
    (int8,) = packings("int8")
    assert (int8.codec, int8.tokens(10)) == ("int8", 4800)
    (tc4,) = packings("tc4", fitted=FITTED)
    assert tc4 == Packing("tc4", (((752, 30), (816, 30)),))
    plan = settings(page=PAGE, fitted=FITTED).plan(RequestParams("tc4", 0.25), 1000, 128)
    assert plan.packings == (tc4,)
    # A request that is not compacted needs none.
    assert settings(page=PAGE).plan(RequestParams("tc4", 1.0), 1000, 128).packings == ()


def test_packings_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server asks for packings in every request."""
    made = settings(page=PAGE, fitted=FITTED)
    for _ in range(2):
        for policy in ("auto", "int4", "kvcrush"):
            made.validate_request({"kv_policy": policy}, 128, LONGEST)
        found = [made.packings("auto", size) for size in (128, 64)]
        plan = made.plan(RequestParams("auto", 0.25), 1000, 128)
        monkeypatch.setattr(config, "Packing", None)  # from now on nothing can be packed
        monkeypatch.setattr(config, "_packs", None)
    assert plan.packings is found[0]
    assert found[0] != found[1], "by block size"
    # Nothing of it belongs to the settings, and a plan travels.
    assert made == settings(page=PAGE, fitted=FITTED) == Settings.from_dict(made.to_dict())
    assert pickle.loads(pickle.dumps(plan)) == plan
    with pytest.raises(TypeError):
        dataclasses.replace(made, window=8).packings("auto", 128)


def test_auto_takes_what_there_is() -> None:
    found = packings("auto", fitted=FITTED)
    assert [p.codec for p in found] == ["int8", "tc4", "tc8"]
    assert [p.codec for p in packings("auto")] == ["int8", "int4"]
    assert [p.codec for p in packings("mikv", fitted=FITTED)] == ["int8", "tc8"]
    assert [p.codec for p in packings("mikv")] == ["int8", "int4"]
    # Blocks of 16 tokens of 16 bits hold no more than 16 in int8: of no use.
    narrow = settings(page=[64, 64, 2])
    assert [p.codec for p in narrow.packings("auto", 16)] == ["int4"]
    # Where nothing is of use the last one stays, and start-up refuses it.
    tiny = settings(policy="auto", page=[8, 8, 2])
    assert [p.codec for p in tiny.packings("auto", 16)] == ["int4"]
    with pytest.raises(ConfigError, match="--kv-policy=auto does not pack more than 16 tokens"):
        tiny.check(16, LONGEST)


def test_auto_chooses_among_all_codecs_by_what_they_lose() -> None:
    losses = {"tc8": 0.05, "int8": 0.0, "tc4": 0.02, "int4": 0.001, "tc6": 0.01}
    made = settings(page=PAGE, fitted=FITTED, losses=losses)
    assert Settings.from_dict(made.to_dict()) == made
    found = made.packings("auto", 128)
    # Those whose pages hold fewest tokens first, and none that the model has no tables for.
    assert [(p.codec, p.loss) for p in found] == [
        *(("int8", 0.0), ("tc4", 0.02), ("int4", 0.001), ("tc8", 0.05))
    ]
    plan = made.plan(RequestParams("auto", 0.25), 4000, 128)
    assert plan.least_loss and plan.packings == found
    # So it is where another policy wraps it, but who names codecs gets those in their order.
    assert made.plan(RequestParams("fair(auto)", 0.25), 4000, 128).packings == found
    for named in ("auto@int8+tc4+tc8", "fair(auto)@int8+tc4+tc8"):
        plain = made.plan(RequestParams(named, 0.25), 4000, 128)
        assert [p.codec for p in plain.packings] == ["int8", "tc4", "tc8"]
        assert not plain.least_loss and all(p.loss is None for p in plain.packings)
    # What workers are to measure is chosen from too, by its order until they have told.
    unknown = dataclasses.replace(made, losses=dict.fromkeys(losses))
    assert unknown.packings("auto", 128) == tuple(dataclasses.replace(p, loss=None) for p in found)


@pytest.mark.parametrize("ranks", [1, 2])
def test_codecs_of_a_plan_can_share_blocks(ranks: int) -> None:
    """Each codec counts the pages of all heads: 60 of them here, or 30 on each of two ranks."""
    share = [[[752, 30 // ranks], [816, 30 // ranks]]] * ranks
    int8, tc4, tc8 = packings("auto", fitted={"tc4": share, "tc8": [[[1408, 60 // ranks]]] * ranks})
    for packing in (int8, tc4, tc8):
        assert [sum(heads for _, heads in rank) for rank in packing.pages] == [60 // ranks] * ranks
    # 1000 tokens: 2 pages of tc4 and 3 of int8 for each head.
    assert tc4.blocks(1000, int8, 1000) == 5


def test_fitted_policies_need_tables() -> None:
    for policy in ("tc4", "tc8"):
        settings(policy=policy, page=PAGE, fitted=FITTED).check(128, LONGEST)
        settings(policy=policy).check(128, LONGEST)  # nobody knows yet
        with pytest.raises(ConfigError, match=f"--kv-policy={policy} needs transform tables"):
            settings(policy=policy, page=PAGE).check(128, LONGEST)
        error = refused(settings(page=PAGE), kv_policy=policy)
        assert error.key == "kv_policy"
        assert f"kv_policy={policy} needs transform tables" in str(error)
        settings(page=PAGE, fitted=FITTED).validate_request({"kv_policy": policy}, 128, LONGEST)
    settings(policy="auto", page=PAGE).check(128, LONGEST)
    settings(page=PAGE).validate_request({"kv_policy": "auto"}, 128, LONGEST)


def test_pages_that_pack_nothing_are_refused() -> None:
    loose = {"tc4": [[[128, 59], [144, 1]]], "tc8": [[[128, 60]]]}
    made = settings(page=PAGE, fitted=loose)
    made.validate_request({"kv_policy": "tc4"}, 128, LONGEST)  # some little
    with pytest.raises(ConfigError, match="tc8 does not pack more than 128 tokens") as caught:
        made.validate_request({"kv_policy": "tc8"}, 128, LONGEST)
    assert caught.value.key == "kv_policy"


# -- tables ---------------------------------------------------------------------------------------

# A configuration as `model_config` reads it: 60 pairs of layer and KV head of 64.
MODEL = {
    "num_hidden_layers": 20,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "hidden_size": 384,
    "vocab_size": 100,
    "rope_theta": 10000.0,
}


@pytest.fixture
def stale(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """Puts a file that cannot be read into the default place, and returns its path."""
    monkeypatch.setenv("VLLM_KVCRUSH_CACHE", str(tmp_path))
    place = transform_tables.default_path(MODEL)
    assert place is not None
    place.parent.mkdir()
    place.write_bytes(b"from another release")
    return place


def with_tables(policy: str, **more: Any) -> tuple[Settings, str | None]:
    ranks = more.pop("ranks", 1)
    made = settings(policy=policy, **more)
    return made.with_tables(MODEL, (64, 64, 4), 128, ranks)


@pytest.mark.parametrize("policy", ["streaming", "kvcrush", "int8", "int4", "none"])
def test_stale_tables_in_the_default_place_stop_nobody_who_needs_none(
    stale: pathlib.Path, policy: str
) -> None:
    made, warning = with_tables(policy)
    assert (made.fitted, made.tables, made.page) == ({}, None, (64, 64, 4))
    assert warning is not None and f"{stale} is damaged" in warning and "\n" not in warning
    made.check(128, LONGEST)


@pytest.mark.parametrize("policy", ["tc4", "auto", "mikv"])
def test_stale_tables_stop_those_who_need_them(stale: pathlib.Path, policy: str) -> None:
    with pytest.raises(ConfigError, match=f"^--kv-policy={policy}: {stale} is damaged"):
        with_tables(policy)


@pytest.mark.parametrize("policy", ["streaming", "auto"])
def test_named_tables_that_cannot_be_used_are_refused(policy: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="does not exist") as caught:
        with_tables(policy, config={"tables": str(tmp_path / "none")})
    assert caught.value.key == "--kv-policy-config.tables"


def test_without_tables_statistics_say_what_pages_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("VLLM_KVCRUSH_CACHE", str(tmp_path))
    made, warning = with_tables("auto")
    assert sorted(made.fitted) == ["tc4", "tc6", "tc8"] and warning is None
    assert made.tables is None and made.fitted["tc4"][0][0][1] == 60
    # What codecs lose is measured for the default policy only: it takes time.
    assert set(made.losses) == set(PACKED) and not any(made.losses.values())
    assert with_tables("tc4")[0].losses == {}
    assert with_tables("int4")[0].fitted == {}
    untaught = settings(policy="auto").with_tables(MODEL, (64, 64, 4), 128, statistics=False)[0]
    assert untaught.fitted == {} and untaught.packings("auto", 128)[-1].codec == "int4"
    # What does not fit is no reason to refuse `auto`, and said to those who want nothing else.
    assert with_tables("auto", ranks=2)[0].fitted == {}
    with pytest.raises(ConfigError, match="--kv-policy=tc6: 3 KV heads do not divide over 2 ranks"):
        with_tables("tc6", ranks=2)
    odd = MODEL | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    assert settings(policy="auto").with_tables(odd, (64, 64, 4), 128) == (
        settings(policy="auto", page=[64, 64, 4]),
        None,
    )
    with pytest.raises(ConfigError, match="--kv-policy=tc8: transform coding was not verified"):
        settings(policy="tc8").with_tables(odd, (64, 64, 4), 128)


# -- vLLM's key of compiled models ----------------------------------------------------------------


def test_only_what_changes_compiled_code_is_in_the_key() -> None:
    def key(**raw: Any) -> str:
        return AdditionalConfig({"other": 1}, settings(**raw)).compute_hash()

    same = key()
    for change in (
        {"budget": 0.5},
        {"budget": 512, "budget_max": 1024},
        {"policy": "int4"},
        {"policy": "none", "min_tokens": 0},
        {"config": {"window": 32, "kvcrush": {"ratio": 0.5}}, "page": PAGE, "fitted": FITTED},
        {"allow": "int8,kvcrush"},
    ):
        assert key(**change) == same, change
    # On GPUs raw pages stay under vLLM's own attention.
    assert key(allow="streaming") != same
    assert AdditionalConfig({"other": 2}, settings()).compute_hash() != same
    assert AdditionalConfig({}, settings()).compute_hash() != same


def test_additional_config_is_read_like_a_dict() -> None:
    made = AdditionalConfig({"other": 1}, settings(budget=512))
    plain = {"other": 1, "kvcrush": settings(budget=512).to_dict()}
    assert dict(made) == plain and len(made) == 2 and made.get("none") is None
    assert repr(made) == repr(plain)
    again = pickle.loads(pickle.dumps(made))
    assert dict(again) == plain and again.compute_hash() == made.compute_hash()
    assert json.loads(json.dumps(dict(made))) == plain


def test_requests_that_state_no_budget_are_elastic_under_pressure() -> None:
    made = settings(pressure=0.8)
    for extra, elastic in (({}, True), ({"kv_policy": "h2o"}, True), ({"kv_budget": 0.25}, False)):
        params = made.validate_request(extra, BLOCK, 4096)
        assert params.elastic is elastic
        assert params.reason == ("pressure" if elastic else "budget")
        assert made.plan(params, 1000, BLOCK).budget == 0.25  # the least that it is squeezed to
    assert not settings().validate_request({}, BLOCK, 4096).elastic


@pytest.mark.parametrize(
    ("given", "share"),
    [(None, 0.5), ("on", 0.5), (True, 0.5), ("off", 0), (False, 0), (0, 0), ("0.25", 0.25), (1, 1)],
)
def test_shares_of_system_prompts(given: Any, share: float) -> None:
    assert settings(protect_system=given).protect_system == share
    assert settings().protect_system == 0.5


@given(
    policy=st.sampled_from(("snapkv", "int8", "tc8")),
    budget=st.one_of(st.floats(0.01, 0.99), st.integers(96, 2000)),
    prompt=st.integers(1, 4000),
    output=st.integers(1, 600),
    system=st.lists(st.integers(1, 900), min_size=1, max_size=4),
    share=st.floats(0, 1),
    cap=st.one_of(st.none(), st.floats(0.01, 1), st.integers(96, 4000)),
)
def test_a_system_prompt_takes_no_more_blocks(
    policy: str, budget: Any, prompt: int, output: int, system: list[int], share: float, cap: Any
) -> None:
    made = settings(protect_system=share, budget_max=cap, min_tokens=256, page=PAGE, fitted=FITTED)
    params = RequestParams(policy, budget)
    spans, at = [], 3
    for length in system:
        spans.append((at, at + length))
        at += length + 5
    length = prompt + output
    found = made.with_system(params, tuple(spans), prompt, length, BLOCK, LONGEST)
    if found is params:
        return
    assert found.system and dataclasses.replace(found, system=False, protect=()) == params
    # The first tokens, no more than the share, of a request that drops some.
    plan, other = (made.plan(p, prompt, BLOCK) for p in (params, found))
    n = plan.first_compaction(length)
    assert n is not None and 0 < found.protected <= share * plan.tokens(n)
    assert found.protect[0][0] == 3 and set(found.protect[:-1]) <= set(spans)
    assert list(plan.compactions(length)) == list(other.compactions(length))
    assert plan.bound(length) == other.bound(length)


def test_a_request_that_drops_nothing_has_nothing_to_protect() -> None:
    made = settings(page=PAGE, fitted=FITTED, policy="int8")
    system = ((4, 60),)

    def asked(policy: str, budget: float, prompt: int = 2000, output: int = 10) -> int:
        params = RequestParams(policy, budget)
        length = prompt + output
        return made.with_system(params, system, prompt, length, BLOCK, LONGEST).protected

    assert asked("int8", 0.5) == 0 == asked("snapkv", 1.0) == asked("none", 0.25)
    assert asked("int8", 0.1) == 56 == asked("snapkv", 0.25)
    # A short prompt whose output is long.
    assert asked("snapkv", 0.25, 100) == 0 < asked("snapkv", 0.25, 100, 2000) <= 44
    assert settings(protect_system="off").with_system(
        RequestParams("snapkv", 0.25), system, 2000, 2010, BLOCK, LONGEST
    ) == RequestParams("snapkv", 0.25)


def test_nothing_protected_goes_with_any_policy() -> None:
    """It is how a client says that its system prompt need not stay."""
    for policy in ("none", "int8", "streaming"):
        asked = {"kv_policy": policy, "kv_protect": []}
        made = settings(page=PAGE, fitted=FITTED)
        assert made.validate_request(asked, BLOCK, LONGEST).protect == ()
    assert refused(settings(), kv_policy="none", kv_protect=[[0, 4]]).key == "kv_protect"
