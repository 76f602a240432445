"""vLLM's CPU worker with our model runner."""

from __future__ import annotations

from typing import Any

import vllm.v1.worker.cpu_worker as cpu_worker


class KVCrushCPUWorker(cpu_worker.CPUWorker):
    """vLLM's CPU worker with our model runner. `CPUWorker` takes its runner's class from a module,
    so ours is put into that module while it looks."""

    def init_device(self) -> None:
        module, ours = self._runner()
        original = module.CPUModelRunner
        module.CPUModelRunner = ours
        try:
            super().init_device()
        finally:
            module.CPUModelRunner = original
        assert isinstance(self.model_runner, ours)

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self.model_runner.take_statistics()
        return times

    def _runner(self) -> tuple[Any, type]:
        """Returns the module in which `CPUWorker` looks, and the class that it is to find."""
        if self.use_v2_model_runner:
            import vllm.v1.worker.cpu.model_runner as v2

            from vllm_kvcrush.engine.worker.runner_v2 import KVCrushCPUModelRunnerV2

            return v2, KVCrushCPUModelRunnerV2
        from vllm_kvcrush.engine.worker.runner_v1 import KVCrushCPUModelRunner

        return cpu_worker, KVCrushCPUModelRunner
