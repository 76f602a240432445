"""Which pages a compressed region takes: all fit, and none is written before it is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.engine.worker.region import Region, joined
from vllm_kvcrush.plan import cdiv


@dataclass
class Pages:
    """The pages of one of several layers: tokens that each head's pages hold, by codec."""

    rooms: dict[str, list[int]]
    kv_heads: int
    block_pages: int
    num_blocks: int = 24
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


@dataclass
class Parts:
    """The parts that fill a region: codecs in slot order, and tokens of each, int64 [parts, L,
    H]."""

    codecs: list[str]
    tokens: np.ndarray


def needed(layers: Sequence[Pages], parts: Parts) -> int:
    """Returns the number of blocks that the parts fill, counted page by page."""
    pages = sum(
        cdiv(int(parts.tokens[part, i, head]), layer.capacity(codec, head))
        for i, layer in enumerate(layers)
        for head in range(layer.kv_heads)
        for part, codec in enumerate(parts.codecs)
    )
    return cdiv(pages, layers[0].block_pages)


@st.composite
def parts(draw: st.DrawFn, layers: list[Pages]) -> Parts:
    """Draws up to three parts, with equal numbers of tokens in each layer and head or not."""
    codecs = draw(st.lists(st.sampled_from(["int8", "tc4", "tc8"]), min_size=1, max_size=3))
    shape = (len(codecs), len(layers), layers[0].kv_heads)
    if draw(st.booleans()):
        found = np.array([[[draw(st.integers(1, 40))]] for _ in codecs])
        return Parts(codecs, np.broadcast_to(found, shape).copy())
    numbers = draw(
        st.lists(st.integers(0, 40), min_size=math.prod(shape), max_size=math.prod(shape))
    )
    return Parts(codecs, np.array(numbers).reshape(shape))


@given(layers=layers(), data=st.data())
@settings(deadline=None, max_examples=300)
def test_no_page_is_written_before_it_is_read(layers: list[Pages], data: st.DataObject) -> None:
    """A region is made of another one and some raw blocks, in any blocks, which may be among
    those."""
    pairs, heads = layers[0].block_pages, layers[0].kv_heads
    before, after = data.draw(parts(layers)), data.draw(parts(layers))
    blocks = 4 + needed(layers, before) + needed(layers, after)
    shuffled = data.draw(st.permutations(range(blocks)))
    old_blocks = shuffled[: needed(layers, before)]
    old, _ = Region.of(old_blocks, before.codecs, before.tokens, layers)
    rest = shuffled[len(old_blocks) :]
    raw = rest[: data.draw(st.integers(0, 4))]
    targets = data.draw(st.permutations([*old_blocks, *raw, *rest[len(raw) :]]))
    target = targets[: needed(layers, after)]
    given_tokens = after.tokens.copy()
    new, order = Region.of(target, after.codecs, after.tokens, layers, raw, old)
    assert np.array_equal(after.tokens, given_tokens)
    assert new.blocks == len(target)
    assert np.array_equal(new.tokens.numpy(), after.tokens.sum(0))
    assert np.array_equal(new.part_tokens, after.tokens)
    assert sum(new.codec_pages.values()) == len(new.page)
    # Which layer reads which page.
    reads: dict[int, set[int]] = {i: set() for i in range(len(layers))}
    for i in reads:
        for head in range(heads):
            reads[i] |= set(old.page[old.begin[i, head] : old.end[i, head]].tolist())
        reads[i] |= {block * pairs + i * heads + head for block in raw for head in range(heads)}
    assert sorted(order) == list(range(len(layers)))
    assert len(set(new.page.tolist())) == len(new.page), "two heads share a page"
    assert {int(page) // pairs for page in new.page} <= set(target)
    unread = set().union(*reads.values())
    for i in order:
        unread -= reads[i]
        for head in range(heads):
            own = slice(int(new.begin[i, head]), int(new.end[i, head]))
            assert not unread & set(new.page[own].tolist())
            # Tokens and codecs are those of the parts, in their order.
            want = [
                (CODECS[codec].number, min(room, int(tokens) - at))
                for codec, tokens in zip(after.codecs, after.tokens[:, i, head], strict=True)
                for room in [layers[i].capacity(codec, head)]
                for at in range(0, int(tokens), room)
            ]
            assert list(zip(new.codec[own].tolist(), new.count[own].tolist(), strict=True)) == want


@given(count=st.integers(1, 4), heads=st.integers(1, 3), blocks=st.permutations(range(8)))
@settings(deadline=None)
def test_raw_pages_stay_within_their_layer_and_head(
    count: int, heads: int, blocks: list[int]
) -> None:
    layers = [Pages({"raw": [4] * heads}, heads, count * heads) for _ in range(count)]
    target, source = blocks[:3], blocks[2:]
    tokens = np.full((1, count, heads), 12)
    region, order = Region.of(target, ["raw"], tokens, layers, source)
    assert order == list(range(count))
    for i in range(count):
        for head in range(heads):
            own = region.page[region.begin[i, head] : region.end[i, head]]
            want = torch.tensor(target) * count * heads + i * heads + head
            assert torch.equal(own.long(), want)


@given(layers=layers(), data=st.data())
@settings(deadline=None, max_examples=100)
def test_each_token_has_a_bias_of_its_own(layers: list[Pages], data: st.DataObject) -> None:
    found = data.draw(parts(layers))
    region, _ = Region.of(range(needed(layers, found)), found.codecs, found.tokens, layers)
    assert region.bias is None and region.log_bias is None
    region.open_biases()
    assert region.bias is not None and region.log_bias is not None
    in_all = int(found.tokens.sum())
    assert region.log_bias.tolist() == [0.0] * in_all
    # Biases are written by layer and head, and found where the kernels look for them, by page.
    region.log_bias += torch.arange(in_all)
    seen: list[float] = []
    for i in range(len(layers)):
        for head, own in enumerate(region.biases(i)):
            assert len(own) == int(found.tokens[:, i, head].sum())
            entries = range(int(region.begin[i, head]), int(region.end[i, head]))
            pages = [
                region.log_bias[int(region.bias[e]) : int(region.bias[e]) + int(region.count[e])]
                for e in entries
            ]
            assert own.tolist() == (torch.cat(pages).tolist() if pages else [])
            seen += own.tolist()
    assert sorted(seen) == list(range(in_all))


def test_biases_of_several_requests_are_one_list() -> None:
    layers = [Pages({"int8": [6] * 2}, 2, 4), Pages({"int8": [6] * 2}, 2, 4)]

    def region(first: int, tokens: int, biased: bool) -> Region:
        made, _ = Region.of(range(first, first + 3), ["int8"], np.full((1, 2, 2), tokens), layers)
        if biased:
            made.open_biases()
            assert made.log_bias is not None
            made.log_bias += torch.arange(len(made.log_bias)) + 100 * first
        return made

    plain = [region(0, 7, False), None, region(3, 8, False)]
    assert joined(plain).bias is None and joined(plain).log_bias is None
    parts = [region(0, 7, False), None, region(3, 8, True), region(6, 13, True)]
    both = joined(parts)
    assert both.bias is not None and both.log_bias is not None
    assert both.blocks.tolist() == [3, 0, 3, 3] and len(both.bias) == len(both.page)
    for row, own in enumerate(parts):
        if own is None:
            assert torch.equal(both.begin[row], both.end[row])
            continue
        for entry, mine in zip(
            range(int(both.begin[row].min()), int(both.end[row].max())),
            range(len(own.page)),
            strict=True,
        ):
            assert both.page[entry] == own.page[mine] and both.count[entry] == own.count[mine]
            if own.bias is None or own.log_bias is None:
                assert both.bias[entry] == -1
                continue
            at, there, size = int(both.bias[entry]), int(own.bias[mine]), int(own.count[mine])
            assert torch.equal(both.log_bias[at : at + size], own.log_bias[there : there + size])
