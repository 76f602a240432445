"""Codecs that are fitted to a model, tc4, tc6 and tc8: pages of each head look their own way.

`layout` has the picture of a page, `tables` what kernels know of a model, `tiles` what they do with
tiles of pages; `attention` and `tokens` have the codecs' functions, `encoding` the kernels that
fill pages, and `launch` launches these.
"""

from vllm_kvcrush.codecs import FITTED
from vllm_kvcrush.ops.triton.codecs.fitted import attention, launch, tokens
from vllm_kvcrush.ops.triton.codecs.traits import Traits
from vllm_kvcrush.ops.triton.kernels.pages import page_loop
from vllm_kvcrush.ops.triton.layout import Geometry


def _scores_tiles(geometry: Geometry) -> tuple[int, int, int]:
    # With these no target of benchmarks.gpu spills or loses its wide loads. With 8 warps ptxas
    # spills some bytes under Triton 3.8 in order to fit one block more.
    return 32, 4, 3 if max(geometry.k_pad, geometry.v_pad) <= 64 else 1


def _tile(capacity: int, most: int) -> int:
    # Keys are made anew in registers. Tiles are whole strips.
    return most // 2


TRAITS = tuple(
    Traits(
        name=name,
        pages=(name,),
        tile=_tile,
        scores_tiles=_scores_tiles,
        encode_pages=launch.encode,
        head=attention.head,
        serves=attention.serves,
        capacity=attention.capacity,
        expand_keys=tokens.expand_keys,
        expand_values=tokens.expand_values,
        positions=tokens.positions,
        query=attention.query,
        prepare=attention.prepare,
        scores=attention.scores,
        values=attention.values,
        loops=((page_loop, 4, True), (attention.exceptions_loop, 2, False)),
    )
    for name in FITTED
)
