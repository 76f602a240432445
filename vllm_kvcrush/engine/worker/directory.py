"""Where all requests' compressed pages lie, on a GPU: written at compactions, read at every step.

What a step reads never moves and is never copied: each request has a row, by the state that vLLM's
V2 runner gives it, as its block table has one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

from vllm_kvcrush.config import Settings
from vllm_kvcrush.engine.worker.allowed import has_biases, region_codecs
from vllm_kvcrush.engine.worker.region import Region
from vllm_kvcrush.ops.triton.cache import Directory, Source, run_of
from vllm_kvcrush.ops.triton.codecs import RUNS


@dataclass
class UploadedRegion:
    """A region on the device, for as long as a compaction reads or fills it: one copy for all
    layers.

    Attributes:
        region: on the host.
        blocks: int32 [blocks].
        begin, end: int32 [layers, kv_heads], entries of a layer and head.
        kinds: int32 [layers, kv_heads, len(RUNS), 2], those of each of RUNS among them.
        tokens: int32 [layers, kv_heads], of each.
        page, count, codec, first: int32 [n], as in `Source`.
        head: int32 [n], number of an entry's head among those of all layers.
        bias: int64 [n], as in `Region`, or None.
        starts: of each layer, its first entry; and the end of the last.
        runs: of RUNS those that entries are of.
    """

    region: Region
    blocks: Tensor
    begin: Tensor
    end: Tensor
    kinds: Tensor
    tokens: Tensor
    page: Tensor
    count: Tensor
    codec: Tensor
    head: Tensor
    first: Tensor
    bias: Tensor | None
    starts: list[int]
    runs: tuple[str, ...]

    @classmethod
    def of(cls, region: Region, device: torch.device) -> UploadedRegion:
        """Copies a region to a device, without waiting for it. What is there already is taken."""
        if isinstance(region.uploaded, cls):
            return region.uploaded
        begin, end = region.begin.numpy(), region.end.numpy()
        layers, heads = begin.shape
        count = region.count.numpy().astype(np.int32)
        sizes = (end - begin).ravel()
        before = np.cumsum(count) - count
        at = np.minimum(begin.ravel(), max(len(count) - 1, 0))
        base = before[at] if len(count) else np.zeros_like(at)
        parts = [
            region.block_ids.numpy(),
            begin.ravel(),
            end.ravel(),
            _kinds(region).ravel(),
            region.tokens.numpy().ravel(),
            region.page.numpy(),
            count,
            region.codec.numpy(),
            np.arange(layers * heads).repeat(sizes),
            before - base.repeat(sizes),
        ]
        packed = np.concatenate(parts, dtype=np.int32, casting="unsafe")
        there = async_tensor_h2d(packed, device=device)
        blocks, begins, ends, kinds, tokens, *rest = there.split([len(part) for part in parts])
        page, counts, codec, head, first = rest
        bias = None
        if region.bias is not None:
            bias = async_tensor_h2d(region.bias, device=device)
        region.uploaded = made = cls(
            region, blocks, begins.view(layers, heads), ends.view(layers, heads),
            kinds.view(layers, heads, len(RUNS), 2), tokens.view(layers, heads), page, counts,
            codec, head, first, bias,
            [*begin[:, 0].tolist(), len(count)],
            tuple(dict.fromkeys(run_of(codec) for codec in region.codecs)),
        )  # fmt: skip
        return made

    @functools.cached_property
    def _by_layer(self) -> tuple[Tensor, ...]:
        """Begin, end, kinds and head as a layer's own entries and heads are counted."""
        start = self.begin[:, :1]
        kinds = self.kinds - start[..., None, None]
        return self.begin - start, self.end - start, kinds, self.head % self.begin.shape[1]

    def source(self, layer: int, tail: Tensor, tokens: int, position: int) -> Source:
        """One layer of it, then a tail: see `Source`."""
        own = slice(self.starts[layer], self.starts[layer + 1])
        begin, end, kinds, head = self._by_layer
        bounds = begin[layer], end[layer]
        return self._source(
            own, bounds, kinds[layer], head[own], self.tokens[layer], tail, tokens, position
        )

    def source_of(self, layers: range, tail: Tensor, tokens: int, position: int) -> Source:
        """Several layers of it as one that has the heads of all, then a tail: see `Source`."""
        own = slice(self.starts[layers.start], self.starts[layers.stop])
        begin, end, kinds, head = (
            *(x[layers.start : layers.stop] for x in (self.begin, self.end, self.kinds)),
            self.head[own],
        )
        if layers.start:
            begin, end, kinds = begin - own.start, end - own.start, kinds - own.start
            head = head - layers.start * begin.shape[1]
        bounds = begin.flatten(), end.flatten()
        counts = self.tokens[layers.start : layers.stop].flatten()
        return self._source(own, bounds, kinds.flatten(0, 1), head, counts, tail, tokens, position)

    def _source(
        self,
        own: slice,
        bounds: tuple[Tensor, Tensor],
        kinds: Tensor,
        head: Tensor,
        counts: Tensor,
        tail: Tensor,
        tokens: int,
        position: int,
    ) -> Source:
        return Source(
            *bounds, head, self.page[own], self.count[own], self.codec[own], self.first[own],
            counts, tail, tokens, position, self.runs,
            None if self.bias is None else self.bias[own], self.region.log_bias, kinds,
        )  # fmt: skip


def _kinds(region: Region) -> np.ndarray:
    """`UploadedRegion.kinds` of a region."""
    bounds, begin = region.bounds.numpy(), region.begin.numpy()
    kinds = np.empty((*begin.shape, len(RUNS), 2), dtype=np.int32)
    kinds[...] = begin[..., None, None]  # empty
    places = [RUNS.index(run_of(codec)) for codec in region.codecs]
    for part, run in enumerate(places):
        again = run in places[:part]
        assert not again or places[part - 1] == run, f"parts of a region in {region.codecs}"
        if not again:
            kinds[:, :, run, 0] = bounds[:, :, part]
        kinds[:, :, run, 1] = bounds[:, :, part + 1]
    return kinds


class ResidentDirectory:
    """The regions of all requests, in tensors of the largest size.

    Args:
        states: requests that the runner has states for.
        layers, heads: layers, and KV heads of each.
        blocks: of the pool.
        settings: which say what pages regions may have, and whether tokens may have log biases.

    Attributes:
        layers: the directory as each layer's attention reads it.
    """

    def __init__(
        self,
        states: int,
        layers: int,
        heads: int,
        blocks: int,
        settings: Settings,
        device: torch.device,
    ):
        self._device = device
        width = entries_of_block(layers * heads)
        # Rows of nobody's are empty.
        self._runs = torch.zeros(
            states + 1, layers, heads, len(RUNS), 2, dtype=torch.int32, device=device
        )
        self._blocks = StagedWriteTensor(states, torch.int32, device)
        self._page, self._count = (
            torch.zeros(blocks, width, dtype=torch.int32, device=device) for _ in range(2)
        )
        self._bias = None
        if has_biases(settings):
            self._bias = torch.zeros(blocks, width, dtype=torch.int64, device=device)
        known = {run_of(codec) for codec in region_codecs(settings)}
        self.layers = [
            Directory(
                self._runs[:, layer],
                self._blocks.gpu,
                self._page.view(-1),
                self._count.view(-1),
                None if self._bias is None else self._bias.view(-1),
                width.bit_length() - 1,
                tuple(run in known for run in RUNS),
            )
            for layer in range(layers)
        ]

    def write(self, state: int, region: Region) -> None:
        """Puts down where the pages of a request are, without waiting for the device. Its region
        counts from the next `set_blocks` on."""
        there = UploadedRegion.of(region, self._device)
        known = {run for run, may in zip(RUNS, self.layers[0].present, strict=True) if may}
        for run in there.runs:
            assert run in known, f"attention was not compiled for pages of {run}"
        self._runs[state + 1].copy_(there.kinds)
        n, width = len(there.page), self._page.shape[1]
        rows = -(-n // width)
        blocks, padding = there.blocks[:rows].long(), (0, rows * width - n)

        def put(to: Tensor, x: Tensor) -> None:
            to.index_copy_(0, blocks, torch.nn.functional.pad(x, padding).view(rows, width))

        put(self._page, there.page)
        put(self._count, there.count)
        if there.bias is not None and region.log_bias is not None:
            assert self._bias is not None, "attention was not compiled for log biases"
            put(self._bias, region.log_bias.data_ptr() + 4 * there.bias)
        elif self._bias is not None:
            self._bias.index_fill_(0, blocks, 0)

    def stage_blocks(self, state: int, blocks: int) -> None:
        """Says how many blocks the region of a state takes, 0 if it has none; to be told to the
        device by `apply`, once a step for each state."""
        self._blocks.stage_write_elem(state, blocks)

    def apply(self) -> None:
        """Tells the device what was staged."""
        self._blocks.apply_write()


def entries_of_block(pages: int) -> int:
    """Entries of a directory that are kept with a block of so many pages: the next power of two, so
    that a kernel finds them by a shift."""
    return 1 << max(pages - 1, 0).bit_length()
