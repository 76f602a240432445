"""Codecs on the device, a module each. A new one is a module with a record, and its line here."""

import functools

from vllm_kvcrush.ops.triton.codecs import fitted, int4, int8, raw
from vllm_kvcrush.ops.triton.codecs.record import Codec
from vllm_kvcrush.ops.triton.layout import Geometry

# In the order in which attention reads their pages: of those that add up values in the same number
# of planes, and more planes before fewer.
CODECS: tuple[Codec, ...] = (*fitted.CODECS, int4.CODEC, int8.CODEC, raw.CODEC)
RUNS = tuple(codec.name for codec in CODECS)
BY_NAME = {codec.name: codec for codec in CODECS}


@functools.cache
def geometry(block_size: int, k_size: int, v_size: int, itemsize: int) -> Geometry:
    """What pages look like; raises ValueError where no kernel can read such pages."""
    sections = {name: c.section for c in CODECS if c.section is not None for name in c.pages}
    return Geometry.of(block_size, k_size, v_size, itemsize, sections)


# Pages of 128 tokens of two heads of 64, as in csrc/layout.h.
_example = geometry(128, 64, 64, 2)
_raw, _exact, _int8, _int4 = (_example.section(c) for c in ("raw", "exact", "int8", "int4"))
assert (_example.page_bytes, _raw.capacity, _raw.end) == (32768, 128, 32768)
assert (_exact.capacity, _exact.end) == (112, 112 * (256 + 2))
assert (_int8.capacity, _int8.end) == (240, 240 * (128 + 4 + 2))
assert (_int4.capacity, _int4.end) == (448, 448 * (64 + 2 + 2) + 7 * 64 * 4)
