"""What the CPU kernels are given: a layer of a cache, directories of pages, the sequences of a step
and the tokens of one request.

These objects hold the addresses of tensors. They keep the tensors alive; nobody may resize them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.ops.cpu.library import (
    DTYPES,
    LIBRARY,
    BatchStruct,
    DirectoryStruct,
    LayerStruct,
    SourceStruct,
    address,
    capacity,
    check,
)
from vllm_kvcrush.ops.cpu.tables import LayerTable


class Layer:
    """One layer of a cache whose storage is blocks x layers x KV heads equal pages.

    Args:
        pool: the whole cache, any dtype and shape, contiguous, 64-byte aligned; its bytes are
            [blocks, layers, kv_heads, page_bytes].
        index: index of this layer.
        layers: number of layers that share the pool.
        heads, kv_heads: number of query heads and of KV heads.
        k_size, v_size: head sizes.
        block_size: tokens in a block.
        dtype: dtype of raw pages: float32, bfloat16 or float16.
        scale: factor of q·k.
        tables: by name, the layer's tables of fitted codecs.
    """

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
        page_bytes = block_size * (k_size + v_size) * dtype.itemsize
        block_bytes = layers * kv_heads * page_bytes
        size = pool.numel() * pool.itemsize
        if size % block_bytes:
            raise ValueError(f"a pool of {size} bytes is not whole blocks of {block_bytes} bytes")
        self.pool, self.dtype, self.page_bytes = pool, dtype, page_bytes
        self.heads, self.kv_heads, self.k_size, self.v_size = heads, kv_heads, k_size, v_size
        self.block_size, self.first_page, self.scale = block_size, index * kv_heads, scale
        self.block_pages, self.num_blocks = layers * kv_heads, size // block_bytes
        self.tables = dict(tables or {})
        addresses = [self.tables[c].address if c in self.tables else None for c in CODECS]
        self._tables = (ctypes.c_void_p * len(CODECS))(*addresses)
        self._struct = LayerStruct(
            address(pool),
            self.num_blocks,
            page_bytes,
            self.block_pages,
            self.first_page,
            block_size,
            kv_heads,
            heads,
            k_size,
            v_size,
            DTYPES[dtype],
            scale,
            0,
            ctypes.addressof(self._tables),
        )
        self._pointer = ctypes.addressof(self._struct)
        check(LIBRARY.kvc_check_layer(self._pointer))

    def page(self, block: int, head: int) -> int:
        """Returns the index in the pool of the page of a block and KV head of this layer."""
        return block * self.block_pages + self.first_page + head

    def capacity(self, codec: str, head: int = 0) -> int:
        """Returns the number of tokens that a page of a KV head holds."""
        if CODECS[codec].needs_tables:
            return self.tables[codec].capacity[head]
        return capacity(codec, self.page_bytes, self.k_size, self.v_size, self.dtype)


class Directory:
    """Which pages each (row, KV head) owns: entries [begin, end) of page, count and codec.

    Rows are the sequences of a batch; a single request has one row. `begin` and `end` may be slices
    of larger arrays, such as one layer of [rows, layers, kv_heads].

    Args:
        begin, end: int32 [rows, kv_heads], the last dimension contiguous, equal strides.
        page: int32 [entries], indices of the pages in the pool.
        count: uint16 [entries], tokens in each page.
        codec: uint8 [entries], number of each page's codec.
        bias: int64 [entries], where in `log_bias` the tokens of each page start, or -1.
        log_bias: float32, what is added to the logits of those tokens.
    """

    def __init__(
        self,
        begin: Tensor,
        end: Tensor,
        page: Tensor,
        count: Tensor,
        codec: Tensor,
        bias: Tensor | None = None,
        log_bias: Tensor | None = None,
    ):
        for tensor in (begin, end):
            if tensor.dtype != torch.int32 or tensor.dim() != 2 or tensor.stride(1) != 1:
                raise ValueError("begin and end must be int32 [rows, kv_heads] with unit stride")
        if begin.stride(0) != end.stride(0) or begin.shape != end.shape:
            raise ValueError("begin and end must have equal shapes and strides")
        self.rows = begin.shape[0]
        self._kept = (begin, end, page, count, codec, bias, log_bias)
        if not len(page) == len(count) == len(codec) or (
            bias is not None and len(bias) != len(page)
        ):
            raise ValueError("page, count, codec and bias must have one entry each")
        if (bias is None) != (log_bias is None):
            raise ValueError("bias and log_bias go together")
        self.struct = DirectoryStruct(
            begin.data_ptr(),
            end.data_ptr(),
            begin.stride(0),
            len(page),
            address(page, torch.int32),
            address(count, torch.uint16),
            address(codec, torch.uint8),
            address(bias, torch.int64),
            address(log_bias, torch.float32),
            0 if log_bias is None else log_bias.numel(),
        )


_NO_DIRECTORY = DirectoryStruct()


class Batch:
    """The sequences of one step, as every layer sees them.

    Args:
        query_start: int32 [seqs + 1], first query row of each sequence, and the end.
        tail_length: int32 [seqs], tokens in each raw tail, this step's included.
        tail_table: int32 [seqs, columns], block ids of each tail; rows may be strided.
        directory: compressed pages, or None if no sequence has any.
    """

    def __init__(
        self,
        query_start: Tensor,
        tail_length: Tensor,
        tail_table: Tensor,
        directory: Directory | None = None,
    ):
        seqs = len(query_start) - 1
        if len(tail_length) < seqs or len(tail_table) < seqs:
            raise ValueError(f"tail_length and tail_table need a row for each of {seqs} sequences")
        if directory is not None and directory.rows < seqs:
            raise ValueError(f"a directory of {directory.rows} rows for {seqs} sequences")
        if tail_table.dtype != torch.int32 or tail_table.stride(1) != 1:
            raise ValueError("tail_table must be int32 [seqs, columns] with unit stride")
        self._kept = (query_start, tail_length, tail_table, directory)
        self.rows_read = query_start
        self.struct = BatchStruct(
            seqs,
            address(query_start, torch.int32),
            address(tail_length, torch.int32),
            tail_table.data_ptr(),
            # A row must not be read past its own columns.
            tail_table.stride(0) if len(tail_table) > 1 else tail_table.shape[1],
            _NO_DIRECTORY if directory is None else directory.struct,
        )
        self._pointer = ctypes.addressof(self.struct)


class Source:
    """One request's tokens in a layer: those of row 0 of a directory, then those of a tail.

    Args:
        directory: compressed pages, or None.
        tail_table: int32 [blocks], block ids of the tail.
        tail_length: number of tokens in the tail.
        tail_position: position of the tail's first token.
        block_size: tokens in a block.
    """

    def __init__(
        self,
        directory: Directory | None,
        tail_table: Tensor,
        tail_length: int,
        tail_position: int,
        block_size: int,
    ):
        if tail_length > len(tail_table) * block_size:
            raise ValueError(f"{tail_length} tokens in a tail of {len(tail_table)} blocks")
        self._kept = (directory, tail_table)
        self.struct = SourceStruct(
            _NO_DIRECTORY if directory is None else directory.struct,
            address(tail_table, torch.int32),
            tail_length,
            tail_position,
        )
        self._pointer = ctypes.addressof(self.struct)
