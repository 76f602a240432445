"""Which pages a compressed region takes: all fit, and none is written before it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.engine.worker.region import Region
from vllm_kvcrush.plan import Part, cdiv

BLOCKS = 24


@dataclass
class Pages:
    """One of several layers: tokens that the pages of each head hold, by codec."""

    rooms: dict[str, list[int]]
    kv_heads: int
    block_pages: int
    num_blocks: int = BLOCKS
    page_bytes: int = 64

    def capacity(self, codec: str, head: int = 0) -> int:
        return self.rooms[codec][head]


@st.composite
def layers(draw: st.DrawFn) -> list[Pages]:
    count, heads = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    rooms = st.lists(st.integers(3, 12), min_size=heads, max_size=heads)
    return [
        Pages(
            {"raw": [4] * heads, "int8": [6] * heads, "tc8": draw(rooms), "tc4": draw(rooms)},
            heads,
            count * heads,
        )
        for _ in range(count)
    ]


def needed(layers: Sequence[Pages], parts: Sequence[Part]) -> int:
    pages = sum(
        cdiv(part.tokens, layer.capacity(part.codec, head))
        for layer in layers
        for head in range(layer.kv_heads)
        for part in parts
    )
    return cdiv(pages, layers[0].block_pages)


parts = st.lists(st.tuples(st.sampled_from(["int8", "tc4", "tc8"]), st.integers(1, 40)), max_size=2)


def spread(layers: list[Pages], parts: list[tuple[str, int]]) -> list[Part]:
    return [Part(codec, tokens) for codec, tokens in parts] or [Part("int8", 17)]


@given(layers=layers(), before=parts, after=parts, data=st.data())
@settings(deadline=None, max_examples=300)
def test_no_page_is_written_before_it_is_read(
    layers: list[Pages],
    before: list[tuple[str, int]],
    after: list[tuple[str, int]],
    data: st.DataObject,
) -> None:
    """A region from another one and some raw blocks, into any blocks, those included."""
    pairs, heads = layers[0].block_pages, layers[0].kv_heads
    old_parts, new_parts = spread(layers, before), spread(layers, after)
    shuffled = data.draw(st.permutations(range(BLOCKS)))
    old_blocks = shuffled[: needed(layers, old_parts)]
    old, _ = Region.of(old_blocks, old_parts, layers)
    rest = shuffled[len(old_blocks) :]
    raw = rest[: data.draw(st.integers(0, 4))]
    targets = data.draw(st.permutations([*old_blocks, *raw, *rest[len(raw) :]]))
    new, order = Region.of(targets[: needed(layers, new_parts)], new_parts, layers, raw, old)
    # Who reads what, as its layers do.
    reads: dict[int, set[int]] = {i: set() for i in range(len(layers))}
    for i in reads:
        for head in range(heads):
            reads[i] |= set(old.page[old.begin[i, head] : old.end[i, head]].tolist())
        reads[i] |= {block * pairs + i * heads + head for block in raw for head in range(heads)}
    assert sorted(order) == list(range(len(layers)))
    assert len(set(new.page.tolist())) == len(new.page), "two heads share a page"
    assert {int(page) // pairs for page in new.page} <= set(targets[: new.blocks])
    unread = set().union(*reads.values())
    for i in order:
        unread -= reads[i]
        for head in range(heads):
            own = slice(int(new.begin[i, head]), int(new.end[i, head]))
            assert not unread & set(new.page[own].tolist())
            # Tokens and codecs are those of the parts, in their order.
            room = [layers[i].capacity(p.codec, head) for p in new_parts]
            want = [
                (CODECS[p.codec].number, min(r, p.tokens - at))
                for p, r in zip(new_parts, room, strict=True)
                for at in range(0, p.tokens, r)
            ]
            assert list(zip(new.codec[own].tolist(), new.count[own].tolist(), strict=True)) == want


@given(count=st.integers(1, 4), heads=st.integers(1, 3), blocks=st.permutations(range(8)))
@settings(deadline=None)
def test_raw_pages_stay_within_their_layer_and_head(
    count: int, heads: int, blocks: list[int]
) -> None:
    layers = [Pages({"raw": [4] * heads}, heads, count * heads) for _ in range(count)]
    target, source = blocks[:3], blocks[2:]
    region, order = Region.of(target, [Part("raw", 12)], layers, source)
    assert order == list(range(count))
    for i in range(count):
        for head in range(heads):
            own = region.page[region.begin[i, head] : region.end[i, head]]
            want = torch.tensor(target) * count * heads + i * heads + head
            assert torch.equal(own.long(), want)
