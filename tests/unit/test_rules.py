"""Rules of --kv-budget-rules: what a file may say, who meets which rule, and that nothing that a
client sends takes it further than the operator lets it."""

from __future__ import annotations

import asyncio
import io
import logging
import multiprocessing
import os
import pathlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace as Namespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from tests.unit.test_params import CHAT, MODEL, Processor, value, vllm_config
from vllm_kvcrush import config, plugin
from vllm_kvcrush.config import ConfigError, Settings
from vllm_kvcrush.server import caller, metrics, params, reload, rules
from vllm_kvcrush.server.caller import Caller, CallerMiddleware
from vllm_kvcrush.server.reload import Watched
from vllm_kvcrush.server.rules import Rules, RulesError, key_hash
from vllm_kvcrush.tools import cli

BLOCK, LONGEST = 16, 4096
SERVER: dict[str, Any] = {
    "policy": "kvcrush",
    "budget": 0.25,
    "budget_max": 0.9,
    "allow": ["kvcrush", "h2o", "int8", "int4", "none"],
    "config": {"clients": {"kvcrush": {"ratio": [0, 0.5], "anchor": ["mean", "random"]}}},
}
FILE = f"""
request_headers: true
trusted_headers: [x-tenant]
default:
  budget_max: 0.5
  allow: [kvcrush, h2o]
rules:
  - name: gold
    when: {{keys: ["{key_hash("gold-key")}", "{key_hash("gold-key-2")}"]}}
    policy: int8
    budget: 0.75
    budget_max: 0.9
    clients: {{kvcrush: {{ratio: [0.1, 0.2], anchor: [mean]}}}}
  - name: adapter
    when: {{loras: [sql]}}
    protect_system: off
    budget: 0.125
    budget_max: 0.25
  - name: alias
    when: {{models: [small, smaller]}}
    budget_max: 0.3
  - name: acme
    when: {{headers: {{x-tenant: [acme, acme2]}}}}
    budget_max: 0.8
    allow: [int4]
  - name: modest
    when: {{headers: {{x-modest: ["yes"], x-more: ["1"]}}}}
    budget_max: 0.3
"""


def server(**changed: Any) -> Settings:
    return Settings.from_dict(SERVER | changed)


def read(tmp_path: pathlib.Path, text: str, settings: Settings | None = None) -> Rules:
    path = tmp_path / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    return rules.load(str(path), settings or server(), BLOCK, LONGEST)


def asks(*headers: tuple[str, str]) -> Caller:
    return Caller([(name.lower().encode(), text.encode("latin-1")) for name, text in headers])


def bearer(key: str) -> tuple[str, str]:
    return "Authorization", f"Bearer {key}"


# -- the file --------------------------------------------------------------------------------------


def test_what_a_rule_leaves_out_is_the_defaults_and_then_the_servers(
    tmp_path: pathlib.Path,
) -> None:
    found = {rule.name: rule.settings for rule in read(tmp_path, FILE)}
    assert list(found) == ["gold", "adapter", "alias", "acme", "modest", "default"]
    default, gold, acme = found["default"], found["gold"], found["acme"]
    assert (default.policy, default.budget, default.budget_max) == ("kvcrush", 0.25, 0.5)
    assert default.allow == ("kvcrush", "h2o") and default.clients == server().clients
    assert (gold.policy, gold.budget, gold.budget_max) == ("int8", 0.75, 0.9)
    # The default policy is always allowed.
    assert gold.allow == ("int8", "kvcrush", "h2o")
    assert gold.clients == {"kvcrush": {"ratio": [0.1, 0.2], "anchor": ["mean"]}}
    assert acme.allow == ("kvcrush", "int4") and acme.budget == 0.25
    assert all(made.min_tokens == server().min_tokens for made in found.values())
    assert found["adapter"].protect_system == 0 and gold.protect_system == 0.5


BAD: dict[str, tuple[str, int | None, str]] = {
    "empty": ("# nothing\n", None, "is empty"),
    "no mapping": ("- 1\n", 1, "is not a mapping"),
    "not YAML": ("default: [\n", 2, "expected the node content"),
    "not text": ("a: \x00", None, "not YAML"),
    "unknown key": (
        "default:\n  bugdet: 0.5\n",
        2,
        "default.bugdet is not known here: there are p",
    ),
    "unknown section": ("defaults: {}\n", 1, "there are request_headers, trusted_headers"),
    "unknown condition": ("rules:\n- {name: a, when: {key: [x]}}", 2, "there are keys, models"),
    "twice": ("default: {}\nrules: []\ndefault: {}", 3, "default is there twice"),
    "no value": ("default:\n  budget_max:\n", 2, "default.budget_max has no value"),
    "alias": ("default: &a {}\nrules: [*a]\n", 1, "rules[0] is an alias"),
    "code": ("a: !!python/object/apply:os.system [ls]\n", 1, "could not determine"),
    "policy": ("default:\n  policy: h3o\n", 2, "default.policy='h3o' is not a policy"),
    "budget": ("default:\n  budget: 1.5\n", 2, "default.budget=1.5 is not a KV budget"),
    "small": ("default:\n  budget: 16\n", 2, "the smallest budget is 48"),
    "budget and maximum": (
        "default:\n  budget: 0.5\n  budget_max: 0.25\n",
        2,
        "is above default.budget_max=0.25",
    ),
    "boolean": ("request_headers: 1\n", 1, "request_headers is wrong: input should be a valid bo"),
    "no conditions": ("rules:\n- name: a\n  when: {}\n", 3, "rules[0].when has no condition"),
    "no when": ("rules:\n- name: a\n", 2, "rules[0].when is missing"),
    "no models": ("rules:\n- {name: a, when: {models: []}}", 2, "at least 1 item"),
    "name": ("rules:\n- {name: a b, when: {models: [m]}}", 2, "'a b' is not a name for a rule"),
    "reserved": ("rules:\n- {name: default, when: {models: [m]}}", 2, "not a name for a rule"),
    "same name": (
        "rules:\n- {name: a, when: {models: [m]}}\n- {name: a, when: {models: [n]}}",
        3,
        "there is another rule 'a'",
    ),
    "header": ("trusted_headers: [X-Tenant]", 1, "is not a header's name in small letters"),
    "key header": (
        "rules:\n- {name: a, when: {headers: {authorization: [x]}}}",
        2,
        "name API keys by their hashes",
    ),
    "our header": ("trusted_headers: [x-kv-budget]", 1, "cannot be a condition"),
    "no text": (
        "rules:\n- {name: a, when: {headers: {x-a: [yes]}}}",
        2,
        "should be a valid string",
    ),
    "above the server": ("default:\n  budget_max: 0.95\n", 2, "0.95 is above 0.9. Raise --kv-bud"),
    "no such policy here": ("default:\n  allow: [snapkv]\n", 2, "Raise --kv-policy-allow"),
    "options of the server": (
        "default:\n  clients: {kvcrush: {ratio: [0, 0.6]}}\n",
        2,
        "kvcrush.ratio is from 0 to 0.5",
    ),
    "no range": (
        "default:\n  clients: {kvcrush: {anchor: [mean, alternate]}}\n",
        2,
        "kvcrush.anchor is one of mean, random",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence_with_its_line(tmp_path: pathlib.Path, name: str) -> None:
    text, line, says = BAD[name]
    with pytest.raises(RulesError) as caught:
        read(tmp_path, text)
    (problem,) = caught.value.problems
    where = f"{tmp_path / 'rules.yaml'}{'' if line is None else f', line {line}'}: "
    assert problem.startswith(where) and says in problem and problem.count("\n") == 0
    assert problem.endswith(".")


def test_all_that_is_wrong_is_told_at_once(tmp_path: pathlib.Path) -> None:
    text = "rules:\n- {name: a b, when: {x: 1}}\n- {name: c, when: {models: [1]}}\n"
    with pytest.raises(RulesError) as caught:
        read(tmp_path, text)
    assert len(caught.value.problems) == 3


def test_what_cannot_be_read_is_told(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rules.yaml"
    for content, says in ((b"\xff\xfe", "not UTF-8"), (b"#" * (2**20 + 1), "larger than")):
        path.write_bytes(content)
        with pytest.raises(RulesError, match=says):
            rules.load(str(path), server())
    with pytest.raises(RulesError, match="No such file"):
        rules.load(str(tmp_path / "none.yaml"), server())
    with pytest.raises(RulesError, match="Is a directory"):
        rules.load(str(tmp_path), server())


def test_a_key_in_place_of_its_hash_is_not_repeated(tmp_path: pathlib.Path) -> None:
    for key in ("sk-secret-key-of-a-client", key_hash("x").upper(), key_hash("x")[:-1]):
        with pytest.raises(RulesError) as caught:
            read(tmp_path, f"rules:\n- name: a\n  when:\n    keys:\n    - {key}\n")
        assert "line 5: rules[0].when.keys[0] is not the hash" in str(caught.value)
        assert key not in str(caught.value) + repr(caught.value)


@pytest.mark.parametrize(
    ("when", "limits", "fits"),
    [
        ("models: [m]", "budget_max: 0.5", True),
        ("models: [m]", "budget: 0.5", True),
        ("models: [m]", "budget_max: 0.6", False),
        ("loras: [m]", "budget_max: 0.6", False),
        ("headers: {x-a: [b]}", "budget_max: 0.6", False),
        ("headers: {x-a: [b]}", "allow: [int8]", False),
        ("headers: {x-a: [b]}", "policy: int8", False),
        ("headers: {x-a: [b]}", "clients: {h2o: {}}", True),
        ("headers: {x-tenant: [b]}", "budget_max: 0.6", True),
        ("headers: {x-tenant: [b], x-a: [c]}", "allow: [int8]", True),
        (f"keys: ['{key_hash('k')}'], models: [m]", "budget_max: 0.6", True),
        # 0.5 of the longest request.
        ("models: [m]", "budget_max: 2048", True),
        ("models: [m]", "budget_max: 2049", False),
    ],
)
def test_only_who_is_vouched_for_may_get_more_than_the_default(
    tmp_path: pathlib.Path, when: str, limits: str, fits: bool
) -> None:
    head = "trusted_headers: [x-tenant]\ndefault: {budget_max: 0.5, allow: [kvcrush, h2o]}\n"
    text = f"{head}rules:\n- name: a\n  when: {{{when}}}\n  {limits}\n"
    if fits:
        read(tmp_path, text)
        return
    with pytest.raises(RulesError, match=r"line 6: .* allows more than the default does") as caught:
        read(tmp_path, text)
    assert "Any client can name a model" in str(caught.value)


def test_without_sizes_only_what_can_be_compared_is(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("default: {budget_max: 3000, budget: 8}\n", encoding="utf-8")
    rules.load(str(path), server(budget_max=0.5))
    for made, sizes in ((server(budget_max=2999), ()), (server(), (BLOCK, LONGEST))):
        with pytest.raises(RulesError):
            rules.load(str(path), made, *sizes)


def test_an_operator_is_warned(tmp_path: pathlib.Path) -> None:
    hashed = key_hash("k")
    text = f"""
    default: {{budget_max: 0.5}}
    rules:
    - {{name: bronze, when: {{keys: ["{hashed}"]}}, budget_max: 0.3}}
    - {{name: never, when: {{keys: ["{hashed}"], models: [m]}}, budget_max: 0.8}}
    - {{name: narrow, when: {{models: [m]}}, budget_max: 0.3}}
    - {{name: some, when: {{models: [m, n]}}, budget_max: 0.3}}
    """
    found = read(tmp_path, text).warnings
    assert len(found) == 2
    assert "bronze allows less than the default" in found[0]
    assert "No request meets the rule never: bronze" in found[1]


def test_a_server_without_a_file_has_its_flags() -> None:
    made = Rules.of(server())
    assert made.match(asks(bearer("gold-key")), MODEL, None) is made.default
    assert made.default.settings == server() and not made.from_file and not made.request_headers


# -- who meets which rule --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "model", "lora", "name"),
    [
        ([], MODEL, None, "default"),
        ([bearer("gold-key")], MODEL, None, "gold"),
        ([("AUTHORIZATION", "bearer gold-key-2")], MODEL, None, "gold"),
        ([bearer("gold-key")], "small", "sql", "gold"),  # the first that it meets
        ([bearer("Gold-key")], MODEL, None, "default"),
        ([bearer("gold-key ")], MODEL, None, "default"),
        ([bearer(key_hash("gold-key"))], MODEL, None, "default"),
        ([("Authorization", "Basic gold-key")], MODEL, None, "default"),
        ([("Authorization", "gold-key")], MODEL, None, "default"),
        ([("Proxy-Authorization", "Bearer gold-key")], MODEL, None, "default"),
        ([("X-Api-Key", "gold-key")], MODEL, None, "default"),
        ([], "sql", "sql", "adapter"),
        ([], "small", None, "alias"),
        ([], "smaller", None, "alias"),
        ([], "Small", None, "default"),
        ([("X-Tenant", "acme")], MODEL, None, "acme"),
        ([("X-Tenant", "acme2")], "small", None, "alias"),
        ([("X-Tenant", "ACME")], MODEL, None, "default"),
        ([("X-Tenant", "acme, acme2")], MODEL, None, "default"),
        ([("X_Tenant", "acme")], MODEL, None, "default"),
        ([("X-Modest", "yes")], MODEL, None, "default"),
        ([("X-Modest", "yes"), ("X-More", "1")], MODEL, None, "modest"),
    ],
)
def test_the_first_rule_that_a_request_meets_counts(
    tmp_path: pathlib.Path,
    headers: list[tuple[str, str]],
    model: str,
    lora: str | None,
    name: str,
) -> None:
    assert read(tmp_path, FILE).match(asks(*headers), model, lora).name == name


def test_what_does_not_come_by_http_has_no_key(tmp_path: pathlib.Path) -> None:
    found = read(tmp_path, FILE)
    for model, lora, name in ((MODEL, None, "default"), (MODEL, "sql", "adapter")):
        assert found.match(None, model, lora).name == name


# -- what a client may try -------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setattr(reload, "INTERVAL", 0.02)
    path = tmp_path / "rules.yaml"
    path.write_text(FILE, encoding="utf-8")
    return path


@pytest.fixture
def front(path: pathlib.Path) -> params.Front:
    return params.Front(vllm_config(SERVER | {"rules": str(path)}))


def send(front: params.Front, headers: Any = (), /, lora: Any = None, **body: Any) -> Any:
    """Returns the parameters of a request, as the endpoint, the engine's client and the input
    processor have them checked, and what the engine gets."""
    sender = caller._current.set(asks(*headers))
    try:
        given = ChatCompletionRequest(**CHAT | body).to_sampling_params(16, {})
        front.check(given)
        front.check(given, 100, lora=lora)
    finally:
        caller._current.reset(sender)
    # vLLM may prepare it in a thread, where the context is another.
    request = Namespace(
        sampling_params=given.clone(), prompt_token_ids=[1] * 100, lora_request=lora
    )
    with ThreadPoolExecutor(1) as thread:
        thread.submit(front.admit, request, given).result()
    return request.sampling_params.extra_args


def engine(extra_args: Any, **changed: Any) -> config.RequestParams:
    return server(**changed).resolved(extra_args, BLOCK, LONGEST)


def test_the_engine_gets_what_the_rule_says(front: params.Front) -> None:
    for headers, body, wanted in (
        ([], {}, ("kvcrush", 0.25)),
        ([], {"kv_budget": 0.5}, ("kvcrush", 0.5)),
        ([bearer("gold-key")], {}, ("int8", 0.75)),
        ([bearer("gold-key")], {"kv_policy": "h2o"}, ("h2o", 0.75)),
        ([bearer("gold-key")], {"kv_budget": 0.9}, ("int8", 0.9)),
        ([], {"model": "sql"}, ("kvcrush", 0.125)),
        ([("x-tenant", "acme")], {"kv_policy": "int4", "kv_budget": 0.8}, ("int4", 0.8)),
    ):
        lora = Namespace(lora_name="sql") if body.get("model") == "sql" else None
        args = send(front, headers, lora=lora, **body)
        made = engine(args)
        assert (made.policy, made.budget) == wanted and made.rule is None
        # Nothing is left of what the client wrote but what it comes to.
        assert set(args) == {"kv_policy", "kv_budget", "kv_elastic"}


def test_other_parameters_travel_as_they_were(front: params.Front) -> None:
    args = send(front, (), vllm_xargs={"theirs": 1, "kv_budget": 0.3}, kv_protect=[[0, 16]])
    assert args["theirs"] == 1 and args["kv_budget"] == 0.3
    assert engine(args).protect == ((0, 16),)


@pytest.mark.parametrize(
    ("headers", "body", "reason", "name"),
    [
        # Its own limits, however they are asked for.
        ([], {"kv_budget": 0.6}, "cap", "kv_budget"),
        ([], {"vllm_xargs": {"kv_budget": 0.6}}, "cap", "vllm_xargs.kv_budget"),
        ([("X-KV-Budget", "0.6")], {}, "cap", "x-kv-budget"),
        ([("X-KV-Policy", "int8")], {}, "policy", "x-kv-policy"),
        ([("X-KV-Policy", "none")], {}, "policy", "x-kv-policy"),
        ([], {"kv_policy": "none"}, "policy", "kv_policy"),
        ([("X-KV-Budget", "2049")], {}, "cap", "x-kv-budget"),
        ([], {"kv_protect": [[0, 4000]]}, "cap", "kv_protect"),
        # Of two, neither counts.
        ([("X-KV-Budget", "0.3")], {"kv_budget": 0.4}, "conflict", "x-kv-budget"),
        ([("X-KV-Budget", "0.3")], {"vllm_xargs": {"kv_budget": 0.4}}, "conflict", "x-kv-budget"),
        ([("X-KV-Policy", "h2o")], {"kv_policy": "kvcrush"}, "conflict", "x-kv-policy"),
        ([("X-KV-Budget", "0.3"), ("x-kv-budget", "0.4")], {}, "header", "x-kv-budget"),
        ([("X-Tenant", "other"), ("x-tenant", "acme")], {}, "header", "x-tenant"),
        ([("X-Tenant", "acme"), ("X-Tenant", "acme")], {}, "header", "x-tenant"),
        ([bearer("other"), bearer("gold-key")], {}, "header", "authorization"),
        # What the front end itself puts into a request.
        ([], {"kv_elastic": True}, "unknown_key", "kv_elastic"),
        ([], {"vllm_xargs": {"kv_elastic": 1}}, "unknown_key", "vllm_xargs.kv_elastic"),
        ([], {"vllm_xargs": {"kv_rule": "gold"}}, "unknown_key", "vllm_xargs.kv_rule"),
        ([], {"kv_rule": "gold"}, "unknown_key", "kv_rule"),
        # Nonsense.
        ([("X-KV-Budget", "")], {}, "budget", "x-kv-budget"),
        ([("X-KV-Budget", "9" * 5000)], {}, "budget", "x-kv-budget"),
        ([("X-KV-Budget", "nan")], {}, "budget", "x-kv-budget"),
        ([("X-KV-Policy", "kvcrush(" * 99)], {}, "policy", "x-kv-policy"),
        ([("X-KV-Policy", "{" * 200)], {"kv_policy": "h2o"}, "conflict", "x-kv-policy"),
        ([("X-KV-Bugdet", "0.3")], {}, "header", "x-kv-bugdet"),
        ([("X-KV-Rule", "gold")], {}, "header", "x-kv-rule"),
        # The key counts where the model or a header says something else.
        ([bearer("gold-key")], {"kv_budget": 0.91}, "cap", "kv_budget"),
        ([], {"model": "small", "kv_budget": 0.4}, "cap", "kv_budget"),
        ([], {"model": "sql", "kv_budget": 0.4}, "cap", "kv_budget"),
    ],
)
def test_nothing_that_a_client_sends_widens_its_limits(
    front: params.Front, headers: Any, body: dict[str, Any], reason: str, name: str
) -> None:
    before = value(metrics.refusals(), MODEL, reason)
    with pytest.raises(VLLMValidationError) as caught:
        send(front, headers, **body)
    assert caught.value.parameter == name
    assert str(caught.value).count("\n") == 0 and len(str(caught.value)) < 500
    # Nor does it learn of other rules.
    assert not re.search("gold|acme|modest|alias", str(caught.value).replace(name, ""))
    assert value(metrics.refusals(), MODEL, reason) == before + 1


def test_headers_and_body_may_agree(front: params.Front) -> None:
    for headers, body in (
        ([("X-KV-Budget", "0.30")], {"kv_budget": 0.3}),
        ([("X-KV-Budget", "0.3")], {"vllm_xargs": {"kv_budget": "0.3"}}),
        ([("X-KV-Budget", "0.3"), ("X-KV-Policy", " h2o ")], {"kv_policy": {"policy": "h2o"}}),
        ([("X-KV-Budget", "0.3")], {"kv_budget": None}),
    ):
        assert engine(send(front, headers, **body)).budget == 0.3


def test_headers_are_refused_unless_the_operator_takes_them(
    front: params.Front, path: pathlib.Path
) -> None:
    path.write_text(FILE.replace("request_headers: true", ""), encoding="utf-8")
    for made in (
        params.Front(vllm_config(SERVER)),
        params.Front(vllm_config(SERVER | {"rules": str(path)})),
    ):
        for header in ("X-KV-Budget", "X-KV-Policy"):
            with pytest.raises(VLLMValidationError, match="is not taken here: give kv_") as caught:
                send(made, [(header, "0.3" if "B" in header else "h2o")])
            assert caught.value.parameter == header.lower()
        send(made, [("X-KV-Cache-Status", "hit")])
    # A server where the plugin is not active has no middleware, and is as plain vLLM.


def test_an_endpoint_without_fields_takes_no_header(path: pathlib.Path) -> None:
    class Decisions:
        engine_client = Namespace(
            input_processor=Processor(vllm_config(SERVER | {"rules": str(path)}))
        )

        async def create_decision(self, request: Any, raw_request: Any = None) -> str:
            return "decided"

    method = params._without_fields(Decisions.create_decision)
    assert asyncio.run(method(Decisions(), Namespace(model_extra={}))) == "decided"
    sender = caller._current.set(asks(("X-KV-Budget", "0.3")))
    try:
        with pytest.raises(VLLMValidationError, match="x-kv-budget is not taken by this endpoint"):
            asyncio.run(method(Decisions(), Namespace(model_extra={})))
    finally:
        caller._current.reset(sender)


def test_tokens_in_tokens_out_meet_rules_too(path: pathlib.Path) -> None:
    """Its clients write extra_args themselves."""

    class Serving:
        engine_client = Namespace(
            input_processor=Processor(vllm_config(SERVER | {"rules": str(path)}))
        )

        async def serve_tokens(self, request: Any, raw_request: Any = None) -> Any:
            made = self.engine_client.input_processor.process_inputs(
                "0", [1], request.sampling_params
            )
            return made.sampling_params.extra_args

    method = params._checked_tokens(Serving.serve_tokens)

    def ask(headers: Any, model: str = MODEL, **extra_args: Any) -> Any:
        given = Namespace(sampling_params=SamplingParams(extra_args=extra_args), model=model)
        sender = caller._current.set(asks(*headers))
        try:
            return asyncio.run(method(Serving(), given))
        finally:
            caller._current.reset(sender)

    assert ask([bearer("gold-key")], kv_budget=0.8)["kv_budget"] == 0.8
    assert ask([("X-KV-Budget", "0.3")], x=1) == {
        "x": 1, "kv_policy": "kvcrush", "kv_budget": 0.3, "kv_elastic": False,
    }  # fmt: skip
    for headers, model, extra in (
        ([], MODEL, {"kv_budget": 0.8}),
        ([], "small", {"kv_budget": 0.4}),
        ([], MODEL, {"kv_elastic": False}),
        ([("X-KV-Budget", "0.8")], MODEL, {}),
        ([("X-KV-Budget", "0.3")], MODEL, {"kv_budget": 0.4}),
    ):
        with pytest.raises(VLLMValidationError):
            ask(headers, model, **extra)


NAMES = [
    "x-kv-budget",
    "X-KV-Policy",
    "x-tenant",
    "X_Tenant",
    "x-modest",
    "x-more",
    "authorization",
]
VALUES = ["0.1", "0.6", "0.95", "4000", "none", "int8", "h2o", "yes", "1", "gold", "Bearer gold"]
BODY = {
    "kv_budget": st.sampled_from([None, 0.1, 0.6, 1, 0.95, 3000, "0.6", True]),
    "kv_policy": st.sampled_from([None, "none", "int8", "h2o", "int4", "kvcrush(ratio=0.4)"]),
    "kv_elastic": st.booleans(),
    "kv_rule": st.just("gold"),
    "model": st.sampled_from(["small", "sql", "gold", "acme"]),
}


@settings(deadline=None)
@given(
    headers=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), max_size=5),
    body=st.fixed_dictionaries({}, optional=BODY),
    xargs=st.fixed_dictionaries({}, optional={k: v for k, v in BODY.items() if k != "model"}),
)
def test_whatever_a_stranger_sends(
    tmp_path_factory: pytest.TempPathFactory, headers: Any, body: Any, xargs: Any
) -> None:
    """It is refused, or runs within the default's limits, for the scheduler as for the front."""
    made = STRANGERS.get("front")
    if made is None:
        path = tmp_path_factory.mktemp("rules") / "rules.yaml"
        # The proxy strips the trusted header.
        path.write_text(FILE, encoding="utf-8")
        made = STRANGERS["front"] = params.Front(vllm_config(SERVER | {"rules": str(path)}))
    headers = [(name, text) for name, text in headers if name != "x-tenant"]
    lora = Namespace(lora_name="sql") if body.get("model") == "sql" else None
    if xargs := {key: v for key, v in xargs.items() if v is not None}:
        body = {**body, "vllm_xargs": xargs}
    try:
        args = send(made, headers, lora=lora, **body)
    except (VLLMValidationError, ValueError):  # the latter from vLLM's own types
        return
    found = engine(args)
    assert found.active and found.policy.partition("(")[0] in ("kvcrush", "h2o")
    assert found.budget <= (0.5 if isinstance(found.budget, float) else 2048)


STRANGERS: dict[str, params.Front] = {}


# -- the scheduler ---------------------------------------------------------------------------------


def test_the_scheduler_holds_requests_against_the_flags() -> None:
    """Whatever reaches it, of a front end or past it, it lets nobody have more than the server."""
    asked = config.RequestParams("int8", 0.75, ((0, 8),), ((8, 16),), rule="gold")
    plain = config.RequestParams("none", 0.25)
    assert engine(asked.to_args() | {"kv_spans": []}) == config.RequestParams(
        "int8", 0.75, (), ((8, 16),)
    )
    assert engine(plain.to_args(), budget_max=None).policy == "none"
    told = config.RequestParams("int8", 0.75, rule="gold")
    assert engine(told.to_args(tell_rule=True)) == told
    for args in (
        {"kv_budget": 0.95, "kv_elastic": True},
        {"kv_policy": "snapkv", "kv_elastic": True, "kv_rule": "gold"},
        {"kv_policy": "none", "kv_elastic": True},
        {"kv_budget": 0.95},
    ):
        with pytest.raises(ConfigError):
            engine(args)


def test_a_default_budget_stays_one_under_pressure() -> None:
    made = server(pressure=0.8)
    for args, elastic in (({}, True), ({"kv_budget": 0.25}, False)):
        found = made.validate_request(args, BLOCK, LONGEST)
        assert found.elastic is elastic
        assert made.resolved(found.to_args(), BLOCK, LONGEST) == found
    # Forged, it says no more than a request that states no budget.
    assert not server().resolved({"kv_elastic": True}, BLOCK, LONGEST).elastic


# -- middleware ------------------------------------------------------------------------------------


def test_the_middleware_keeps_each_requests_caller_apart() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found = caller.current()
        await asyncio.sleep(0.01)
        assert caller.current() is found
        # Tasks of a request are its own.
        inner = await asyncio.create_task(asyncio.to_thread(caller.current))
        seen.append((scope["type"], None if found is None else found.header("x-a"), inner is found))

    wrapped = CallerMiddleware(app)

    async def run() -> None:
        http = [{"type": "http", "headers": [(b"x-a", str(n).encode())]} for n in range(5)]
        await asyncio.gather(
            *(wrapped(scope, None, None) for scope in (*http, {"type": "lifespan"}))
        )
        assert caller.current() is None

    asyncio.run(run())
    wanted = [*(("http", str(n), True) for n in range(5)), ("lifespan", None, True)]
    assert sorted(seen, key=repr) == sorted(wanted, key=repr)


def test_servers_get_the_middleware_once() -> None:
    args = Namespace(additional_config=None, middleware=["theirs.Own"], kv_policy="int8")
    for _ in range(2):
        plugin._fold(args)
        assert args.middleware == ["theirs.Own", caller.MIDDLEWARE]
    plain = Namespace(additional_config=None, middleware=[])
    plugin._fold(plain)
    assert plain.middleware == []
    # A batch runner serves no HTTP.
    plugin._fold(Namespace(additional_config={"kvcrush": {"policy": "int8"}}))
    module, _, name = caller.MIDDLEWARE.rpartition(".")
    assert module == caller.__name__ and getattr(caller, name) is CallerMiddleware


def test_a_caller_that_is_shown_says_nothing() -> None:
    assert "gold" not in repr(asks(bearer("gold-key")))


# -- reading it again ------------------------------------------------------------------------------


def until(true: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def limit(front: params.Front) -> Any:
    assert front.rules is not None
    return front.rules.default.settings.budget_max


def reloads(result: str) -> float:
    return float(value(metrics.rules_reloads(), MODEL, result))


def test_a_changed_file_holds_at_once_and_a_bad_one_never(
    front: params.Front, path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    counted = reloads("loaded")
    path.write_text(FILE.replace("budget_max: 0.5", "budget_max: 0.6"), encoding="utf-8")
    until(lambda: limit(front) == 0.6)
    time.sleep(0.1)  # what an earlier test left may be counted at the same time
    loaded, before = reloads("loaded"), reloads("refused")
    assert loaded > counted
    # Nonsense, more than the server allows, nothing, no file.
    bad = (b"rules: [", b"default: {budget_max: 0.95}", b"", None)
    for number, broken in enumerate(bad, 1):
        with caplog.at_level(logging.ERROR, logger="vllm.kvcrush"):
            caplog.clear()
            path.unlink() if broken is None else path.write_bytes(broken)
            until(lambda wanted=before + number: reloads("refused") == wanted)
            time.sleep(0.1)
        assert limit(front) == 0.6
        (line,) = caplog.messages  # once, not at every look
        assert str(path) in line and "the rules loaded before hold" in line and "\n" not in line
    assert engine(send(front, [bearer("gold-key")])).policy == "int8"
    # Put right again.
    path.write_text(FILE, encoding="utf-8")
    until(lambda: limit(front) == 0.5)
    until(lambda: (reloads("loaded"), reloads("refused")) == (loaded + 1, before + len(bad)))


def test_swapped_links_of_a_config_map_are_seen(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes: rules.yaml -> ..data/rules.yaml, ..data -> a folder of the day."""
    monkeypatch.setattr(reload, "INTERVAL", 0.02)
    for number, most in enumerate(("0.5", "0.6")):
        folder = tmp_path / f"..{number}"
        folder.mkdir()
        (folder / "rules.yaml").write_text(f"default: {{budget_max: {most}}}\n", encoding="utf-8")
        os.utime(folder / "rules.yaml", (1e9, 1e9))  # of the same size and time
    data, path = tmp_path / "..data", tmp_path / "rules.yaml"
    data.symlink_to("..0")
    path.symlink_to("..data/rules.yaml")
    front = params.Front(vllm_config(SERVER | {"rules": str(path)}))
    assert limit(front) == 0.5
    (tmp_path / "..data_tmp").symlink_to("..1")
    (tmp_path / "..data_tmp").rename(data)
    until(lambda: limit(front) == 0.6)


def test_a_file_that_is_being_written_is_left_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of a file can be a whole one that lacks rules."""
    monkeypatch.setattr(reload, "INTERVAL", 0)
    monkeypatch.setattr(reload, "_watch", lambda ref: None)
    path = tmp_path / "rules.yaml"
    path.write_text("default: {}\n", encoding="utf-8")
    read: list[str] = []

    def load() -> Rules:
        read.append(path.read_text(encoding="utf-8"))
        return Rules.of(server())

    watched = Watched(str(path), load, lambda result, rules: None)
    state = reload._stat(str(path))
    with path.open("w", encoding="utf-8") as file:
        for line in ("default: {}\n", "rules: []\n", "# end\n"):
            file.write(line)
            file.flush()
            now = watched.look(state)
            assert now != state and len(read) == 1
            state = now
    watched.look(state)
    watched.look(state)
    assert read[1:] == ["default: {}\nrules: []\n# end\n"]


def test_a_request_keeps_the_rules_that_it_came_under(
    front: params.Front, path: pathlib.Path
) -> None:
    """Otherwise one that was accepted could fail after its stream had begun."""
    sender = caller._current.set(asks())
    try:
        given = ChatCompletionRequest(**CHAT, kv_budget=0.5).to_sampling_params(16, {})
        front.check(given)
    finally:
        caller._current.reset(sender)
    path.write_text(FILE.replace("budget_max: 0.5", "budget_max: 0.4"), encoding="utf-8")
    until(lambda: limit(front) == 0.4)
    request = Namespace(sampling_params=given.clone(), prompt_token_ids=[1], lora_request=None)
    front.admit(request, given)
    assert engine(request.sampling_params.extra_args).budget == 0.5
    with pytest.raises(VLLMValidationError, match=r"limit of 0\.4"):
        send(front, (), kv_budget=0.5)


def test_the_watch_ends_with_the_engine(path: pathlib.Path) -> None:
    before = {*threading.enumerate()}
    front = params.Front(vllm_config(SERVER | {"rules": str(path)}))
    (thread,) = {*threading.enumerate()} - before
    time.sleep(0.1)
    assert thread.is_alive()
    del front
    thread.join(5)
    assert not thread.is_alive()


def test_a_server_does_not_start_with_a_bad_file(path: pathlib.Path) -> None:
    path.write_text("default: {budget: 7.5}\n", encoding="utf-8")
    with pytest.raises(RulesError, match=r"line 1: default\.budget=7\.5"):
        params.Front(vllm_config(SERVER | {"rules": str(path)}))
    with pytest.raises(ConfigError, match=r"--kv-budget-rules: .*default\.budget=7\.5"):
        plugin._rules(server(rules=str(path)), BLOCK, LONGEST)
    for wrong in (7, ""):
        with pytest.raises(ConfigError, match="is not a path"):
            server(rules=wrong)
    assert plugin._rules(server(), BLOCK, LONGEST) is None
    assert Settings.from_dict(server(rules="x").to_dict()).rules == "x"


# -- SIGHUP ----------------------------------------------------------------------------------------


def _child(catches: bool, ready: Any) -> None:
    if catches:
        signal.signal(signal.SIGHUP, lambda signum, frame: os._exit(7))
    ready.set()
    time.sleep(30)


@pytest.fixture
def hangup() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


def test_sighup_reads_the_file_and_reaches_api_servers_only(
    tmp_path: pathlib.Path, hangup: None
) -> None:
    """To the engine, which has no handler, it would be the end."""
    path = tmp_path / "rules.yaml"
    path.write_text(FILE, encoding="utf-8")
    results: list[str] = []
    watched = Watched(
        str(path),
        lambda: rules.load(str(path), server()),
        lambda result, rules: results.append(result),
    )
    fork = multiprocessing.get_context("fork")
    ready = [fork.Event(), fork.Event()]
    api = fork.Process(target=_child, args=(True, ready[0]))
    core = fork.Process(target=_child, args=(False, ready[1]))
    for process in (api, core):
        process.start()
    try:
        assert all(each.wait(20) for each in ready)
        reload.on_hangup()
        os.kill(os.getpid(), signal.SIGHUP)
        # Though nothing has changed.
        until(lambda: results == ["loaded"])
        api.join(10)
        assert api.exitcode == 7 and core.is_alive() and watched.current.from_file
    finally:
        for process in (api, core):
            process.kill()
            process.join(10)


def test_a_script_keeps_its_sighup(path: pathlib.Path, hangup: None) -> None:
    """`LLM` may be part of any program; a server is one of its own."""
    before = signal.getsignal(signal.SIGHUP)
    file = {"rules": str(path)}
    for more, http, ours in ((file, False, False), ({}, True, False), (file, True, True)):
        params.start(Processor(vllm_config(SERVER | more)), http)
        assert (signal.getsignal(signal.SIGHUP) is reload._hangup) is ours
        assert ours or signal.getsignal(signal.SIGHUP) is before


def test_only_the_main_thread_may_take_sighup(hangup: None) -> None:
    with ThreadPoolExecutor(1) as thread:
        thread.submit(reload.on_hangup).result()
    assert not reload._catches(2**22 + 1, signal.SIGHUP)  # no such process


# -- metrics and usage -----------------------------------------------------------------------------


def test_rules_are_counted_and_told_only_if_the_operator_says_so(
    front: params.Front, path: pathlib.Path
) -> None:
    before = {
        name: value(metrics.rule_requests(), MODEL, name)
        for name in ("default", "gold", "adapter", "acme")
    }
    send(front)
    send(front, [bearer("gold-key")])
    assert "kv_rule" not in send(front, [bearer("gold-key")])
    after = {name: value(metrics.rule_requests(), MODEL, name) for name in before}
    assert {n: after[n] - before[n] for n in before} == {
        "default": 1, "gold": 2, "adapter": 0, "acme": 0,
    }  # fmt: skip
    path.write_text("rule_in_usage: true\n" + FILE, encoding="utf-8")
    until(lambda: bool(front.rules and front.rules.rule_in_usage))
    assert send(front, [bearer("gold-key")])["kv_rule"] == "gold"
    assert engine(send(front)).rule == "default"
    # Without a file there is no rule to tell of.
    assert "kv_rule" not in send(params.Front(vllm_config(SERVER)))


# -- the command -----------------------------------------------------------------------------------


def test_the_command_checks_a_file(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(FILE, encoding="utf-8")
    flags = ["--kv-policy=kvcrush", "--kv-budget-max=0.9", "--kv-policy-allow", *SERVER["allow"]]
    clients = '{"clients": {"kvcrush": {"ratio": [0, 0.5], "anchor": ["mean", "random"]}}}'
    command = ["rules", "check", str(path), *flags, "--kv-policy-config", clients]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "| gold | 2 keys | int8 | 0.75 | 0.9 | int8, kvcrush, h2o |" in said
    assert "| modest | x-modest yes, and x-more 1 | kvcrush | 0.25 | 0.3 | kvcrush, h2o |" in said
    assert "| default | all others | kvcrush |" in said and "x-kv-policy are taken" in said
    sizes = ["--block-size=16", "--max-model-len=4096"]
    assert cli.main([*command, *sizes]) == 0
    capsys.readouterr()
    # Under other flags.
    assert cli.main(["rules", "check", str(path), "--kv-budget-max=0.4"]) == 2
    said = capsys.readouterr().err
    assert "line 5: default.budget_max allows more than the server does: 0.5 is above 0.4" in said
    assert len(said.splitlines()) == 3
    for wrong in (["--kv-policy-config", "{"], ["--kv-budget", "x"], ["--kv-policy=none", *sizes]):
        more = ["--kv-budget-max=0.5"]
        assert cli.main(["rules", "check", str(path), *wrong, *more]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_command_hashes_a_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, warned in (("gold-key\n", True), ("0123456789abcdef0123", False)):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert cli.main(["rules", "hash"]) == 0
        said = capsys.readouterr()
        assert said.out == key_hash(text.strip()) + "\n"
        assert ("can be guessed" in said.err) is warned
    for text in ("", "\n", "a\nb\n", " a", "ключ"):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert cli.main(["rules", "hash"]) == 2
        said = capsys.readouterr()
        assert not said.out and said.err.count("\n") == 1


def test_the_manuals_example_is_one(tmp_path: pathlib.Path) -> None:
    manual = pathlib.Path(__file__).parents[2] / "docs" / "rules.md"
    text = manual.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    path = tmp_path / "rules.yaml"
    path.write_text(text.replace("sha256:6f2a...", key_hash("k")), encoding="utf-8")
    found = rules.load(str(path), Settings.from_dict({"policy": "auto", "budget_max": 1.0}))
    assert [rule.name for rule in found] == ["gold", "acme", "classifier", "default"]
    assert not found.warnings and found.request_headers and not found.rule_in_usage
