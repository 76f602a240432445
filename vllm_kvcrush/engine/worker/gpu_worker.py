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
