"""What the policies that a server allows may ask of a worker: what it prepares when it starts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.config import NONE, Demands, Settings


def region_codecs(settings: Settings) -> set[str]:
    """The codecs that regions may have pages of, whichever allowed policy a request names."""
    stored = [settings.storage(name) for name in settings.allow if name != NONE]
    found = {"raw"} if any(kind.pages for kind in stored) else set()
    for codec in {codec for kind in stored for codec in settings.codecs_of(kind)}:
        record = CODECS[codec]
        known = not record.needs_tables or codec in settings.fitted
        found.add(codec if known else record.stand_in or codec)
    return found


def has_biases(settings: Settings) -> bool:
    """Whether an allowed policy may leave log biases."""
    return any(demands.merges for demands in _demands(settings))


def reads_floats(settings: Settings) -> bool:
    """Whether an allowed policy may read keys and values in float32."""
    return any(not demands.tiled for demands in _demands(settings))


def has_state(settings: Settings) -> bool:
    """Whether an allowed policy may keep running state."""
    return any("state" in demands.needs for demands in _demands(settings))


def needs_queries(settings: Settings) -> bool:
    """Whether an allowed policy may ask for the observation window."""
    return any("queries" in demands.needs for demands in _demands(settings))


def _demands(settings: Settings) -> Iterator[Demands]:
    for name in settings.allow:
        # One of a third party that cannot be built asks for nothing, and the log says so.
        with contextlib.suppress(Exception):
            if name != NONE:
                yield settings.demands(name)
