"""The codecs: how a page can be filled. Each is one record. Imports no torch.

A new codec needs a record here, a reference in `codecs.reference`, a header in csrc/, and a file in
ops/triton/. The tests that go over `CODECS` then cover it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from vllm_kvcrush.codecs import layout
from vllm_kvcrush.codecs.layout import PageLayout, Widths

if TYPE_CHECKING:
    import torch

    from vllm_kvcrush.codecs.transform.tables import HeadTables


@dataclass(frozen=True)
class Codec:
    """One way to fill a page.

    Attributes:
        name: the name in policies, plans, files and metrics.
        number: the number in directories and csrc/kvcrush.h; no number is ever used again.
        lay_out: makes the layout of a page; `layout` describes its arguments.
        reference: "module:function" of the oracle that `kept` calls.
        needs_tables: whether pages are fitted to a model by its transform tables. Pages of
            different heads may hold different numbers of tokens then.
        has_positions: whether a page keeps the positions of its tokens.
        stand_in: name of the codec that takes the place of one that needs tables where there are
            none.
    """

    name: str
    number: int
    lay_out: Callable[[int, int, int, int, Widths | None], PageLayout]
    reference: str
    needs_tables: bool = False
    has_positions: bool = True
    stand_in: str | None = None

    def layout(
        self, tokens: int, k_size: int, v_size: int, itemsize: int, widths: Widths | None = None
    ) -> PageLayout:
        """Returns where a page of `tokens` tokens keeps them.

        Args:
            tokens: a multiple of 16.
            k_size, v_size: head sizes.
            itemsize: bytes of an element of the model's dtype.
            widths: widths by the head's tables, where the codec needs tables.
        """
        assert (widths is not None) == self.needs_tables, self.name
        return self.lay_out(tokens, k_size, v_size, itemsize, widths)

    def capacity(
        self,
        page_bytes: int,
        k_size: int,
        v_size: int,
        itemsize: int,
        widths: Widths | None = None,
    ) -> int:
        """Returns how many tokens fit into a page beside all metadata: a multiple of 16, 0 if none
        fit. Raises ValueError for head sizes that are not multiples of 8 up to 256.

        Args:
            page_bytes: block_size * (k_size + v_size) * itemsize.
            k_size, v_size, itemsize, widths: as in `layout`.
        """
        layout.check_head_sizes(k_size, v_size)
        room = page_bytes - (layout.HEADER if self.has_positions else 0)
        return layout.most_tokens(
            lambda tokens: self.layout(tokens, k_size, v_size, itemsize, widths).end, room
        )

    def kept(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        dtype: torch.dtype,
        positions: torch.Tensor | None = None,
        tables: HeadTables | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values as they are read back from a page, in float64 and the same
        shapes. It is the plain-torch oracle of the kernels.

        Args:
            keys, values: float32 [n, D] with RoPE and [n, Dv], the tokens of one page.
            dtype: the model's, which raw pages hold.
            positions: int [n], ascending; only codecs that need tables look at them.
            tables: the head's transform tables, where the codec needs tables.
        """
        assert (tables is not None) == self.needs_tables, self.name
        module, name = self.reference.split(":")
        oracle = getattr(import_module(module), name)
        kept: tuple[torch.Tensor, torch.Tensor] = oracle(keys, values, dtype, positions, tables)
        return kept


_FLAT = "vllm_kvcrush.codecs.reference"
_CHUNK = "vllm_kvcrush.codecs.chunk"
_FITTED = "vllm_kvcrush.codecs.transform.reference"

# The codecs by name, in the order of their numbers. "raw" is the model's dtype without positions,
# as in the tail; "exact" is the same with positions.
CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("raw", 0, layout.plain, f"{_FLAT}:keep_plain", has_positions=False),
        Codec("exact", 1, layout.exact, f"{_FLAT}:keep_plain"),
        Codec("int8", 2, layout.int8, f"{_FLAT}:keep_int8"),
        Codec("int4", 3, layout.int4, f"{_FLAT}:keep_int4"),
        *(
            Codec(
                *(name, number, layout.fitted, f"{_FITTED}:keep"),
                needs_tables=True,
                stand_in="int4",
            )
            for number, name in enumerate(("tc4", "tc6", "tc8"), start=4)
        ),
        Codec("tada", 7, layout.tada, f"{_CHUNK}:keep_tada"),
        Codec("gear", 8, layout.gear, f"{_CHUNK}:keep_gear"),
    )
}
_BY_NUMBER = tuple(CODECS.values())
# Directories index tables by number.
assert [codec.number for codec in _BY_NUMBER] == list(range(len(_BY_NUMBER)))

# Names of the codecs whose pages hold more tokens than raw ones.
PACKED = tuple(codec.name for codec in _BY_NUMBER if codec.name not in ("raw", "exact"))
# Names of the codecs that are fitted to a model.
FITTED = tuple(codec.name for codec in _BY_NUMBER if codec.needs_tables)


def by_number(number: int) -> Codec:
    """Returns the codec that a directory calls `number`."""
    return _BY_NUMBER[number]
