"""The records of all codecs, compared with csrc/kvcrush.h and the compiled library."""

from __future__ import annotations

import math
import pathlib
import re
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcrush.codecs import CODECS, by_number, layout
from vllm_kvcrush.codecs.layout import Widths
from vllm_kvcrush.codecs.transform.points import POINTS, OperatingPoint
from vllm_kvcrush.codecs.transform.reference import origins
from vllm_kvcrush.codecs.transform.rope import Rope
from vllm_kvcrush.codecs.transform.tables import HeadTables, Tables
from vllm_kvcrush.ops import cpu
from vllm_kvcrush.ops.angles import Angles
from vllm_kvcrush.ops.cpu.library import LIBRARY
from vllm_kvcrush.ops.cpu.tables import LayerTable

SIZES = st.integers(1, 32).map(lambda eighths: 8 * eighths)
FLAT = [name for name, codec in CODECS.items() if not codec.needs_tables]
every_codec = pytest.mark.parametrize("codec", CODECS)


def test_names_and_numbers_are_those_of_the_header() -> None:
    header = pathlib.Path(__file__, "../../../csrc/kvcrush.h").resolve().read_text()
    numbers = re.search(r"enum[^{]*\{([^}]*KVC_RAW = 0[^}]*)\}", header)
    assert numbers is not None
    found = re.findall(r"KVC_(\w+) = (\d+)", numbers[1])
    assert [(name.lower(), int(number)) for name, number in found] == [
        (codec.name, codec.number) for codec in CODECS.values()
    ]
    for name, codec in CODECS.items():
        assert codec.name == name and by_number(codec.number) is codec
    assert LIBRARY.kvc_capacity(len(CODECS), 1 << 15, 64, 64, 0) == -1


@every_codec
def test_codecs_that_need_tables_have_a_point_and_a_stand_in(codec: str) -> None:
    record = CODECS[codec]
    assert record.needs_tables == (codec in {point.name for point in POINTS})
    assert (record.stand_in is not None) == record.needs_tables
    if record.stand_in is not None:
        assert not CODECS[record.stand_in].needs_tables


def test_records_load_neither_torch_nor_the_tables() -> None:
    code = (
        "import sys; from vllm_kvcrush.codecs import CODECS; "
        "from vllm_kvcrush.codecs.transform.points import POINTS; "
        "CODECS['int8'].capacity(1 << 15, 64, 64, 2); "
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@every_codec
@settings(max_examples=60, deadline=None)
@given(
    block_size=st.integers(1, 40).map(lambda strips: 16 * strips),
    k_size=SIZES,
    v_size=SIZES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_capacity_is_the_most_that_fits(
    codec: str,
    block_size: int,
    k_size: int,
    v_size: int,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    record, widths = CODECS[codec], None
    if record.needs_tables:
        words = data.draw(st.integers(0, k_size // 4))
        widths = Widths(words, data.draw(st.integers(2, 4)), data.draw(st.sampled_from([0, 0.02])))
    sizes = (k_size, v_size, dtype.itemsize, widths)
    page_bytes = block_size * (k_size + v_size) * dtype.itemsize
    tokens = record.capacity(page_bytes, *sizes)
    assert tokens % layout.STRIP == 0
    room = page_bytes - (layout.HEADER if record.has_positions else 0)
    used, more = record.layout(tokens, *sizes), record.layout(tokens + layout.STRIP, *sizes)
    assert used.end <= room < more.end or tokens == layout.MAX_TOKENS
    assert used.v < used.strip and used.positions <= used.end
    if widths is None:
        assert tokens == cpu.capacity(codec, page_bytes, k_size, v_size, dtype)
    else:
        fits = (page_bytes, widths.words, widths.value_bits, k_size, v_size, widths.exceptions)
        assert tokens == layout.fitted_capacity(*fits)[0]
    if not record.has_positions:
        assert tokens == block_size


@every_codec
def test_head_sizes_that_no_kernel_reads_are_refused(codec: str) -> None:
    widths = Widths(3, 2, 0.0) if CODECS[codec].needs_tables else None
    for size in (0, 60, 264):
        for sizes in ((size, 64), (64, size)):
            with pytest.raises(ValueError, match=f"head size {size} is not a multiple of 8"):
                CODECS[codec].capacity(1 << 15, *sizes, 2, widths)


@pytest.mark.parametrize(
    ("codec", "dtype", "tokens"),
    [
        ("raw", torch.bfloat16, 128),
        ("exact", torch.bfloat16, 112),
        ("int8", torch.bfloat16, 240),
        ("int4", torch.bfloat16, 448),
        ("int8", torch.float32, 480),
        ("int4", torch.float32, 896),
    ],
)
def test_pages_of_128_tokens(codec: str, dtype: torch.dtype, tokens: int) -> None:
    assert CODECS[codec].capacity(128 * 128 * dtype.itemsize, 64, 64, dtype.itemsize) == tokens


@every_codec
def test_tables_go_with_the_codecs_that_need_them(codec: str) -> None:
    record = CODECS[codec]
    with pytest.raises(AssertionError, match=codec):
        record.layout(16, 64, 64, 2, None if record.needs_tables else Widths(3, 2, 0.0))
    k, v = torch.zeros(2, 16, 64)
    tables = blank_tables([3], 2, 64, 0.0)
    with pytest.raises(AssertionError, match=codec):
        own = None if record.needs_tables else HeadTables(tables, 0, 0, 0)
        record.kept(k, v, torch.float32, torch.arange(16), own)


# -- fitted codecs --------------------------------------------------------------------------------


def least(tokens: int, share: float) -> int:
    """Returns the fewest exceptions that a page with this number of tokens has."""
    wanted = max(layout.SINKS, math.ceil(share * tokens))
    return min(tokens, layout.MOST_EXCEPTIONS, wanted)


@settings(max_examples=300, deadline=None)
@given(
    page_bytes=st.integers(0, 1 << 19),
    data=st.data(),
    v_bits=st.integers(1, 4),
    k_size=SIZES,
    v_size=SIZES,
    share=st.sampled_from([0.0, 0.005, 0.02, 0.3]),
)
def test_fitted_capacity_is_the_most_that_fits(
    page_bytes: int, data: st.DataObject, v_bits: int, k_size: int, v_size: int, share: float
) -> None:
    words = data.draw(st.integers(0, k_size // 4))

    def end(tokens: int, exceptions: int) -> int:
        return layout.fitted_layout(tokens, exceptions, words, v_bits, k_size, v_size).end

    tokens, exceptions = layout.fitted_capacity(page_bytes, words, v_bits, k_size, v_size, share)
    room = page_bytes - layout.HEADER
    assert tokens % layout.STRIP == 0
    assert least(tokens, share) <= exceptions <= min(tokens, layout.MOST_EXCEPTIONS)
    if tokens:
        assert end(tokens, exceptions) <= room
    # Not a strip more, and exceptions fill what is left.
    more = tokens + layout.STRIP
    assert end(more, least(more, share)) > room or tokens == 65520
    assert exceptions == min(tokens, layout.MOST_EXCEPTIONS) or end(tokens, exceptions + 1) > room


def test_a_fitted_page_by_hand() -> None:
    # Strips of 16 keys of 3 words and 16 values of 16 bytes, with their scales and flags; 8 int8
    # tokens; a position for each strip.
    at = layout.fitted_layout(32, 8, words=3, v_bits=2, k_size=64, v_size=64)
    assert (at.v, at.strip) == (16 * 12, 16 * 12 + 16 * 16)
    assert at.scales == 2 * 448
    assert at.exceptions == at.scales + 2 * (16 + 2)
    assert at.positions == at.exceptions + 8 * (64 + 64 + 2 * 2)
    assert at.end == at.positions + 2 * 2
    # A page of 64 bfloat16 tokens: 33 strips take 33 * (448 + 18 + 2) = 15444 of 16384 - 32 bytes,
    # which leaves room for 6 int8 tokens. 6 must be there; or 11, and two strips less leave room
    # for 13.
    assert layout.fitted_capacity(16384, 3, 2, 64, 64, 0.01) == (528, 6)
    assert layout.fitted_capacity(16384, 3, 2, 64, 64, 0.02) == (496, 13)
    assert layout.fitted_capacity(500, 3, 2, 64, 64, 0.02) == (0, 0)


def blank_tables(words: list[int], v_bits: int, k_size: int, share: float) -> Tables:
    """Returns tables of heads whose keys take `words` words; all their other values are 0."""
    bits = []
    for count in words:
        even, more = divmod(8 * count, k_size // 4)
        head = [even + 1] * more + [even] * (k_size // 4 - more)
        bits.append(torch.tensor(head).repeat_interleave(4))
    zeros = torch.zeros(1, len(words), k_size)
    square = zeros[..., None].expand(-1, -1, -1, k_size)
    rope = Rope(torch.ones(k_size // 2, dtype=torch.float64))
    point = OperatingPoint("tc4", False, 0.0, v_bits, share)
    value_bits = torch.full((1, len(words)), v_bits, dtype=torch.uint8)
    return Tables(
        point, rope, zeros, square, square, zeros, torch.stack(bits).byte()[None], value_bits
    )


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    block_size=st.integers(1, 16).map(lambda strips: 16 * strips),
    v_bits=st.sampled_from([2, 3, 4]),
    k_size=SIZES,
    v_size=SIZES,
    share=st.sampled_from([0.0, 0.005, 0.02]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_library_takes_what_fits_and_no_more(
    data: st.DataObject,
    block_size: int,
    v_bits: int,
    k_size: int,
    v_size: int,
    share: float,
    dtype: torch.dtype,
) -> None:
    words = data.draw(st.lists(st.integers(0, k_size // 4), min_size=1, max_size=3))
    tables = blank_tables(words, v_bits, k_size, share)
    assert tables.words[0].tolist() == words
    page_bytes = block_size * (k_size + v_size) * dtype.itemsize
    angles = Angles(tables.rope, 16)
    fits = layout.fitted_capacity
    # The library's own refusals of more than 16 bits count, and of too many exceptions, aside.
    small = all(fits(page_bytes, w, v_bits, k_size, v_size, share)[0] < 65520 for w in words)

    def layer(table: LayerTable) -> cpu.Layer:
        return cpu.Layer(
            torch.empty(len(words) * page_bytes, dtype=torch.uint8),
            index=0,
            layers=1,
            heads=len(words),
            kv_heads=len(words),
            k_size=k_size,
            v_size=v_size,
            block_size=block_size,
            dtype=dtype,
            scale=1.0,
            tables={"tc4": table},
        )

    def table() -> LayerTable:
        return LayerTable(tables, 0, range(len(words)), page_bytes, v_size, angles)

    own = table()
    made = layer(own)
    found = [fits(page_bytes, w, v_bits, k_size, v_size, share) for w in words]
    assert [made.capacity("tc4", head) for head in range(len(words))] == [t for t, _ in found]
    assert own.exceptions == [x for _, x in found]

    def strip_more(*args: float) -> tuple[int, int]:
        tokens = fits(*args)[0] + layout.STRIP
        return tokens, least(tokens, share)

    def exception_more(*args: float) -> tuple[int, int]:
        tokens, exceptions = fits(*args)
        return tokens, exceptions + 1

    if small:
        with mock.patch.object(layout, "fitted_capacity", strip_more):
            longer = table()
        with pytest.raises(ValueError, match=r"of head \d do not fit a page"):
            layer(longer)
    with mock.patch.object(layout, "fitted_capacity", exception_more):
        fuller = table()
    with pytest.raises(ValueError, match=r"do not fit a page|exceptions in a page of head"):
        layer(fuller)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), v_bits=st.sampled_from([2, 3, 4]), k_size=SIZES, v_size=SIZES)
def test_full_pages_stay_within_themselves(
    seed: int, v_bits: int, k_size: int, v_size: int
) -> None:
    """Each page is filled to the brim between two that must not change."""
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(k_size // 4 + 1, (3,), generator=g).tolist()
    tables = blank_tables(words, v_bits, k_size, 0.01)
    page_bytes = 64 * (k_size + v_size) * 2
    table = LayerTable(tables, 0, range(3), page_bytes, v_size, Angles(tables.rope, 1 << 16))
    pool = torch.full((3 * page_bytes,), 0xA5, dtype=torch.uint8)
    layer = cpu.Layer(
        pool,
        **{"index": 0, "layers": 1, "heads": 3, "kv_heads": 3, "block_size": 64, "scale": 1.0},
        **{"k_size": k_size, "v_size": v_size, "dtype": torch.bfloat16},
        tables={"tc4": table},
    )
    for head in range(3):
        pool.fill_(0xA5)
        n = layer.capacity("tc4", head)
        keys = torch.randn(n, k_size, generator=g)
        values = torch.randn(n, v_size, generator=g)
        places = torch.arange(0, 3 * n, 3, dtype=torch.int32)
        cpu.encode(layer, "tc4", 1, keys, values, places, head)
        for other in (0, 2):
            page = pool[other * page_bytes : (other + 1) * page_bytes]
            assert (page == 0xA5).all()
        _, back, where = cpu.decode(layer, "tc4", 1, n, head)
        # Of each strip the first token's position is kept.
        assert where is not None
        assert torch.equal(where, (origins(places) + torch.arange(n) % layout.STRIP).int())
        error = (back - values).square().sum() / values.square().sum()
        assert error < {2: 0.25, 3: 0.1, 4: 0.05}[v_bits]
