"""Greedy tokens from plain vLLM: one JSON request a line on stdin, one RESULT line each."""

import json
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        sys.argv[1],
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_model_len=int(sys.argv[2]),
        kv_cache_memory_bytes=512 * 2**20,
        max_num_batched_tokens=512,
    )
    assert llm.llm_engine.vllm_config.additional_config == {}
    for line in sys.stdin:
        job = json.loads(line)
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in job["prompts"]],
            SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True),
            use_tqdm=False,
        )
        print("RESULT", json.dumps([list(o.outputs[0].token_ids) for o in outputs]), flush=True)
