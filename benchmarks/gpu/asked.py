"""What code asks of a device, counted without one.

Tensors "on the device" are marked ones in the CPU's memory that say they are CUDA's, so the code
under test takes the paths that it takes there. Kernels are counted and not run, so what tensors
hold means nothing. What would fail for tensors on two devices fails here too.
"""

from __future__ import annotations

import contextlib
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._pytree import tree_flatten, tree_map
from triton.runtime.jit import JITFunction

PROCESSORS = 132  # of an H200
DEVICE = torch.device("cuda")


class OnDevice(Tensor):
    """A tensor that says it is on the device."""


class Pinned(Tensor):
    """A tensor in page-locked memory of the host."""


_ATTRIBUTES = {
    Tensor.device.__get__: DEVICE,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: False,  # type: ignore[attr-defined]
}
# Reading a value makes the host wait until the device has it.
_WAITS = {
    *("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu"),
    *("nonzero", "unique", "equal", "masked_select", "argwhere", "allclose", "__contains__"),
}
_MADE = {"empty", "empty_like", "new_empty"}  # nothing is launched for memory
_COPIES = {"to", "cuda", "copy_"}


class Asked(TorchFunctionMode):
    """Counts, while it is entered:

    Attributes:
        kernels: launches of our own kernels, by name.
        operations: launches of torch's, by name.
        uploads: copies from the host's memory for which nobody waits.
        waits: what the host waits for, by name: values read, and other copies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.uploads = 0
        self.waits: Counter[str] = Counter()

    def forget(self) -> None:
        """Begins to count anew."""
        self.kernels, self.operations, self.waits = Counter(), Counter(), Counter()
        self.uploads = 0

    def copy(self) -> Asked:
        """Returns what was counted so far."""
        other = Asked()
        other.kernels, other.operations = self.kernels.copy(), self.operations.copy()
        other.uploads, other.waits = self.uploads, self.waits.copy()
        return other

    @property
    def totals(self) -> dict[str, int]:
        """How many of each there were."""
        return {
            "kernels": self.kernels.total(),
            "operations": self.operations.total(),
            "uploads": self.uploads,
            "waits": self.waits.total(),
        }

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        there = [x for x in tensors if isinstance(x, OnDevice)]
        name = getattr(func, "__name__", "")
        if func in _ATTRIBUTES:
            return _ATTRIBUTES[func] if there else func(*args, **kwargs)
        if kwargs.pop("pin_memory", False):
            return self._plain(func, args, kwargs).as_subclass(Pinned)
        if name == "is_pinned":
            return isinstance(args[0], Pinned)
        wanted = self._device(args, kwargs)
        if name in _COPIES:
            self._copied(name, args, kwargs, wanted)
        elif there:
            self._used(name, args, tensors)
        if there and (name in _WAITS or (name == "repeat_interleave" and _repeats(args, kwargs))):
            self.waits[name] += 1
            return tree_map(_on_host, self._plain(func, args, kwargs))
        args, kwargs = tree_map(_on_cpu, (args, kwargs))
        result = self._plain(func, args, kwargs)
        if name in _MADE:
            result.zero_()  # or some policies would refuse what happened to be there
        if wanted == "cpu" or not (there or wanted):
            return result
        if name == "tensor":
            self.waits["tensor"] += 1  # whatever it is made of lies in any memory
        elif name not in _COPIES and name not in _MADE:
            self._launched(name, result, tensors, kwargs)
        return tree_map(lambda x: x.as_subclass(OnDevice) if isinstance(x, Tensor) else x, result)

    @staticmethod
    def _plain(func: Any, args: Any, kwargs: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @staticmethod
    def _device(args: Any, kwargs: Any) -> str | None:
        """Which device a call names."""
        for x in (kwargs.get("device"), *(args[1:] if args else ())):
            if isinstance(x, torch.device):
                return x.type
            if isinstance(x, str) and x in ("cpu", "cuda"):
                return x
        return None

    def _copied(self, name: str, args: Any, kwargs: Any, wanted: str | None) -> None:
        source, target = args[0], isinstance(args[0], OnDevice)
        if name == "copy_":
            source = args[1]
        elif wanted is not None:
            target = wanted == "cuda"
        if isinstance(source, OnDevice):
            if not target:
                self.waits["copy to the host"] += 1
            elif name == "copy_" or _converts(source, args, kwargs):
                self.operations[name] += 1
        elif target and kwargs.get("non_blocking"):
            # CUDA takes a copy of small memory that is not page-locked, and goes on.
            self.uploads += 1
        elif target:
            self.waits["copy from the host"] += 1

    def _used(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        others = [x for x in tensors if not isinstance(x, OnDevice) and x.dim()]
        if name in ("__getitem__", "__setitem__"):
            index = tree_flatten(args[1])[0]
            if any(isinstance(x, Tensor) and x.dtype == torch.bool for x in index):
                self.waits["index by truth values"] += 1
            if others:
                self.waits["index on the host"] += 1
        elif others:
            raise RuntimeError(f"{name}: tensors on the device, and others on the host")

    def _launched(self, name: str, result: Any, tensors: list[Tensor], kwargs: Any) -> None:
        before = {_memory(x) for x in tensors}
        made = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
        changed = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        if changed or "out" in kwargs or any(_memory(x) not in before for x in made):
            self.operations[name] += 1


def _memory(x: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return x.untyped_storage().data_ptr()


def _converts(source: Tensor, args: Any, kwargs: Any) -> bool:
    kinds = [x for x in (*args[1:], kwargs.get("dtype")) if isinstance(x, torch.dtype)]
    return bool(kinds) and kinds[0] != source.dtype


def _repeats(args: Any, kwargs: Any) -> bool:
    return isinstance(args[1], Tensor) and "output_size" not in kwargs


def _on_host(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, Tensor) else x


def _on_cpu(x: Any) -> Any:
    if isinstance(x, torch.device) and x.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(x, str) and x == "cuda" else x


def _run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    name = self.fn.__name__
    host = [i for i, x in enumerate(args) if isinstance(x, Tensor) and not x.is_cuda]
    assert not host, f"{name}: arguments {host} are in the host's memory"
    asked = _get_current_function_mode()
    assert isinstance(asked, Asked)
    asked.kernels[name] += 1


class _Staged:
    """vLLM's tensor for writes that are told to the device once a step: not a compaction's."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.gpu = torch.zeros(size, dtype=dtype, device=device)


@contextlib.contextmanager
def counted() -> Iterator[Asked]:
    """Counts what is asked of the device within. Tensors on it must be made within."""
    from vllm.utils import torch_utils

    from vllm_kvcrush.engine.worker import directory, move
    from vllm_kvcrush.ops.triton import attention

    with contextlib.ExitStack() as stack:
        for where, name, instead in (
            (JITFunction, "run", _run),
            (attention, "_processors", lambda device: PROCESSORS),
            (torch_utils, "is_pin_memory_available", lambda: True),
            (directory, "StagedWriteTensor", _Staged),
            (move, "get_tensor_model_parallel_world_size", lambda: 1),
            (move, "get_tensor_model_parallel_rank", lambda: 0),
        ):
            stack.enter_context(mock.patch.object(where, name, instead))
        yield stack.enter_context(Asked())


def impl(heads: int, size: int) -> types.SimpleNamespace:
    """What `pages_of` wants of a layer's attention."""
    return types.SimpleNamespace(head_size=size, scale=size**-0.5, num_heads=heads)
