"""The registry of policies: one file per policy, one name each.

A policy is named with its parameters in the grammar of `vllm_kvcrush.spec`. Other packages add
policies of their own through the entry-point group `vllm_kvcrush.policies`, whose values are
subclasses of `Policy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from vllm_kvcrush.policies.adakv import AdaKV
from vllm_kvcrush.policies.base import (
    Merged,
    OptionError,
    Policy,
    Room,
    View,
    Wrapper,
)
from vllm_kvcrush.policies.cake import CAKE
from vllm_kvcrush.policies.cam import CaM
from vllm_kvcrush.policies.composed import Composed
from vllm_kvcrush.policies.critic import Critic
from vllm_kvcrush.policies.d2o import D2O
from vllm_kvcrush.policies.duo import Duo
from vllm_kvcrush.policies.expected_attention import ExpectedAttention
from vllm_kvcrush.policies.fair import Fair
from vllm_kvcrush.policies.gkv import GKV
from vllm_kvcrush.policies.gui_kv import GUIKV
from vllm_kvcrush.policies.h2o import H2O
from vllm_kvcrush.policies.infinipot import InfiniPot
from vllm_kvcrush.policies.keepkv import KeepKV
from vllm_kvcrush.policies.keydiff import KeyDiff
from vllm_kvcrush.policies.knorm import KNorm
from vllm_kvcrush.policies.kvcrush import KVCrush
from vllm_kvcrush.policies.kvzip import KVzip
from vllm_kvcrush.policies.lacache import LaCache
from vllm_kvcrush.policies.lagkv import LagKV
from vllm_kvcrush.policies.mikv import MiKV
from vllm_kvcrush.policies.pyramidkv import PyramidKV
from vllm_kvcrush.policies.rerotate import ReRotate
from vllm_kvcrush.policies.rkv import RKV
from vllm_kvcrush.policies.snapkv import SnapKV
from vllm_kvcrush.policies.streaming import Streaming
from vllm_kvcrush.policies.surfacelogic import SurfaceLogic
from vllm_kvcrush.policies.tova import TOVA
from vllm_kvcrush.spec import ALIASED, ALIASES, Spec, SpecError, Storage, parse, resolved

__all__ = [
    "BUILT_IN",
    "GROUP",
    "OPT_IN",
    "Merged",
    "OptionError",
    "Policy",
    "Room",
    "View",
    "Wrapper",
    "class_of",
    "get",
    "names",
    "options_of",
    "storage_of",
]

GROUP = "vllm_kvcrush.policies"

_BUILT_IN: dict[str, type[Policy]] = {
    p.name: p
    for p in (
        *(Streaming, LaCache, KNorm, KeyDiff, LagKV, InfiniPot),
        *(SnapKV, TOVA, H2O, ExpectedAttention, GKV, RKV, Critic, GUIKV, KVzip),
        *(KVCrush, MiKV, AdaKV, KeepKV, Fair, ReRotate),
        *(PyramidKV, CAKE, Duo, SurfaceLogic, D2O, CaM, Composed),
    )
}
BUILT_IN = tuple(_BUILT_IN)
# Whoever asks for one makes others wait, so that only the operator may allow it, by name.
OPT_IN = frozenset({KVzip.name})
_CLASSES = {**_BUILT_IN, **dict.fromkeys(ALIASES, _BUILT_IN[ALIASED])}
# "none" is plain vLLM everywhere, so it may not name a policy either.
_RESERVED = (*_CLASSES, "none")


def names() -> tuple[str, ...]:
    """Returns the name of every policy that `get` knows, built-in ones first. Raises ValueError if
    two packages bring policies of the same name."""
    return (*_CLASSES, *_third_party())


def get(spec: Spec | str, defaults: Mapping[str, Mapping[str, Any]] | None = None) -> Policy:
    """Builds a policy, and those that it wraps.

    Args:
        spec: the policy, or its text.
        defaults: by policy, the server's options, for what the spec does not say.

    Raises:
        ValueError: unknown name or option, bad value, or a third-party policy that does not load.
    """
    spec = parse(spec)
    cls = class_of(spec.name)
    options: dict[str, Any] = {**((defaults or {}).get(spec.name) or {}), **dict(spec.options)}
    known = options_of(spec.name)
    for option in options:
        if option not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise OptionError(f"{spec.name}.{option}", f" is not an option: {spec.name} {takes}")
    if spec.base is not None and not issubclass(cls, Wrapper):
        raise OptionError(spec.name, f" wraps no other policy, so not {spec.base.name} either")
    if issubclass(cls, Wrapper):
        try:
            base = resolved(spec, defaults).base
        except SpecError as error:
            raise OptionError(f"{spec.name}.base", f"={options.get('base')!r} {error}") from None
        options.pop("base", None)
        if base is not None:
            options["base"] = get(base, defaults)
    try:
        policy = cls(**options)
    except OptionError as error:  # of an alias: name it as the operator did
        path = error.path.replace(cls.name, spec.name, 1)
        raise OptionError(path, error.problem) from None
    stored = policy.codecs if spec.codecs is None else spec.codecs
    if (stored or spec.name in ALIASES) and policy.whole_pages:
        raise OptionError(
            f"{spec.name}.level", "='page' is not token, the only level of packed pages"
        )
    if policy.tiers and (policy.allocates or policy.merges):
        what = "shares pages out over heads" if policy.allocates else "merges tokens"
        raise OptionError(spec.name, f" {what}, which tiers of two codecs do not do yet")
    return policy


def class_of(name: str) -> type[Policy]:
    """Returns the class of policy `name`. Raises ValueError."""
    return _CLASSES.get(name) or _load(name)


def options_of(name: str) -> tuple[str, ...]:
    """Returns the names of the hyperparameters of policy `name`. Raises ValueError."""
    return tuple(f.name for f in fields(class_of(name)) if f.init)


def storage_of(name: str) -> Storage:
    """Returns how policy `name` stores compressed regions. Raises ValueError."""
    return class_of(name).storage()


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
