"""The live page of a running server, as an operator and a browser see it, and the spans of its
requests."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.server.conftest import NAME, Collector, Server, details
from vllm_kvcrush.server.live.state import State

pytestmark = pytest.mark.server
MARK = "xylophone"


def get(server: Server, path: str) -> Any:
    return urllib.request.urlopen(f"{server.url}{path}", timeout=30)


def state(server: Server) -> State:
    with get(server, "/kvcrush/state") as response:
        return State.model_validate_json(response.read())


def until(server: Server, holds: Callable[[State], bool], seconds: float = 60) -> State:
    found = state(server)
    end = time.monotonic() + seconds
    while not holds(found):
        assert time.monotonic() < end, found
        time.sleep(0.3)
        found = state(server)
    return found


@contextmanager
def traffic(server: Server, text: str, *extra: dict[str, Any]) -> Iterator[None]:
    """Streams a completion for each of `extra` until it is left."""
    stop = threading.Event()

    def ask(number: int, body: dict[str, Any]) -> None:
        with server.client() as client:
            while not stop.is_set():
                stream = client.completions.create(
                    model=NAME,
                    prompt=f"{number} {MARK} {text}",
                    max_tokens=900,
                    stream=True,
                    extra_body={"ignore_eos": True, **body},
                    extra_headers={"X-Request-Id": f"{MARK}-{number}"},
                )
                for _ in stream:
                    if stop.is_set():
                        break
                stream.close()

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(extra)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def in_use(found: State) -> int:
    (engine,) = found.engines
    counts = engine.pool.counts
    return engine.pool.blocks - counts["free"] - counts["cached"]


MIXED = ({"kv_policy": "int4"}, {"kv_policy": "snapkv", "kv_budget": 0.5}, {"kv_budget": 0.75})


def test_the_state_follows_the_engine(server: Server, long: str) -> None:
    until(server, lambda found: in_use(found) == 0)
    before = state(server).engines[0]
    with traffic(server, long, *MIXED):
        found = until(
            server, lambda s: sum(r.compactions > 0 for r in s.engines[0].requests) == len(MIXED)
        )
        (engine,) = found.engines
        assert found.silent == [] and found.model and found.policy == "kvcrush"
        assert sum(engine.pool.counts.values()) == engine.pool.blocks
        assert sum(cells for _, cells in engine.pool.map) == engine.pool.blocks
        assert engine.pool.counts["int4"] > 0 and engine.pool.counts["raw"] > 0
        assert 0 < engine.pressure.now <= 1 and engine.pressure.limit is None
        assert engine.running == len(engine.requests) == 3
        for request in engine.requests:
            assert 0 < request.bytes_held < request.bytes_raw and request.reason == "budget"
            assert sum(request.blocks.values()) * engine.pool.block_bytes <= request.bytes_held
        assert {r.policy for r in engine.requests} >= {"snapkv"}
        assert sorted(r.budget for r in engine.requests) == [0.25, 0.5, 0.75]
        # The same on /metrics, where a step may lie between the two.
        codecs = {c: server.metric("vllm_kvcrush:kv_codec_bytes", codec=c) for c in ("int4", "raw")}
        assert all(codecs.values())
        with get(server, "/kvcrush/state") as response:
            body = response.read().decode()
        assert MARK not in body and "cmpl" not in body
        done = [
            c for c in engine.compactions.recent if c.seq > sum(before.compactions.total.values())
        ]
        assert done and all(c.blocks_after < c.blocks_before for c in done)
        until(server, lambda s: s.engines[0].compactions.recent[0].seconds is not None)
    left = until(server, lambda found: in_use(found) == 0 and found.engines[0].running == 0)
    assert left.engines[0].pressure.now == 0 and left.engines[0].requests == []
    history = left.engines[0].pressure.history
    assert history[-1][1] == 0 < max(pressure for _, pressure in history)
    assert server.metric("vllm_kvcrush:kv_codec_bytes") == 0


def test_events_come_about_once_a_second(server: Server) -> None:
    times = []
    with get(server, "/kvcrush/events") as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        for line in stream:
            if line.startswith(b"data: "):
                State.model_validate_json(line[6:])
                times.append(time.monotonic())
            if len(times) == 4:
                break
    gaps = [b - a for a, b in itertools.pairwise(times[1:])]
    assert all(0.8 < gap < 3 for gap in gaps), gaps


def test_spans_tell_what_a_request_kept(server: Server, collector: Collector, long: str) -> None:
    with server.client() as client:
        response = client.completions.create(
            model=NAME,
            prompt=f"span {long}",
            max_tokens=6,
            extra_body={"kv_policy": "snapkv", "kv_budget": 0.5},
        )
        plain = client.completions.create(model=NAME, prompt="Hello", max_tokens=3)
    kept = details(response)
    span = collector.span(response.id)
    expected = {
        "policy": "snapkv",
        "budget": 0.5,
        "compactions": kept["compactions"],
        "reason": "budget",
        "tokens_held": kept["held"],
        "tokens_raw": kept["raw"],
        "bytes_held": kept["kv_bytes_held"],
        "bytes_raw": kept["kv_bytes_raw"],
    }
    ours = {name.removeprefix("kvcrush."): v for name, v in span.items() if "kvcrush." in name}
    assert ours == expected and kept["compactions"] >= 1
    assert span["gen_ai.usage.completion_tokens"] == 6
    span = collector.span(plain.id)
    assert span["kvcrush.compactions"] == 0 and "kvcrush.reason" not in span


# -- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tools() -> pathlib.Path:
    """Where Playwright and axe are; Chromium is Debian's."""
    if shutil.which("chromium") is None:
        pytest.skip("SKIPPED, as Chromium is not here: apt-get install chromium")
    return installed()


def installed() -> pathlib.Path:
    script = pathlib.Path(__file__).parents[2] / "scripts" / "deploy_tools.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [script, "tests/server/requirements.txt"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return pathlib.Path(done.stdout.strip())


@pytest.fixture(scope="module")
def browser(tools: pathlib.Path) -> Iterator[Any]:
    with chromium(tools) as found:
        yield found


@contextmanager
def chromium(tools: pathlib.Path) -> Iterator[Any]:
    sys.path.append(str(tools))
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        yield found
        found.close()


@contextmanager
def opened(
    browser: Any, server: Server, width: int, scheme: str = "light", **more: Any
) -> Iterator[Any]:
    """Opens the page, and asserts that the browser complained of nothing."""
    look = {"color_scheme": scheme, "reduced_motion": "reduce", "device_scale_factor": 2, **more}
    context = browser.new_context(viewport={"width": width, "height": 900}, **look)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{server.url}/kvcrush")
    page.wait_for_selector(".requests tbody tr", timeout=30000)
    yield page
    assert said == []
    assert {url.removeprefix(server.url) for url in asked} <= {"/kvcrush", "/kvcrush/events"}
    context.close()


def wait_for(page: Any, condition: str) -> None:
    """Waits by the debugger: the page's policy lets it evaluate nothing by itself."""
    end = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(200)


LOOKS = [("light", 1280), ("dark", 1280), ("light", 360), ("dark", 360)]


def test_the_page_in_a_browser(
    server: Server, browser: Any, tools: pathlib.Path, long: str
) -> None:
    axe = (tools / "axe_playwright_python" / "axe.min.js").read_text(encoding="utf-8")
    with traffic(server, long, *MIXED, {"kv_policy": "int4", "kv_budget": 0.5}):
        until(server, lambda s: sum(r.compactions > 0 for r in s.engines[0].requests) == 4)
        for scheme, width in LOOKS:
            with opened(browser, server, width, scheme) as page:
                wait_for(page, "document.querySelectorAll('.events tbody tr').length > 2")
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                # axe is run by the debugger, past the page's policy.
                page.evaluate(axe)
                found = page.evaluate("axe.run()")
                assert not [(v["id"], [n["html"] for n in v["nodes"]]) for v in found["violations"]]
                assert len(found["passes"]) > 20
        with opened(browser, server, 800, reduced_motion="no-preference") as page:
            check_updates(page)
            check_keyboard(page)


def check_updates(page: Any) -> None:
    """Rows are kept, and what is said to screen readers does not change every second."""
    page.evaluate("document.querySelector('.requests tbody tr').id = 'kept'")
    spoken, clock = page.locator("[role=status]").all_text_contents(), page.text_content("#clock")
    assert "Live" in spoken and any("running" in text for text in spoken)
    wait_for(page, f"document.getElementById('clock').textContent !== {json.dumps(clock)}")
    assert page.locator("[role=status]").all_text_contents() == spoken
    assert page.locator("#kept").count() == 1
    label = page.get_attribute(".map", "aria-label")
    assert "Map of" in label and "int4" in label
    assert "now" in page.get_attribute(".chart", "aria-label")
    assert page.locator(".map path.int4-fill").get_attribute("d")


def check_keyboard(page: Any) -> None:
    page.evaluate("document.body.focus()")
    order = []
    for _ in range(3):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.textContent.trim().slice(0, 5)"))
    assert order[:2] == ["Skip ", "Pause"]
    page.focus("#pause")
    page.keyboard.press("Enter")
    assert page.get_attribute("#pause", "aria-pressed") == "true"
    assert page.text_content("#said") == "Paused"
    paused = page.text_content("#clock")
    page.wait_for_timeout(1500)
    assert page.text_content("#clock") == paused
    page.keyboard.press("Space")
    wait_for(page, f"document.getElementById('clock').textContent !== {json.dumps(paused)}")
    assert page.text_content("#said") == "Live"
