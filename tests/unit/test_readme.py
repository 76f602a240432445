"""The pages say what was measured."""

from __future__ import annotations

import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from benchmarks import figures, plan_picture


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda p: str(p.relative_to(figures.ROOT)))
def test_tables_are_those_of_the_committed_results(page: pathlib.Path) -> None:
    assert not figures.outdated(page, figures.parts()), "run make figures"


def test_pictures_were_drawn_from_the_committed_results() -> None:
    assert figures.undrawn() == [], "run make figures"
    drawn = (figures.ROOT / "docs" / "plan.svg").read_text()
    assert drawn == plan_picture.picture(), "run make figures"


def test_the_tables_of_gpu_kernels_are_those_of_the_committed_results() -> None:
    assert figures.GPU_PAGE.read_text() == figures.gpu_page(), "run make figures"


def test_the_page_of_policies_is_that_of_docstrings_and_results() -> None:
    assert figures.POLICIES_PAGE.read_text() == figures.policies_page(), "run make figures"


def test_a_changed_figure_is_noticed(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "README.md"
    page.write_text((figures.ROOT / "README.md").read_text().replace("times as many", "times"))
    assert figures.outdated(page, figures.parts())


def test_every_marker_is_known() -> None:
    with pytest.raises(ValueError, match="no table is called speed"):
        figures.fill("<!-- speed -->\nfast\n<!-- /speed -->", figures.parts())


@pytest.mark.parametrize("name", figures.DRAW)
def test_every_result_can_be_drawn(name: str, tmp_path: pathlib.Path) -> None:
    result = figures.RESULTS / f"{name}.json"
    drawn = figures.draw(name, result, tmp_path / "picture.svg")
    assert drawn is not None and figures.digest(result) in drawn.read_text()


def test_the_request_that_make_serve_prints_can_be_pasted() -> None:
    """It can be pasted into a shell, from any directory, and its prompt is long enough for
    compression to be seen."""

    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    script = (figures.ROOT / "scripts" / "serve.sh").read_text()
    watcher = script.split("<<'EOF' &\n")[1].split("EOF\n")[0]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = str(server.server_port)
        arguments = [str(os.getpid()), port, str(figures.ROOT / "LICENSE")]
        done = subprocess.run(
            [sys.executable, "-", *arguments],
            input=watcher,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        server.shutdown()
    said = done.stdout
    command = said[said.index("\n\n") + 2 :].strip()
    make, send = command.rsplit(" | curl ", 1)
    assert f"http://127.0.0.1:{port}/v1/chat/completions" in send and "--data-binary @-" in send
    made = subprocess.run(
        ["bash", "-c", make], capture_output=True, text=True, check=True, cwd="/", timeout=60
    )
    request = json.loads(made.stdout)
    assert request["kv_budget"] == 0.25 and len(request["messages"][0]["content"]) > 10_000
    assert "--kv-policy auto --kv-budget 0.25" in script
