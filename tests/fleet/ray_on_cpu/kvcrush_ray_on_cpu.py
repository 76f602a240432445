"""A platform for vLLM: CPUs, of which each rank asks Ray for one under the name of a GPU.

vLLM's own CPU platform has no name for them, and its Ray executor refuses such a platform. Ray is
told of GPUs that are not there, and hands out numbers, of which a CPU worker makes no use.
"""

from vllm.platforms.cpu import CpuPlatform


class RayOnCpu(CpuPlatform):
    ray_device_key = "GPU"


def platform() -> str:
    """Returns the name of the class, as vLLM wants it."""
    return f"{__name__}.RayOnCpu"
