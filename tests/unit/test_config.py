"""Settings, budgets and request parameters."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import pickle
from typing import Any

import pytest

from vllm_kvcrush import config, policies
from vllm_kvcrush.codecs.transform import tables as transform_tables
from vllm_kvcrush.config import (
    AdditionalConfig,
    ConfigError,
    RequestParams,
    Settings,
    parse_budget,
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
    evicting, packing = (
        ("streaming", "snapkv", "h2o", "kvcrush"),
        ("int8", "int4", "tc4", "tc6", "tc8"),
    )
    assert made.allow == (*evicting, *packing, "auto", "mikv", "none")
    assert (made.page, made.fitted, made.tables) == (None, {}, None)


def test_round_trip_through_json() -> None:
    made = settings(
        budget="512",
        budget_max=0.5,
        allow="snapkv, none",
        min_tokens="100",
        config={"window": "8", "sinks": 0, "kvcrush": {}, "tables": "model.safetensors"},
        page=PAGE,
        fitted=FITTED,
    )
    again = Settings.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    assert made.allow == ("kvcrush", "snapkv", "none")  # the default policy is always allowed
    assert (made.window, made.sinks, made.budget, made.min_tokens) == (8, 0, 512, 100)
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


# -- pages of the compressed region ---------------------------------------------------------------


def packings(policy: str, block: int = 128, **raw: object) -> tuple[Packing, ...]:
    return settings(page=PAGE, **raw).packings(policy, block)


def test_policies_say_the_same_codecs_as_plans_without_torch() -> None:
    assert set(config._BUILT_IN_CODECS) == set(policies.names())
    for name, codecs in config._BUILT_IN_CODECS.items():
        assert policies.codecs(name) == codecs
        assert policies.tiers(name) == config._BUILT_IN_TIERS[name]
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
    """A server asks for them in every request."""
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


@pytest.mark.parametrize("ranks", [1, 2])
def test_codecs_of_a_plan_can_share_blocks(ranks: int) -> None:
    """Each counts the pages of all heads: 60 of them here, or 30 on each of two ranks."""
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
    """A file in the default place that cannot be read."""
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
