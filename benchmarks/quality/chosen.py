"""Which policies a run measures, and at which budgets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_kvcrush import policies, spec
from vllm_kvcrush.config import parse_budget

POLICIES = (
    *("streaming", "snapkv", "h2o", "kvcrush"),
    *("int8", "int4", "tc4", "tc6", "tc8", "auto", "mikv"),
)
# A quick run: KVCrush beside its base, the simplest rival, and fewer bits.
QUICK_POLICIES = ("streaming", "snapkv", "kvcrush", "int4", "auto")

SCORERS = (
    *("streaming", "rerotate", "lacache", "knorm", "keydiff", "lagkv", "infinipot"),
    *("snapkv", "tova", "h2o", "expected_attention", "gkv", "rkv", "critic", "gui_kv"),
    "kvzip",
)
EVICTING = (
    *SCORERS,
    *(f"kvcrush({base})" for base in ("snapkv", "keydiff", "gkv", "lagkv")),
    *("adakv(snapkv)", "adakv(expected_attention(epsilon=0.01))", "adakv(keydiff)", "adakv(kvzip)"),
    *("pyramidkv(snapkv)", "pyramidkv(keydiff)"),
    *("cake", "duo(snapkv)", "duo(keydiff)", "surfacelogic(snapkv)", "surfacelogic(keydiff)"),
    *("d2o", "cam(snapkv)", "cam(keydiff)", "keepkv(snapkv)", "keepkv(keydiff)"),
    *("composed(keydiff,other=snapkv)", "fair(snapkv)", "fair(keydiff)"),
)
# Fewer bits hold every token at a quarter, and tc8's at an eighth: only below do they evict too.
_BITS = {
    "int4": "0.125",
    "tc4": "0.125/0.0833/0.0625",
    "tc6": "0.0833/0.0625",
    "tc8": "0.0833/0.0625",
}
_MIXED = ("keydiff", "gkv", "surfacelogic(keydiff)", "snapkv", "composed(keydiff,other=snapkv)")
GROUPS = {
    "evicting": EVICTING,
    "evicting@int4": tuple(f"{policy}@int4:0.125" for policy in EVICTING),
    "bits": ("int8", "int4", "tc4", "tc6", "tc8", "auto", "mikv"),
    "mixtures": (
        *(f"{codec}:{at}" for codec, at in _BITS.items()),
        *(f"{p}@{codec}:{at}" for codec, at in _BITS.items() for p in _MIXED),
    ),
}

Setting = tuple[str, float | int]


def words(text: str) -> list[str]:
    """Returns what stands between commas, but not between those inside brackets."""
    found, depth = [""], 0
    for mark in text:
        depth += (mark == "(") - (mark == ")")
        if mark == "," and not depth:
            found.append("")
        else:
            found[-1] += mark
    return [word for word in found if word]


def budgets(text: str, mark: str = ",") -> list[float | int]:
    """Returns fractions and numbers of tokens. Raises ValueError."""
    try:
        return [parse_budget(word, "") for word in text.split(mark) if word]
    except ValueError:
        raise ValueError(
            f"{text!r}: give fractions such as 0.25 and whole numbers of tokens such as 256"
        ) from None


def settings(chosen: Iterable[str], every: Sequence[float | int]) -> list[Setting]:
    """Returns (policy, budget) for each of `chosen`, which are groups, policies, or policies with
    budgets of their own ("keydiff@int4:0.125/0.0625"); the others have those of `every`.

    Raises:
        ValueError: a policy or a budget cannot be read.
    """
    found: dict[Setting, None] = {}
    for name in chosen:
        for word in GROUPS.get(name, (name,)):
            policy, _, own = word.partition(":")
            try:
                policies.get(policy)
            except ValueError as error:
                raise ValueError(f"{policy}: {error}") from error
            policy = str(spec.parse(policy))
            found.update(dict.fromkeys((policy, b) for b in (budgets(own, "/") if own else every)))
    return list(found)
