"""Takes the pictures of docs/live.md, of a server under pressure:
`python -m tests.server.pictures`, with Debian's chromium."""

from __future__ import annotations

import io
import pathlib
import pydoc_data.topics
import tempfile
import time
from contextlib import ExitStack

from PIL import Image

from tests.server.conftest import running
from tests.server.test_live import chromium, installed, opened, traffic
from vllm_kvcrush.tools import demo_model

FIGURES = pathlib.Path(__file__).parents[2] / "docs" / "figures"
# 160 blocks.
FLAGS = (
    "--kv-policy=auto",
    "--kv-policy-allow=auto,snapkv,none",
    "--kv-budget-max=1.0",
    "--kv-pressure=0.75",
    "--kv-live-page",
    "--kv-cache-memory-bytes=235929600",
    "--max-num-seqs=8",
)
ASKED = ({}, {}, {}, {}, {"kv_policy": "snapkv", "kv_budget": 0.5}, {"kv_policy": "none"}, {}, {})


def main() -> None:
    """Starts the server, keeps it busy, and looks at it."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))[20000:23000]
    log = pathlib.Path(tempfile.mkdtemp()) / "log.txt"
    with ExitStack() as stack:
        server = stack.enter_context(running(str(demo_model.prepare()), log, *FLAGS))
        stack.enter_context(traffic(server, text, *ASKED))
        browser = stack.enter_context(chromium(installed()))
        time.sleep(60)
        for scheme, width in (("light", 1280), ("dark", 1280), ("light", 360)):
            with opened(browser, server, width, scheme, device_scale_factor=1.5) as page:
                page.wait_for_timeout(4000)
                taken = io.BytesIO(page.screenshot(full_page=True))
            size = "" if width > 400 else "-phone"
            Image.open(taken).quantize(96).save(FIGURES / f"live-{scheme}{size}.png", optimize=True)


if __name__ == "__main__":
    main()
