"""The live page: `GET /kvcrush`, and what it shows as JSON (`/kvcrush/state`) and as a stream of
server-sent events (`/kvcrush/events`). Off without `--kv-live-page`.

It goes in as one of vLLM's endpoint plug-ins. vLLM loads those of other packages only if they are
named in VLLM_PLUGINS; here the flag is what an operator asks for it with, so that the plug-in is
added to those that vLLM found. The server's API key guards the state and the events, by vLLM's own
check. The page itself is the same for every server and says nothing about it: a browser cannot send
a key when it opens one, so the page asks for the key.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from vllm_kvcrush.server import Method, configured, wrap
from vllm_kvcrush.server.live import document
from vllm_kvcrush.server.live.engines import Engines
from vllm_kvcrush.server.live.hub import MOST_VIEWERS, Full, Hub
from vllm_kvcrush.server.live.state import State

PATH = "/kvcrush"
# Never kept by browsers or proxies, and passed on by nginx as it comes.
_FRESH = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def install(vllm_config: Any) -> None:
    """Adds the page to the API server of this process, if its engine was started with it."""
    settings = configured(vllm_config)
    if not (settings and settings.get("live_page")):
        return
    from vllm import plugins
    from vllm.entrypoints.serve.middleware import authenticate

    wrap(plugins, "load_endpoint_plugins", _with_live_page)
    if PATH + "/" not in authenticate.GUARDED_PREFIX:
        authenticate.GUARDED_PREFIX = (*authenticate.GUARDED_PREFIX, PATH + "/")


def _with_live_page(original: Method) -> Method:
    def load_endpoint_plugins(*args: Any, **kwargs: Any) -> list[Any]:
        return [*original(*args, **kwargs), LivePage()]

    return load_endpoint_plugins


class LivePage:
    """The endpoint plug-in, as vLLM's `EndpointPlugin` describes it."""

    name = "kvcrush_live_page"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes to the server."""
        app.include_router(router(app))

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Makes the hub, when the engines are there."""
        config = engine_client.vllm_config
        settings = configured(config)
        about = {
            "model": str(config.model_config.served_model_name),
            "policy": settings["policy"],
            "budget": settings["budget"],
        }

        def ending() -> bool:
            server = getattr(state, "server", None)
            return server is not None and bool(server.should_exit)

        state.kvcrush_hub = Hub(Engines(engine_client.engine_core), about, ending)


def router(app: FastAPI) -> APIRouter:
    """Returns the routes of the page."""
    routes = APIRouter(tags=["vllm-kvcrush"])

    @routes.get(PATH, response_class=HTMLResponse, summary="The live page")
    async def page() -> Response:
        return HTMLResponse(document.html(), headers=document.headers())

    @routes.get(PATH + "/state", summary="What the live page shows, as JSON")
    async def state(response: Response) -> State:
        response.headers.update(_FRESH)
        found: State = await app.state.kvcrush_hub.state()
        if not found.engines:
            raise HTTPException(503, "No engine has answered yet: try again in a few seconds.")
        return found

    @routes.get(
        PATH + "/events",
        response_class=StreamingResponse,
        summary="The same as server-sent events, about one a second",
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def events() -> Response:
        stream = app.state.kvcrush_hub.events()
        try:
            first = await anext(stream)
        except Full:
            raise HTTPException(
                503,
                f"{MOST_VIEWERS} viewers are connected, which is the most: close another one, or "
                f"ask {PATH}/state.",
            ) from None

        async def all_of_them() -> Any:
            yield first
            async for event in stream:
                yield event

        return StreamingResponse(all_of_them(), media_type="text/event-stream", headers=_FRESH)

    return routes
