"""The backend's driver: Triton takes the one concrete subclass of its `DriverBase`."""

from typing import Any

import triton.backends.driver as base
from triton.backends.compiler import GPUTarget


class CPUDriver(base.DriverBase):
    """A device that is always there."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("interpreted kernels are not worth timing")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0
