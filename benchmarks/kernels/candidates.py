"""The interface of a compared kernel, and those of vLLM and torch; ours are in `ours.py`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.cases import PAGE, Case
from benchmarks.kernels.paged import PagedCache, split


class Candidate(ABC):
    """One kernel with its own copy of a case's K and V, in the form that it reads.

    It holds `sets` independent copies of the batch, of which a call reads one; reading all of
    them reads at least `working_set` bytes.

    Attributes:
        name: as in the tables.
        codec: how K and V are stored: "raw" is the dtype of the queries.
        dtype: of queries and output.
        tolerance: largest relative error of a head's output against float64 attention over
            what this candidate holds. The rounding of the output counts as error.
        sets: copies.
        bytes_read: of K and V that one call cannot do without.
        keep: share of the tokens before the queries that it still holds.
        queries: [batch * query_len, heads, head_size] in `dtype`.
    """

    name: ClassVar[str]
    codec: ClassVar[str]
    dtype: ClassVar[torch.dtype]
    tolerance: ClassVar[float]
    keep: ClassVar[float] = 1.0
    sets: int
    bytes_read: int

    def __init__(self, case: Case, working_set: int):
        self.case = case
        self.queries = case.queries.to(self.dtype)

    @abstractmethod
    def run(self, index: int, out: Tensor) -> None:
        """Attends over copy `index` into `out`, of the shape and dtype of `queries`."""

    @abstractmethod
    def held(self, index: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Returns what `run(index)` reads for one sequence, decoded: K and V as float64 [kv_heads,
        tokens held, head_size]; the last `query_len` tokens are the queries' own."""

    def empty(self) -> Tensor:
        """Returns an output that nobody has written: all NaN."""
        return torch.full_like(self.queries, torch.nan)


class VllmAttention(Candidate):
    """vLLM's CPU attention over its paged cache, block tables at random; its scheduler's
    metadata is made once, as vLLM makes it once for all layers of a step."""

    codec = "raw"

    def __init__(self, case: Case, working_set: int):
        super().__init__(case, working_set)
        from vllm import _custom_ops as ops
        from vllm import envs

        shape, batch, query_len = case.shape, case.batch, case.query_len
        self.lengths = [query_len + math.ceil(self.keep * (n - query_len)) for n in case.lengths]
        token = shape.kv_heads * 2 * shape.head_size * self.dtype.itemsize
        self.bytes_read = sum(self.lengths) * token
        self.sets = math.ceil(working_set / self.bytes_read)
        pages = -(-max(self.lengths) // PAGE)
        self._contents = case.contents(self.sets)[:, :, :pages]
        blocks = self._contents.numel()
        draw = torch.Generator().manual_seed(blocks)
        places = torch.randperm(blocks, generator=draw)
        self._tables = places.view(self._contents.shape).to(torch.int32)
        cache = PagedCache(case, self.dtype, self._contents.flatten()[places.argsort()])
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        starts = torch.arange(batch + 1, dtype=torch.int32) * query_len
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=batch,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_size,
            seq_lens=lengths,
            dtype=self.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=cache.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        key_cache, value_cache = split(cache.blocks)
        self._attend = ops.cpu_attention_with_kv_cache
        self._arguments: dict[str, Any] = {
            "query": self.queries,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "query_start_loc": starts,
            "seq_lens": lengths,
            "scale": shape.scale,
            "causal": True,
            "alibi_slopes": None,
            "sliding_window": -1,
            "softcap": 0.0,
            "scheduler_metadata": metadata,
            "s_aux": None,
        }

    def run(self, index: int, out: Tensor) -> None:
        self._attend(output=out, block_table=self._tables[index], **self._arguments)

    def held(self, index: int, sequence: int) -> tuple[Tensor, Tensor]:
        contents, length = self._contents[index, sequence], self.lengths[sequence]
        keys, values = (
            self.case.tokens(part.to(self.dtype), contents, length).double()
            for part in (self.case.keys, self.case.values)
        )
        return keys, values


class VllmBf16(VllmAttention):
    """The baseline."""

    name, dtype, tolerance = "vllm-bf16", torch.bfloat16, 8e-3


class VllmFp32(VllmAttention):
    """What a model served in float32 gets."""

    name, dtype, tolerance = "vllm-fp32", torch.float32, 1e-5


class VllmBf16Evicted(VllmBf16):
    """What evicting three tokens of four earns with vLLM's own kernel."""

    name, keep = "vllm-bf16-evicted-4x", 0.25


class TorchSdpa(Candidate):
    """torch's attention over contiguous K and V, one call a sequence: no paging, a weak
    baseline."""

    name, codec, dtype, tolerance = "torch-sdpa-fp32", "raw", torch.float32, 1e-5

    def __init__(self, case: Case, working_set: int):
        super().__init__(case, working_set)
        shape = case.shape
        token = shape.kv_heads * 2 * shape.head_size * self.dtype.itemsize
        self.bytes_read = sum(case.lengths) * token
        self.sets = math.ceil(working_set / self.bytes_read)
        self._contents = case.contents(self.sets)
        # [copies][sequence]: K and V, [1, kv_heads, length, head_size]
        self._held = [
            [
                [case.tokens(p, c, n).unsqueeze(0).clone() for p in (case.keys, case.values)]
                for c, n in zip(copy, case.lengths, strict=True)
            ]
            for copy in self._contents
        ]
        self._masks = [
            torch.ones(case.query_len, n, dtype=torch.bool).tril(n - case.query_len)
            if case.query_len > 1
            else None
            for n in case.lengths
        ]

    def run(self, index: int, out: Tensor) -> None:
        count = self.case.query_len
        for i, (keys, values) in enumerate(self._held[index]):
            rows = slice(i * count, (i + 1) * count)
            out[rows] = F.scaled_dot_product_attention(
                self.queries[rows].transpose(0, 1).unsqueeze(0),
                keys,
                values,
                attn_mask=self._masks[i],
                scale=self.case.shape.scale,
                enable_gqa=True,
            )[0].transpose(0, 1)

    def held(self, index: int, sequence: int) -> tuple[Tensor, Tensor]:
        keys, values = (part[0].double() for part in self._held[index][sequence])
        return keys, values
