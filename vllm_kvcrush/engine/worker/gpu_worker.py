"""vLLM's GPU worker with our model runner. In a module of its own, because vLLM's CPU worker, when
it is imported, replaces parts of torch."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from vllm_kvcrush.engine.worker.runner_v2 import KVCrushGPUModelRunnerV2


class KVCrushGPUWorker(Worker):
    """vLLM's GPU worker with our model runner, of which there is only a V2 one."""

    def _make_model_runner(self) -> Any:
        assert self.use_v2_model_runner, "the gate refuses V1 on GPUs"
        return KVCrushGPUModelRunnerV2(self.vllm_config, self.device)

    def determine_available_memory(self) -> int:
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes:
            return available  # by the user, who knows what else there is
        return self.model_runner.left_for_pool(available)

    def compile_or_warm_up_model(self) -> Any:
        # Before graphs are captured, which would keep the addresses of tables that are to come.
        self.model_runner.take_statistics()
        return super().compile_or_warm_up_model()
