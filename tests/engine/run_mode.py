"""One engine in a process of its own, for modes that need other start-up options.

stdin: {"engine": LLM arguments, "async": bool, "jobs": [{"prompts", "max_tokens", "extra",
"lora"}]}; stdout: one line RESULT with the tokens of every job and what was compacted.
"""

import json
import sys


def force_async_scheduling() -> None:
    """Makes vLLM schedule asynchronously. It does not do so on CPUs, where it gains nothing, but
    it works there too."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_kvcrush import plugin

    create = EngineArgs.create_engine_config

    def create_engine_config(self, *args, **kwargs):
        vllm_config = create(self, *args, **kwargs)
        vllm_config.scheduler_config.async_scheduling = True
        if self.additional_config:
            plugin.choose_scheduler(vllm_config)
        return vllm_config

    EngineArgs.create_engine_config = create_engine_config


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(**job["engine"])  # loads the plugin
    results = []
    for part in job["jobs"]:
        lora = LoRARequest("adapter", 1, part["lora"]) if part.get("lora") else None
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in part["prompts"]],
            [
                SamplingParams(
                    temperature=0,
                    max_tokens=part["max_tokens"],
                    ignore_eos=True,
                    extra_args=extra or None,
                )
                for extra in part["extra"]
            ],
            lora_request=lora,
            use_tqdm=False,
        )
        results.append(
            [
                {
                    "tokens": list(o.outputs[0].token_ids),
                    "details": getattr(o, "kv_tokens_details", None),
                }
                for o in outputs
            ]
        )
    config = llm.llm_engine.vllm_config
    print(
        "RESULT",
        json.dumps(
            {
                "jobs": results,
                "scheduler": str(config.scheduler_config.scheduler_cls),
                "async": bool(config.scheduler_config.async_scheduling),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    sys.stdin = open(sys.argv[1])  # noqa: SIM115
    if "--async" in sys.argv:
        force_async_scheduling()
    main()
