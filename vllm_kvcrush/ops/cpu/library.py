"""The compiled library of csrc/ through ctypes: its structures, its loading, and what it says about
itself."""

from __future__ import annotations

import ctypes
import pathlib
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_kvcrush.codecs import CODECS

VERSION = 8
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_u8, _i32, _i64, _ptr = ctypes.c_uint8, ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class LayerStruct(ctypes.Structure):
    _fields_ = [
        ("pool", _ptr),
        ("num_blocks", _i64),
        ("page_bytes", _i64),
        ("block_pages", _i32),
        ("first_page", _i32),
        ("block_size", _i32),
        ("num_kv_heads", _i32),
        ("num_heads", _i32),
        ("k_size", _i32),
        ("v_size", _i32),
        ("dtype", _i32),
        ("scale", ctypes.c_float),
        ("reserved", _i32),
        ("tables", _ptr),
    ]


class DirectoryStruct(ctypes.Structure):
    _fields_ = [
        ("begin", _ptr),
        ("end", _ptr),
        ("stride", _i64),
        ("size", _i64),
        ("page", _ptr),
        ("count", _ptr),
        ("codec", _ptr),
        ("bias", _ptr),
        ("log_bias", _ptr),
        ("log_bias_size", _i64),
    ]


class BatchStruct(ctypes.Structure):
    _fields_ = [
        ("num_seqs", _i32),
        ("query_start", _ptr),
        ("tail_length", _ptr),
        ("tail_table", _ptr),
        ("tail_stride", _i64),
        ("directory", DirectoryStruct),
    ]


class ScoringStruct(ctypes.Structure):
    _fields_ = [
        ("window", _i32),
        ("pool", _i32),
        ("pool_max", _i32),
        ("reduce", _i32),
        ("factor", ctypes.c_float),
    ]


class SourceStruct(ctypes.Structure):
    _fields_ = [
        ("directory", DirectoryStruct),
        ("tail_table", _ptr),
        ("tail_length", _i32),
        ("tail_position", _i32),
    ]


class KeysStruct(ctypes.Structure):
    _fields_ = [
        ("data", _ptr),
        ("stride", _i64),
        ("heads", _i32),
        ("size", _i32),
        ("slots", _i64),
    ]


class PieceStruct(ctypes.Structure):
    _fields_ = [(name, _u8) for name in ("quad", "weight", "word", "first", "bits")]


class HeadTableStruct(ctypes.Structure):
    _fields_ = [
        *((name, _i32) for name in ("capacity", "exceptions", "words", "pieces")),
        *((name, _i32) for name in ("components", "stride")),
        *((name, _ptr) for name in ("piece", "mean", "forward", "inverse", "cost")),
        *((name, _i32) for name in ("fields", "v_bits")),
        *((name, _ptr) for name in ("weight", "step", "middle")),
        ("v_step", ctypes.c_float),
        ("reserved", _i32),
    ]


class TableStruct(ctypes.Structure):
    _fields_ = [
        ("local", _i32),
        ("positions", _i32),
        ("heads", _ptr),
        *((name, _ptr) for name in ("coarse", "fine")),
    ]


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "kvc_piece": PieceStruct,
    "kvc_head_table": HeadTableStruct,
    "kvc_table": TableStruct,
    "kvc_layer": LayerStruct,
    "kvc_directory": DirectoryStruct,
    "kvc_batch": BatchStruct,
    "kvc_source": SourceStruct,
    "kvc_scoring": ScoringStruct,
    "kvc_keys": KeysStruct,
}


def differences(described: str) -> list[str]:
    """Returns the names of the structures that differ in size or offsets between `described`, which
    is what kvc_structs returns, and their mirrors here, or that only one of the two has."""
    found = dict(line.split(" ", 1) for line in described.splitlines())
    own = {name: _described(struct) for name, struct in STRUCTS.items()}
    return sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))


def _described(struct: type[ctypes.Structure]) -> str:
    fields = [(name, getattr(struct, name)) for name, *_ in struct._fields_]
    return f"{ctypes.sizeof(struct)}: " + ", ".join(f"{n} {f.offset} {f.size}" for n, f in fields)


def _load() -> ctypes.CDLL:
    path = pathlib.Path(__file__).parents[2] / "_kernels.so"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(
            f"vllm-kvcrush's CPU kernels cannot be loaded ({error}); build them with "
            "`pip install -e .` in the project's directory, which needs a C++ compiler"
        ) from None
    found = library.kvc_version()
    if found != VERSION:
        raise ImportError(
            f"{path.name} has version {found} of the kernels' interface and this package needs "
            f"{VERSION}; run `pip install -e .` in the project's directory again"
        )
    library.kvc_structs.restype = ctypes.c_char_p
    if differing := differences(library.kvc_structs().decode()):
        raise ImportError(
            f"{path.name} lays out {', '.join(differing)} otherwise than this package; run "
            "`pip install -e .` in the project's directory again"
        )
    pointers = {
        "kvc_attention": [_ptr, _ptr, _ptr, _i32, _i64, _ptr, _i32, _i64, _ptr],
        "kvc_store": [_ptr, _i64, _ptr, _i64, _ptr, _i64, _ptr],
        "kvc_check_layer": [_ptr],
        "kvc_encode": [_ptr, _i32, _i32, _i64, _i32, _ptr, _ptr, _ptr],
        "kvc_decode": [_ptr, _i32, _i32, _i64, _i32, _ptr, _ptr, _ptr],
        "kvc_compact": [_ptr, _ptr, _ptr, _ptr, _ptr],
        "kvc_gather": [_ptr, _ptr, _ptr, _ptr, _i64, _ptr, _ptr, _ptr],
        "kvc_fill": [_ptr, _i64, _ptr, _ptr, _ptr, _ptr, _ptr],
        "kvc_read": [_ptr, _ptr, _i32, _i64, _i64, _ptr, _ptr, _ptr],
        "kvc_window_scores": [_ptr, _ptr, _ptr, _i32, _i64, _i64, _ptr, _ptr, _ptr],
        "kvc_top_mask": [_i64, _i64, _ptr, _ptr, _ptr],
        "kvc_represent": [_i64, _i64, _i64, _ptr, _ptr, _i64, _ptr, _i64],
        "kvc_mask_slots": [_i64, _i64, _ptr, _ptr, _ptr],
        "kvc_nearest_kept": [_ptr, _ptr, _ptr, _ptr, _ptr],
        "kvc_redundancy": [_ptr, _ptr, ctypes.c_float, _ptr],
        "kvc_merge": [_ptr, _ptr, _ptr, _ptr],
        "kvc_spread": [_i32, _i64, _i32, _ptr, _ptr, _i64, _ptr],
    }
    for name, arguments in pointers.items():
        getattr(library, name).argtypes = arguments
    library.kvc_capacity.argtypes = [_i32, _i64, _i32, _i32, _i32]
    library.kvc_capacity.restype = library.kvc_scratch_peak.restype = _i64
    library.kvc_error.restype = library.kvc_isa.restype = ctypes.c_char_p
    library.kvc_use_isa.argtypes = [ctypes.c_char_p]
    return library


LIBRARY = _load()


def check(status: int) -> None:
    if status:
        raise ValueError(f"vllm-kvcrush kernels: {LIBRARY.kvc_error().decode()}")


def address(tensor: Tensor | None, dtype: torch.dtype | None = None) -> int | None:
    if tensor is None:
        return None
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("the CPU kernels take contiguous tensors in CPU memory")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"a tensor has dtype {tensor.dtype} where {dtype} is needed")
    return tensor.data_ptr()


def per_row(numbers: int | Sequence[int] | Tensor, rows: int) -> Tensor:
    """Returns a number for each row, int64 [rows], given one for all or one for each. Raises
    ValueError if there are too many or too few."""
    if isinstance(numbers, int):
        return torch.full((rows,), numbers, dtype=torch.int64)
    found = torch.as_tensor(numbers, dtype=torch.int64).contiguous()
    if found.shape != (rows,):
        raise ValueError(f"{tuple(found.shape)} numbers for {rows} rows")
    return found


def isa() -> str:
    """Returns the instruction set in use: "baseline", "avx2", "avx512", "avx512bf16", "amx" or
    "neon", or "" if KVCRUSH_ISA, read at the first call, names one that cannot be used."""
    return str(LIBRARY.kvc_isa().decode())


def use_isa(name: str) -> None:
    """Makes later calls use the kernels of this instruction set, for tests. Raises ValueError."""
    check(LIBRARY.kvc_use_isa(name.encode()))


def runs(name: str) -> bool:
    """Returns whether this CPU and this library have the kernels of an instruction set."""
    used = isa()
    found = bool(LIBRARY.kvc_use_isa(name.encode()) == 0)
    if used:
        use_isa(used)
    return found


def threads() -> int:
    """Returns the number of threads that a large call uses: those of torch's OpenMP runtime."""
    return int(LIBRARY.kvc_threads())


def scratch_peak() -> int:
    """Returns the most bytes of working memory that the kernels of this process have held at once
    since the last call of this function. Up to 16 MiB of each kind and thread are kept from call to
    call."""
    return int(LIBRARY.kvc_scratch_peak())


def capacity(codec: str, page_bytes: int, k_size: int, v_size: int, dtype: torch.dtype) -> int:
    """Returns the number of tokens that a page holds by the library; `Codec.capacity` says the
    same."""
    return int(
        LIBRARY.kvc_capacity(CODECS[codec].number, page_bytes, k_size, v_size, DTYPES[dtype])
    )
