"""vLLM's CPU worker with our model runner."""

from __future__ import annotations

import vllm.v1.worker.cpu_worker as cpu_worker

from vllm_kvcrush.engine.runner import KVCrushCPUModelRunner


class KVCrushCPUWorker(cpu_worker.CPUWorker):
    """`CPUWorker` takes its runner class from its module, so it is put there while it looks."""

    def init_device(self) -> None:
        original = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = KVCrushCPUModelRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = original
        assert isinstance(self.model_runner, KVCrushCPUModelRunner)
