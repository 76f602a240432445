"""The registry of eviction policies: one file per policy, one name each.

Other packages add policies of their own through the entry-point group `vllm_kvcrush.policies`,
whose values are subclasses of `Policy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from vllm_kvcrush.policies.base import OptionError, Policy, View
from vllm_kvcrush.policies.h2o import H2O
from vllm_kvcrush.policies.kvcrush import KVCrush
from vllm_kvcrush.policies.quantized import TC4, TC6, TC8, Auto, Int4, Int8, MiKV
from vllm_kvcrush.policies.snapkv import SnapKV
from vllm_kvcrush.policies.streaming import Streaming

__all__ = ["GROUP", "OptionError", "Policy", "View", "codecs", "get", "names", "tiers"]

GROUP = "vllm_kvcrush.policies"

_BUILT_IN: dict[str, type[Policy]] = {
    p.name: p for p in (Streaming, SnapKV, H2O, KVCrush, Int8, Int4, TC4, TC6, TC8, Auto, MiKV)
}
# "none" is plain vLLM everywhere, so it may not name a policy either.
_RESERVED = (*_BUILT_IN, "none")


def names() -> tuple[str, ...]:
    """Every policy that `get` knows, built-in ones first. Raises ValueError on a name clash."""
    return (*_BUILT_IN, *_third_party())


def get(name: str, options: Mapping[str, Any] | None = None) -> Policy:
    """Builds a policy.

    Args:
        name: one of `names()`.
        options: its hyperparameters; defaults for those not given.

    Raises:
        ValueError: unknown name or option, bad value, or a third-party policy that does not load.
    """
    cls = _BUILT_IN.get(name) or _load(name)
    known = [f.name for f in fields(cls) if f.init]
    for option in options or {}:
        if option not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise OptionError(f"{name}.{option}", f" is not an option: {name} {takes}")
    return cls(**(options or {}))


def codecs(name: str) -> tuple[str, ...]:
    """How policy `name` may fill the pages of the compressed region. Raises ValueError."""
    return (_BUILT_IN.get(name) or _load(name)).codecs


def tiers(name: str) -> bool:
    """Whether the policy's most important tokens get its finer codec. Raises ValueError."""
    return (_BUILT_IN.get(name) or _load(name)).tiers


@cache  # reading every installed package's metadata takes 20 ms, and `get` runs per request
def _third_party() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        if entry.name in _RESERVED:
            raise ValueError(
                f"the policy {entry.name!r} of entry point {_where(entry)} has the name of a "
                "built-in policy: it must be renamed, or its package uninstalled"
            )
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise ValueError(
                f"entry points {_where(other)} and {_where(entry)} both bring a policy "
                f"{entry.name!r}: one of the packages must be uninstalled"
            )
    return found


def _load(name: str) -> type[Policy]:
    entry = _third_party().get(name)
    if entry is None:
        raise ValueError(f"{name!r} is not a policy: there are {', '.join(names())}")
    try:
        cls = entry.load()
    except Exception as error:
        raise ValueError(
            f"the policy {name!r} of entry point {_where(entry)} does not load: {error!r}"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise ValueError(
            f"the policy {name!r} of entry point {_where(entry)} is not a subclass of "
            "vllm_kvcrush.policies.Policy"
        )
    if getattr(cls, "name", None) != name:  # messages to operators name options by it
        raise ValueError(
            f"the policy {name!r} of entry point {_where(entry)} must have name = {name!r}"
        )
    return cls


def _where(entry: EntryPoint) -> str:
    package = f" ({entry.dist.name})" if entry.dist else ""
    return f"{entry.value}{package}"
