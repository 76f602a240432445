"""What the live page shows of an engine, and who is told of it: the pure parts, and the hub and the
routes over engines that are not there."""

from __future__ import annotations

import asyncio
import base64
import copy
import hashlib
import itertools
import json
import re
import time
from argparse import Namespace
from collections.abc import AsyncIterator
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcrush.engine.snapshot import MOST_CELLS, STATES, cells, expected_pages, region_codecs
from vllm_kvcrush.plan import Packing, Plan
from vllm_kvcrush.server import live
from vllm_kvcrush.server.live import document, hub
from vllm_kvcrush.server.live.engines import Engines
from vllm_kvcrush.server.live.hub import MOST_VIEWERS, Full, Hub, Viewer, since
from vllm_kvcrush.server.live.state import State

ABOUT = {"model": "m", "policy": "auto", "budget": 0.25}


# -- counts ----------------------------------------------------------------------------------------


@given(
    rooms=st.lists(st.integers(9, 60), min_size=1, max_size=3),
    heads=st.integers(1, 4),
    blocks=st.integers(1, 40),
    candidates=st.integers(1, 2000),
    tiers=st.booleans(),
)
def test_the_blocks_of_a_region_are_shared_out_whole(
    rooms: list[int], heads: int, blocks: int, candidates: int, tiers: bool
) -> None:
    packings = tuple(
        Packing(f"c{i}", (((room, heads), (room + 7, 1)),)) for i, room in enumerate(sorted(rooms))
    )
    plan = Plan(0.25, 4096, block_size=8, packings=packings, tiers=tiers)
    pages = expected_pages(plan, blocks, candidates)
    found = region_codecs(pages, blocks)
    assert sum(found.values()) == blocks and all(n > 0 for n in found.values())
    parts = [part.codec for part in plan.parts(blocks, candidates)]
    assert list(found) == [codec for codec in parts if codec in found]
    total = sum(pages.values())
    for codec, n in pages.items():
        assert abs(found.get(codec, 0) - blocks * n / total) < 1
    raw = expected_pages(Plan(0.25, 4096, block_size=8), blocks, candidates)
    assert region_codecs(raw, blocks) == {"raw": blocks}
    assert region_codecs(raw, 0) == {}


@given(st.lists(st.integers(0, len(STATES) - 1), min_size=1, max_size=3 * MOST_CELLS))
def test_a_large_pool_has_no_more_cells_than_can_be_shown(states: list[int]) -> None:
    size, shown = cells(np.array(states, dtype=np.uint8))
    assert len(shown) == -(-len(states) // size) <= MOST_CELLS
    for at, state in enumerate(shown[:50]):
        own = states[at * size : (at + 1) * size]
        assert own.count(state) == max(own.count(other) for other in own)


# -- the hub ---------------------------------------------------------------------------------------


def snapshot(**more: Any) -> dict[str, Any]:
    return {
        "time": time.time(),
        "pool": {
            "blocks": 3, "block_size": 32, "block_bytes": 100, "cell_blocks": 1,
            "counts": {"free": 1, "cached": 0, "int8": 2}, "map": [["free", 1], ["int8", 2]],
        },
        "pressure": {"now": 0.5, "limit": 0.8, "history": [[time.time() - 9, 0.25]]},
        "running": 1,
        "waiting": 0,
        "requests": [],
        "compactions": {"total": {"budget": 1}, "recent": [compaction(1)]},
        "seconds": 0.0,
        **more,
    }  # fmt: skip


def compaction(seq: int, seconds: float | None = 0.01) -> dict[str, Any]:
    return {
        "seq": seq, "time": 1.0, "request": 7, "policy": "auto", "reason": "budget", "tokens": 99,
        "blocks_before": 9, "blocks_after": 3, "blocks_freed": 6, "tokens_evicted": 0,
        "seconds": seconds,
    }  # fmt: skip


class Client:
    """vLLM's client of two engines, of which some never answer."""

    def __init__(self, *silent: int):
        self.engine_ranks_managed = [0, 1]
        self.core_engines = [b"0", b"1"]
        self.silent = set(silent)
        self.asked: list[int] = []
        self.answer = snapshot()

    async def _call_utility_async(self, method: str, *, engine: bytes) -> dict[str, Any]:
        assert method == "kvcrush_snapshot"
        rank = int(engine)
        self.asked.append(rank)
        while rank in self.silent:
            await asyncio.sleep(0.005)
        if self.answer.get("fails"):
            raise RuntimeError("the engine is dead")
        return copy.deepcopy(self.answer)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PERIOD", 0.05)
    monkeypatch.setattr(hub, "_PATIENCE", 0.1)


def make_hub(client: Client, ended: list[bool] | None = None) -> Hub:
    return Hub(Engines(client), ABOUT, lambda: bool(ended))


def parsed(event: bytes) -> State:
    name, data, *rest = event.decode().split("\n")
    assert name == "event: state" and rest == ["", ""]
    return State.model_validate_json(data.removeprefix("data: "))


def test_nothing_is_asked_while_nobody_looks_and_one_question_serves_all() -> None:
    async def run() -> None:
        client = Client()
        made = make_hub(client)
        await asyncio.sleep(0.1)
        assert client.asked == []
        states = await asyncio.gather(*(made.state() for _ in range(20)))
        assert client.asked == [0, 1] and all(s is states[0] for s in states)
        viewers = [made.events() for _ in range(MOST_VIEWERS)]
        first = [parsed(await anext(v)) for v in viewers]
        assert all(s.engines[0].pressure.history for s in first)
        for _ in range(3):
            events = await asyncio.gather(*(anext(v) for v in viewers))
            assert all(event is events[0] for event in events)
        asked = len(client.asked)
        assert asked <= 2 * 6, "the engines were asked more often than there were events"
        with pytest.raises(Full):
            await anext(made.events())
        await viewers.pop().aclose()
        again = made.events()
        await anext(again)
        for viewer in (*viewers, again):
            await viewer.aclose()
        await asyncio.sleep(0.15)
        asked = len(client.asked)
        await asyncio.sleep(0.2)
        assert len(client.asked) == asked, "the engines are asked, and nobody looks"

    asyncio.run(run())


def test_a_slow_viewer_loses_events_and_no_memory() -> None:
    async def run() -> None:
        viewer = Viewer()
        for i in range(1000):
            viewer.offer(b"%d" % i)
        assert await viewer.take(0.01) == b"999"
        assert await viewer.take(0.01) is None

    asyncio.run(run())


def test_an_engine_that_does_not_answer_is_asked_once_and_shown_as_it_was() -> None:
    async def run() -> None:
        client = Client()
        engines = Engines(client)
        _, silent = await engines.read(1)
        assert silent == []
        client.silent = {1}
        for _ in range(3):
            found, silent = await engines.read(0.02)
            assert silent == [1] and [e["stale"] for e in found] == [False, True]
        assert client.asked.count(1) == 2, "a question was asked while another waits"
        client.silent = set()
        client.answer = snapshot(running=5)
        await asyncio.sleep(0.02)
        # The late answer is not of now, so that it is asked again.
        found, silent = await engines.read(1)
        assert silent == [] and client.asked.count(1) == 3
        assert [e["running"] for e in found] == [5, 5]
        # Elastic data parallelism took it away.
        client.engine_ranks_managed, client.core_engines = [0], [b"0"]
        found, silent = await engines.read(1)
        assert [e["engine"] for e in found] == [0] and silent == []

    asyncio.run(run())


def test_streams_end_when_the_server_is_stopped() -> None:
    async def run() -> None:
        ended: list[bool] = []
        made = make_hub(Client(), ended)
        stream = made.events()
        await anext(stream)
        ended.append(True)
        async with asyncio.timeout(2):
            assert len([event async for event in stream]) <= 1

    asyncio.run(run())


def test_events_have_only_what_is_new() -> None:
    def state(**more: Any) -> State:
        engine = {"engine": 0, "stale": False, **snapshot(**more)}
        return State.model_validate({**ABOUT, "time": 1.0, "engines": [engine], "silent": []})

    past = {"now": 0.5, "limit": None, "history": [[1.0, 0.1], [2.0, 0.2]]}
    events = [compaction(1), compaction(2, None)]
    before = state(time=2.5, pressure=past, compactions={"total": {}, "recent": events})
    past["history"] = [[1.0, 0.1], [2.0, 0.2], [3.0, 0.3]]
    events = [compaction(1), compaction(2), compaction(3)]
    after = state(time=3.5, pressure=past, compactions={"total": {}, "recent": events})
    (engine,) = since(before, after).engines
    assert engine.pressure.history == [(3.0, 0.3)]
    # The second has its report by now.
    assert [(c.seq, c.seconds) for c in engine.compactions.recent] == [(2, 0.01), (3, 0.01)]
    assert since(None, after) is after
    assert len(after.engines[0].compactions.recent) == 3


# -- the routes, in vLLM's own application ---------------------------------------------------------


def application(monkeypatch: pytest.MonkeyPatch, client: Client, *flags: str) -> FastAPI:
    """vLLM's application of a server with `--kv-live-page`, over engines that are not there."""
    import vllm.plugins
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.middleware import authenticate
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # `install` changes them for good.
    monkeypatch.setattr(authenticate, "GUARDED_PREFIX", authenticate.GUARDED_PREFIX)
    monkeypatch.setattr(vllm.plugins, "load_endpoint_plugins", vllm.plugins.load_endpoint_plugins)
    settings = {"policy": "auto", "budget": 0.25, "live_page": True}
    config = Namespace(
        additional_config={"kvcrush": settings}, model_config=Namespace(served_model_name="m")
    )
    live.install(config)
    live.install(config)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(list(flags))
    app = build_app(args, ("generate",))
    (page,) = app.state.endpoint_plugins
    engine_client = Namespace(vllm_config=config, engine_core=client)
    asyncio.run(page.init_state(engine_client, app.state, args))
    return app


def ask(app: FastAPI, *paths: str, **headers: str) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return [await client.get(path, headers=headers) for path in paths]

    return asyncio.run(run())


def test_the_key_guards_the_data_as_it_guards_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    app = application(monkeypatch, client, "--api-key", "s3cret", "other")
    data = ("/kvcrush/state", "/kvcrush/events", "/kvcrush/", "/kvcrush/anything")
    for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": "s3cret"}):
        page, models, *others = ask(app, "/kvcrush", "/v1/models", *data, **headers)
        assert page.status_code == 200
        for answer in others:
            assert (answer.status_code, answer.content) == (401, models.content)
    assert client.asked == []
    for key in ("s3cret", "other"):
        (answer,) = ask(app, "/kvcrush/state", Authorization=f"Bearer {key}")
        assert answer.status_code == 200


def test_the_state_is_what_its_schema_says(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    app = application(monkeypatch, client)
    document, answer = ask(app, "/openapi.json", "/kvcrush/state")
    assert answer.headers["Cache-Control"] == "no-store"
    openapi, state = document.json(), answer.json()
    schema = openapi["paths"]["/kvcrush/state"]["get"]["responses"]["200"]["content"]
    schema = {**schema["application/json"]["schema"], "components": openapi["components"]}
    jsonschema.Draft202012Validator(schema).validate(state)
    assert state["version"] == 1 and len(state["engines"]) == 2
    client.answer = {"fails": True}
    app = application(monkeypatch, client)
    (answer,) = ask(app, "/kvcrush/state")
    assert (
        answer.status_code == 503 and "No engine has answered" in answer.json()["error"]["message"]
    )


def test_every_field_is_described() -> None:
    for name, model in State.model_json_schema()["$defs"].items():
        assert model.get("description"), name
        for field, about in model["properties"].items():
            assert about.get("description") or "$ref" in about, f"{name}.{field}"


def test_a_server_without_the_flag_has_no_page() -> None:
    from vllm import plugins

    before = plugins.load_endpoint_plugins
    for settings in (None, {"policy": "auto"}, {"policy": "auto", "live_page": False}):
        live.install(Namespace(additional_config={"kvcrush": settings} if settings else {}))
    assert plugins.load_endpoint_plugins is before


# -- the page --------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_may_not() -> None:
    text, policy = document.html(), document.headers()["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    for tag in ("script", "style"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:,)""", text)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(r"""\son\w+=|\sstyle=|innerHTML|eval\(""", text)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_are_told_from_the_ground(theme: int) -> None:
    """WCAG 2.2: 4.5 for text, 3 for what is drawn."""
    css = document._read("page.css")
    found = dict(re.findall(r"--(\w+): (#\w{6})", css.split("prefers-color-scheme: dark")[theme]))
    for ground in ("panel", "ground"):
        for text in ("ink", "quiet", "bad"):
            assert contrast(found[text], found[ground]) >= 4.5, (text, ground)
    states = [name if name != "raw" else "kept" for name in STATES]
    for drawn in (*states, "focus", "good", "mark"):
        assert contrast(found[drawn], found["panel"]) >= 3, drawn
    # What lies side by side differs in lightness too, for those who do not see the hues.
    ramp = [found[name] for name in ("int8", "int4", "tc4", "tc6", "tc8")]
    assert all(contrast(a, b) >= 1.25 for a, b in itertools.pairwise(ramp))


def test_the_page_knows_every_state() -> None:
    script, css = document._read("page.js"), document._read("page.css")
    names = re.search(r"const NAMES = \{(.*?)\};", script, re.DOTALL)
    assert names is not None
    assert set(re.findall(r"(\w+): \"", names.group(1))) == set(STATES)
    for state in STATES:
        assert f".{state}-fill" in css


def test_events_are_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    app = application(monkeypatch, Client())

    async def run() -> None:
        chunks: list[dict[str, Any]] = []
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            chunks.append(message)
            if len(chunks) == 4:
                gone.set()

        scope = {
            "type": "http", "method": "GET", "path": "/kvcrush/events", "raw_path": b"",
            "query_string": b"", "headers": [], "root_path": "", "http_version": "1.1",
            "scheme": "http", "server": ("server", 80), "client": ("c", 1), "app": app,
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }  # fmt: skip
        async with asyncio.timeout(10):
            await app(scope, receive, send)
        start, *rest = chunks
        assert start["status"] == 200
        headers = dict(start["headers"])
        assert headers[b"content-type"].startswith(b"text/event-stream")
        assert headers[b"x-accel-buffering"] == b"no"
        assert [parsed(chunk["body"]).model for chunk in rest[:3]] == ["m"] * 3
        await asyncio.sleep(0.2)
        assert not app.state.kvcrush_hub._viewers

    asyncio.run(run())


def test_too_many_viewers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    app = application(monkeypatch, Client())

    async def full() -> AsyncIterator[bytes]:
        raise Full
        yield b""

    monkeypatch.setattr(app.state.kvcrush_hub, "events", full)
    (answer,) = ask(app, "/kvcrush/events")
    assert answer.status_code == 503
    assert f"{MOST_VIEWERS} viewers are connected" in json.loads(answer.content)["error"]["message"]
