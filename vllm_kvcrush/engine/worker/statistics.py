"""Transform tables without a file: statistics of the running model's own keys and queries,
taken when the server starts."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_kvcrush.codecs.transform.fit import Statistics
from vllm_kvcrush.codecs.transform.points import SINKS, TablesError
from vllm_kvcrush.codecs.transform.rope import Rope

# Packages that vLLM requires and whose descriptions are long: English with code and lists in it.
TEXTS = ("openai", "torch")
TOKENS = 4096  # tokens to read in all
# Tokens of one request: its first half is read twice in a row, because the second time queries
# look for what they have seen before, as a question over a context does.
PIECE = 512
_REQUEST = "vllm-kvcrush-statistics"


def text() -> str:
    """Returns the text to read: descriptions of installed packages, without paragraphs that have
    links or markup."""
    found = []
    for name in TEXTS:
        description = importlib.metadata.metadata(name).json.get("description", "")
        paragraphs = str(description).split("\n\n")
        plain = [p for p in paragraphs if "](" not in p and "<" not in p and "://" not in p]
        found.append("\n\n".join(plain)[:TOKENS])
    return "\n\n".join(found)


def pieces(model_config: Any, longest: int) -> list[list[int]]:
    """Returns the token ids of the requests to run, none longer than `longest`, or an empty list if
    that is too short."""
    half = min(PIECE, longest) // 2
    if half <= SINKS:
        return []
    tokenizer = cached_tokenizer_from_config(model_config)
    ids = tokenizer.encode(text(), add_special_tokens=False)[: TOKENS // 2]
    return [2 * ids[i : i + half] for i in range(0, len(ids) - half + 1, half)]


def scheduled(tokens: list[int], blocks: list[int]) -> SchedulerOutput:
    """Returns the scheduler's output of a step that reads one request whole.

    Args:
        tokens: the request's token ids.
        blocks: ids of its blocks.
    """
    params = SamplingParams(temperature=0.0, max_tokens=1)
    new = NewRequestData(
        req_id=_REQUEST,
        prompt_token_ids=tokens,
        mm_features=[],
        sampling_params=params,
        pooling_params=None,
        block_ids=(blocks,),
        num_computed_tokens=0,
        lora_request=None,
        prefill_token_ids=tokens,
    )
    return _step([new], {_REQUEST: len(tokens)}, set())


def finished() -> SchedulerOutput:
    """Returns the scheduler's output of a step that only ends the request."""
    return _step([], {}, {_REQUEST})


def _step(new: list[NewRequestData], tokens: dict[str, int], over: set[str]) -> SchedulerOutput:
    return SchedulerOutput(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=CachedRequestData.make_empty(),
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        finished_req_ids=over,
        free_encoder_mm_hashes=[],
    )


def gather(read: Iterator[tuple[Tensor, Tensor]], rope: Rope) -> Statistics:
    """Returns the moments over all tokens of all pieces, except the sinks. Each piece is a text
    twice in a row.

    Args:
        read: for each piece, queries [L, Hq, n, D] and keys [L, H, n, D], with RoPE.
        rope: the rotary embedding that the model's configuration describes.

    Raises:
        TablesError: the model does not have that rotary embedding, or there are no pieces.
    """
    total: Statistics | None = None
    count = 0
    for q, k in read:
        positions = torch.arange(k.shape[2])
        q, k = rope.rotate(q.float(), -positions), rope.rotate(k.float(), -positions)
        # A token's key in the first layer depends on nothing but its position.
        first, second = k[0].chunk(2, 1)
        if not (first - second).norm() < 0.05 * first.norm():
            raise TablesError(
                "the model's rotary embedding is not the one that its configuration describes to "
                "vllm-kvcrush: use int8 or int4."
            )
        new = Statistics.of(k[:, :, SINKS:], q[:, :, SINKS:])
        more = k.shape[2] - SINKS
        total = new if total is None else total.merged(new, count, more)
        count += more
    if total is None:
        raise TablesError(
            "the context or the KV cache is too short to take statistics of the model in: make "
            "tables with `vllm-kvcrush calibrate MODEL`, or use int8 or int4."
        )
    return total
