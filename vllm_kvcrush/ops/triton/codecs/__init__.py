"""Codecs on the device, a module each. A new one is a module with its traits, its line here, and
where its pages keep things in `layout`."""

from vllm_kvcrush.ops.triton.codecs import fitted, gear, int4, int8, raw, tada
from vllm_kvcrush.ops.triton.codecs.traits import Traits

# In the order in which attention reads their pages, which a `cache.Directory` has.
TRAITS: tuple[Traits, ...] = (
    *fitted.TRAITS,
    gear.TRAITS,
    tada.TRAITS,
    int4.TRAITS,
    int8.TRAITS,
    raw.TRAITS,
)
RUNS = tuple(traits.name for traits in TRAITS)
BY_NAME = dict(zip(RUNS, TRAITS, strict=True))
