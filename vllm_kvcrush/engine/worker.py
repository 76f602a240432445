"""vLLM's CPU worker with our model runner."""

from __future__ import annotations

from typing import Any

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

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self.model_runner.take_statistics()
        return times
