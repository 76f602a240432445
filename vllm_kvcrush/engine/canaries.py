"""How the scheduler treats canaries: requests of our own that score the last tokens of a finished
request with exact KV (server/canary.py). Pure.

A canary runs alone: it ends as soon as anybody else is there. A step cannot be interrupted, so
its steps are short, which also bounds the logits that vLLM computes for the scores of a prompt.
"""

from __future__ import annotations

from typing import Any

from vllm_kvcrush.config import CANARY_KEY

# Most tokens of a canary that one step computes: somebody who comes meanwhile waits for it.
MOST_TOKENS = 64


def scored(extra_args: Any) -> int:
    """Returns how many of a request's last tokens are scored; 0 if it is no canary."""
    value = extra_args.get(CANARY_KEY) if isinstance(extra_args, dict) else None
    return value if isinstance(value, int) else 0


def first_row(num_tokens: int, scored: int) -> int:
    """Returns the position whose logits score the first of the last `scored` of `num_tokens`
    tokens. The prefix cache may have what comes before it."""
    return num_tokens - scored - 1
