"""What the GPU kernels are called with: a layer's cache, a directory, a step's batch, and a
request's tokens.

Shapes and meanings are those of `vllm_kvcrush.ops.cpu`, so an engine can use either.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from triton import knobs

from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.ops.triton.codecs import RUNS, TRAITS
from vllm_kvcrush.ops.triton.codecs.fitted.tables import Fitted, LayerTable, Variant
from vllm_kvcrush.ops.triton.codecs.traits import Traits
from vllm_kvcrush.ops.triton.layout import Geometry

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# By codec number, the place among RUNS of the codec that reads such pages.
_RANK = torch.zeros(256, dtype=torch.int64)
for _i, _traits in enumerate(TRAITS):
    _RANK[[CODECS[name].number for name in _traits.pages]] = _i


def run_of(codec: str) -> str:
    """Which of RUNS has the pages of a codec."""
    return RUNS[int(_RANK[CODECS[codec].number])]


def runs_of(codecs: Tensor) -> tuple[str, ...]:
    """Which of RUNS occur among codec numbers, which are on the host."""
    return tuple(RUNS[i] for i in sorted(set(_RANK[codecs.long()].tolist())))


@functools.lru_cache(maxsize=64)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns numbers as int32 on a device, to be read only. A compaction asks for the same in
    every layer: copied once."""
    return torch.tensor(numbers, dtype=torch.int32).to(device, non_blocking=True)


_FLAT = 30  # the shift of a directory with all entries in one list


@functools.cache
def _rank(device: torch.device) -> Tensor:
    # Copied once: a copy from the host waits for the device, and no graph can have it.
    return _RANK.to(device)


class Layer:
    """One layer of a cache whose storage is blocks x layers x KV heads equal pages (vLLM's layout
    BLHNC).

    Args:
        pool: the whole cache, any dtype, contiguous, 16-byte aligned.
        index: of this layer among `layers`.
        dtype: of raw pages: float32, bfloat16 or float16.
        scale: factor of q·k.
        tables: of fitted codecs for this layer, by name.
    """

    fitted: Fitted | None = None

    def __init__(
        self,
        pool: Tensor,
        *,
        index: int,
        layers: int,
        heads: int,
        kv_heads: int,
        k_size: int,
        v_size: int,
        block_size: int,
        dtype: torch.dtype,
        scale: float,
        tables: Mapping[str, LayerTable] | None = None,
    ):
        self.geometry = Geometry.of(block_size, k_size, v_size, dtype.itemsize)
        block_bytes = layers * kv_heads * self.geometry.page_bytes
        storage = pool.view(-1).view(torch.uint8)
        if not pool.is_contiguous() or len(storage) % block_bytes or storage.data_ptr() % 16:
            raise ValueError(
                f"a pool of {len(storage)} bytes is not aligned blocks of {block_bytes} bytes"
            )
        self.page_bytes, self.dtype, self.scale = self.geometry.page_bytes, dtype, scale
        self.heads, self.kv_heads, self.k_size, self.v_size = heads, kv_heads, k_size, v_size
        self.group, self.block_size = heads // kv_heads, block_size
        self.block_pages, self.first_page = layers * kv_heads, index * kv_heads
        self.num_blocks = len(storage) // block_bytes
        self.grid_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        self._view(storage)
        if tables:
            self.fitted = Fitted(tables, dtype, self.geometry.k_pad, storage.device)
        self._take_tables()
        self.wave = 64 if torch.version.hip else 32
        # Inline PTX is for NVIDIA's compiler; the interpreter and AMD's take the plain expressions.
        self.ptx = bool(
            storage.is_cuda and torch.version.hip is None and not knobs.runtime.interpret
        )

    def _take_tables(self) -> None:
        own: Mapping[str, tuple[Variant, ...]] = {} if self.fitted is None else self.fitted.variants
        self._variants = {
            codec.name: tuple(codec.with_own(variant) for variant in own.get(codec.name, ()))
            if codec.needs_tables
            else (codec,)
            for codec in TRAITS
        }
        names = [name for codec in TRAITS for name in codec.pages if self.variants(codec.name)]
        heads_of = range(self.kv_heads)
        self._most = {name: max(self.capacity(name, h) for h in heads_of) for name in names}

    @classmethod
    def joined(cls, layers: Sequence[Layer]) -> Layer:
        """All layers of a cache as one that has the KV heads of all, a layer's after the other's:
        what lies in it is the same. The layers' tables become parts of its own."""
        first = layers[0]
        heads = first.kv_heads
        assert [layer.first_page for layer in layers] == [i * heads for i in range(len(layers))]
        assert first.block_pages == len(layers) * heads, "there are other layers"
        whole = copy.copy(first)
        if first.fitted is not None:
            fitted = [layer.fitted for layer in layers if layer.fitted is not None]
            whole.fitted = Fitted.joined(fitted)
            for i, layer in enumerate(layers):
                layer.fitted = whole.fitted.part(i * heads, heads)
                layer._take_tables()
        whole._take_heads(0, first.block_pages)
        return whole

    def part(self, first: int, heads: int) -> Layer:
        """Some of its KV heads as another layer in the same cache."""
        part = copy.copy(self)
        if self.fitted is not None:
            part.fitted = self.fitted.part(first, heads)
        part._take_heads(self.first_page + first, heads)
        return part

    def _take_heads(self, first_page: int, kv_heads: int) -> None:
        self.first_page, self.kv_heads, self.heads = first_page, kv_heads, kv_heads * self.group
        self._take_tables()

    def page(self, block: int, head: int) -> int:
        """Index of the page of a block and KV head of this layer."""
        return block * self.block_pages + self.first_page + head

    def _view(self, storage: Tensor) -> None:
        self.pool = storage
        self.raw, self.grid = storage.view(self.dtype), storage.view(self.grid_dtype)
        self.half, self.words = storage.view(torch.float16), storage.view(torch.int16)
        self.wide = storage.view(torch.int32)

    def over(self, pages: Tensor) -> Layer:
        """The same layer with its pages, by index, in another pool: uint8 [n, page_bytes]."""
        other = copy.copy(self)
        other._view(pages.view(-1))
        return other

    def views(self) -> tuple[Tensor, ...]:
        """The pool as kernels take it: `kernels.views.Pool`."""
        return self.raw, self.grid, self.half, self.words, self.wide, self.pool

    def tables(self) -> tuple[object, ...]:
        """What kernels take as `kernels.views.Tables`."""
        # Arguments that a variant does not read still need an address.
        return (*(self.wide,) * 6, 0) if self.fitted is None else self.fitted.tables()

    def variants(self, run: str) -> tuple[Traits, ...]:
        """The records for pages of one of RUNS, each of which some heads may need; none if the
        layer lacks the tables for them."""
        return self._variants[run]

    def capacity(self, codec: str, head: int = 0) -> int:
        """Tokens that a page of a KV head holds, whichever it is."""
        if self.fitted is not None and codec in self.fitted.sections:
            return self.fitted.sections[codec][head].capacity
        return self.geometry.section(codec).capacity

    def most(self, codec: str) -> int:
        """Tokens that a page of any KV head holds."""
        return self._most[codec]


@dataclass
class Directory:
    """Which pages each KV head of a layer owns in the regions of all requests, by the state that a
    request has in the engine.

    A region has up to 2^shift entries for each of its blocks. They are kept with the block:
    entry e of a region lies in the columns at `block << shift`, plus e modulo 2^shift, where block
    is number e >> shift of the region's. So the directory has room for every region that the pool
    has blocks for, nothing is moved when requests come and go, and no address ever changes.

    Attributes:
        runs: int32 [states + 1, kv_heads, len(RUNS), 2]: row s + 1 has, for state s, in which
            entries [begin, end) each head has its pages of each of RUNS. The first row is 0.
        blocks: int32 [states], of each state's region; 0: it has none.
        page, count: int32, page index in the pool and tokens of each entry.
        bias: int64, address of the float32 log biases of an entry's tokens, 0 if they have none;
            None: none has. Whoever made the directory keeps what lies there.
        shift: see above.
        present: for each of RUNS whether any head may have such pages. What is absent here is
            compiled out, so a captured graph needs a directory that allows all that may come.
    """

    runs: Tensor
    blocks: Tensor
    page: Tensor
    count: Tensor
    bias: Tensor | None
    shift: int
    present: tuple[bool, ...] = (True,) * len(RUNS)

    @classmethod
    def of(
        cls,
        begin: Tensor,
        end: Tensor,
        page: Tensor,
        count: Tensor,
        codec: Tensor,
        bias: Tensor | None = None,
        log_bias: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Directory:
        """Makes a `flat` directory: orders the entries [begin, end) of each (row, KV head) by
        codec, on the host, and copies them to `device`. Row r is state r. Arguments as
        `cpu.Directory` takes them, but `log_bias` is on the device, and the caller keeps it."""
        lengths = (end - begin).flatten().long()
        owner = torch.arange(len(lengths)).repeat_interleave(lengths)
        shift = begin.flatten().long() - (lengths.cumsum(0) - lengths)
        entry = torch.arange(len(owner)) + shift[owner]
        key = owner * len(RUNS) + _RANK[codec[entry].long()]
        order = key.argsort(stable=True)
        entry, sizes = entry[order], key.bincount(minlength=len(lengths) * len(RUNS))
        ends = sizes.cumsum(0)
        runs = torch.stack((ends - sizes, ends), 1).view(*begin.shape, len(RUNS), 2)
        present = sizes.view(-1, len(RUNS)).any(0).tolist()
        address = None
        if bias is not None and log_bias is not None:
            address = torch.where(bias < 0, 0, log_bias.data_ptr() + 4 * bias.long())[entry]
        runs, page, count = (
            x.to(device, non_blocking=True) for x in (runs, page[entry], count.int()[entry])
        )
        if address is not None:
            address = address.to(device, non_blocking=True)
        return cls.flat(runs, page, count, address, tuple(present))

    @classmethod
    def flat(
        cls,
        runs: Tensor,
        page: Tensor,
        count: Tensor,
        bias: Tensor | None,
        present: tuple[bool, ...],
    ) -> Directory:
        """A directory whose entries are in one list, on the tensors' device and without waiting for
        it: as if every row of `runs`, [rows, kv_heads, len(RUNS), 2], had a region of the one block
        0, which `Batch.of` puts before the tails."""
        if not len(page):  # an empty tensor has no address
            page, count = F.pad(page, (0, 1)), F.pad(count, (0, 1))
            bias = None if bias is None else F.pad(bias, (0, 1))
        return cls(
            F.pad(runs.int(), (0, 0, 0, 0, 0, 0, 1, 0)),
            torch.ones(len(runs), dtype=torch.int32, device=runs.device),
            page.int(),
            count.int(),
            bias,
            _FLAT,
            present,
        )

    @classmethod
    def ordered(cls, source: Source) -> Directory | None:
        """A request's pages as the directory of a batch of one, without waiting for the device;
        None if it has none."""
        if not source.runs or not len(source.page):
            return None
        runs, page, count, bias = source.kinds, source.page, source.count, None
        if source.bias is not None and source.log_bias is not None:
            bias = torch.where(source.bias < 0, 0, source.log_bias.data_ptr() + 4 * source.bias)
        if runs is None:
            kinds = len(RUNS)
            key = source.head * kinds + _rank(source.codec.device)[source.codec.long()]
            order = key.argsort(stable=True)
            bounds = torch.arange(len(source.begin) * kinds, device=key.device).view(-1, kinds, 1)
            runs = torch.cat(((key < bounds).sum(-1, True), (key <= bounds).sum(-1, True)), -1)
            page, count = page[order], count[order]
            bias = None if bias is None else bias[order]
        present = tuple(run in source.runs for run in RUNS)
        return cls.flat(runs.unsqueeze(0), page, count, bias, present)


@dataclass
class Batch:
    """The sequences of one step, as every layer sees them.

    Attributes:
        query_start: int32 [seqs + 1], rows of the query that belong to each sequence.
        length: int32 [seqs], slots that each holds, this step's tokens included; a region counts as
            so many full blocks.
        table: int32 [seqs, columns], block ids, those of the region first; rows may be strided.
        states: int32 [seqs], the state in the directory that each sequence has, negative if it has
            none; not read without a directory.
        directory: compressed pages, or None if no sequence has any.
        longest: no sequence has more query rows than this; 1: a decode step.
    """

    query_start: Tensor
    length: Tensor
    table: Tensor
    states: Tensor
    directory: Directory | None
    longest: int

    @classmethod
    def of(
        cls,
        query_start: Tensor,
        tail_length: Tensor,
        tail_table: Tensor,
        directory: Directory | None,
        longest: int,
        block_size: int,
    ) -> Batch:
        """The batch of sequences with raw tails of `tail_length` tokens in the blocks `tail_table`
        (int32 [seqs, columns]), of which sequence i has row i of a `flat` directory."""
        length, table = tail_length, tail_table
        if directory is not None:
            length, table = length + block_size, F.pad(table, (1, 0))
        states = torch.arange(len(length), dtype=torch.int32, device=length.device)
        return cls(query_start, length, table, states, directory, longest)

    @property
    def seqs(self) -> int:
        """Number of sequences."""
        return len(self.query_start) - 1


@dataclass
class Source:
    """One request's tokens in a layer: its pages in position order, then its tail. Slots are
    numbered per head: tokens of the pages in order, then the tail's.

    Attributes:
        begin, end: int32 [kv_heads], entries of each head; heads follow each other.
        head, page, count, codec: int32 [entries].
        first: int32 [entries], slot of an entry's first token within its head.
        tail_slot: int32 [kv_heads], slot of the tail's first token.
        tail_table: int32 [blocks].
        tail_length, tail_position: tokens in the tail, and position of its first.
        runs: of RUNS those that entries may be of. For the others nothing is launched.
        bias, log_bias: int64 [entries] and float32, as in `Directory`, or both None.
        kinds: int32 [kv_heads, len(RUNS), 2], entries [begin, end) of each of RUNS that a head has,
            if each head has them one after the other; or None.
    """

    begin: Tensor
    end: Tensor
    head: Tensor
    page: Tensor
    count: Tensor
    codec: Tensor
    first: Tensor
    tail_slot: Tensor
    tail_table: Tensor
    tail_length: int
    tail_position: int
    runs: tuple[str, ...] = RUNS
    bias: Tensor | None = None
    log_bias: Tensor | None = None
    kinds: Tensor | None = None

    @classmethod
    def of(
        cls,
        begin: Tensor,
        end: Tensor,
        page: Tensor,
        count: Tensor,
        codec: Tensor,
        tail_table: Tensor,
        tail_length: int,
        tail_position: int,
        runs: tuple[str, ...] = RUNS,
        bias: Tensor | None = None,
        log_bias: Tensor | None = None,
    ) -> Source:
        """From a directory's first row (begin and end [1, kv_heads] or [kv_heads]), on the tensors'
        device and without waiting for it."""
        begin, end = (x.reshape(-1, begin.shape[-1])[0].int() for x in (begin, end))
        count = count.int()
        # Slots before each entry, over all heads, and with a zero in front for empty heads.
        before = torch.zeros(len(count) + 1, dtype=torch.int32, device=count.device)
        torch.cumsum(count, 0, dtype=torch.int32, out=before[1:])
        index = torch.arange(len(count), device=count.device).unsqueeze(1)
        mine = (index >= begin) & (index < end)  # [entries, kv_heads]
        base = (mine * before[begin.long()]).sum(1, dtype=torch.int32)
        heads = torch.arange(len(begin), device=count.device)
        return cls(
            begin,
            end,
            (mine * heads).sum(1, dtype=torch.int32),
            page.int(),
            count,
            codec.int(),
            before[:-1] - base,
            before[end.long()] - before[begin.long()],
            tail_table.int(),
            tail_length,
            tail_position,
            runs,
            bias,
            log_bias,
        )
