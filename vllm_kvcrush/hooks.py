"""Every name of vLLM that this package relies on, and the reason.

vLLM has no public interface for what we do, so each of its releases may break us. This table is
compared with vLLM's source, without importing it: when a server is started with a policy (a
mismatch refuses the start), by `vllm-kvcrush doctor --hooks [SOURCE]`, and by a test, which also
fails if this package uses a name that is not in the table. What differs between the releases that
we support is in `compat`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

Kind = Literal["import", "call", "wrap", "override", "subclass", "attribute"]


class Hook(NamedTuple):
    """One name of vLLM that this package relies on.

    Attributes:
        kind: "import" for a class or value that we import; "call" for a function, method or
            constructor that we call; "wrap" for a function or method that we wrap in another one;
            "override" for a method that our subclass overrides; "subclass" for a class that ours,
            or a mixin, inherits from; "attribute" for an attribute that we read or set.
        module: the module that we import it from, or that its class is in.
        name: the name in the module, with the class before a method or attribute.
        parameters: parameters of a function without `self`, as in "a, b=, *, c, ...", or None for
            any. Those before `*` go by position, so vLLM's must begin with them; those after it go
            by name. `=` marks one that vLLM may lack. With `...` there may be others, which we pass
            on; without it, a function that we call must require no others, and one that we override
            must have no others.
        why: what we need it for.
        since, until: first and last release in which we need it, such as (0, 33), or None.
    """

    kind: Kind
    module: str
    name: str
    parameters: str | None
    why: str
    since: tuple[int, int] | None = None
    until: tuple[int, int] | None = None

    @property
    def private(self) -> bool:
        """Returns whether an underscore in the name says that vLLM may change it at any time."""
        parts = [*self.module.split("."), *self.name.split(".")]
        return any(p.startswith("_") and not p.startswith("__") for p in parts)

    def __str__(self) -> str:
        return self.name if self.parameters is None else f"{self.name}({self.parameters})"


class _In:
    """Makes the hooks of one module."""

    def __init__(self, module: str):
        self._module = module

    def __call__(
        self,
        kind: Kind,
        text: str,
        why: str,
        since: tuple[int, int] | None = None,
        until: tuple[int, int] | None = None,
    ) -> Hook:
        name, _, parameters = text.partition("(")
        given = parameters.rstrip(")") if "(" in text else None
        return Hook(kind, self._module, name, given, why, since, until)

    def reads(self, owner: str, names: str, why: str) -> Iterator[Hook]:
        """Yields hooks of several attributes of the class `owner`, or, if that is "", of the
        module."""
        for name in names.split():
            yield Hook("attribute", self._module, f"{owner}.{name}".lstrip("."), None, why)


def _table() -> Iterator[Hook]:
    yield from _start_up()
    yield from _gate()
    yield from _scheduler()
    yield from _canary()
    yield from _worker()
    yield from _attention()
    yield from _front_end()
    yield from _endpoints()
    yield from _rendering()
    yield from _live_page()
    yield from _tracing()


def _start_up() -> Iterator[Hook]:
    at = _In("vllm.engine.arg_utils")
    yield at("import", "EngineArgs", "The one place through which flags become a configuration.")
    yield at("wrap", "EngineArgs.add_cli_args(parser)", "Adds our flags.")
    yield at("wrap", "EngineArgs.from_cli_args(args)", "Takes our flags.")
    yield at(
        "wrap",
        "EngineArgs.create_engine_config(usage_context=, ...)",
        "Checks settings before vLLM makes a configuration, and activates the plugin after.",
    )
    yield at("wrap", "EngineArgs.__init__", "Refuses settings that nobody would follow.")
    yield at("attribute", "EngineArgs.additional_config", "Carries our settings.")
    at = _In("vllm.utils.argparse_utils")
    yield at("import", "FlexibleArgumentParser", "Parses the command lines of all of vLLM's tools.")
    yield at(
        "wrap",
        "FlexibleArgumentParser.parse_args(...)",
        "Moves our flags into additional_config, where other processes find them.",
    )

    at = _In("vllm.config")
    yield from at.reads(
        "VllmConfig",
        "additional_config cache_config device_config model_config parallel_config "
        "scheduler_config",
        "What a server was started with.",
    )
    why = "Page sizes, plans and tables follow from the model."
    yield from at.reads(
        "ModelConfig", "dtype hf_text_config max_model_len skip_tokenizer_init", why
    )
    yield at("call", "ModelConfig.get_head_size()", why)
    yield at("call", "ModelConfig.get_num_kv_heads(parallel_config)", why)
    yield from at.reads("ModelConfig", "served_model_name", "Label of metrics.")
    yield from at.reads("ModelConfig", "logprobs_mode", "Canaries compare log-probabilities.")
    yield from at.reads(
        "CacheConfig", "block_size user_specified_block_size", "Fixes the size of a block early."
    )
    yield from at.reads("CacheConfig", "num_gpu_blocks", "Refuses what no pool could hold.")
    yield from at.reads(
        "CacheConfig", "kv_cache_memory_bytes", "Leaves the pool alone that the user sized."
    )
    yield from at.reads("DeviceConfig", "device_type", "CPUs have blocks of another size.")
    yield from at.reads(
        "ParallelConfig", "worker_cls", "Our workers in place of vLLM's, by their dotted names."
    )
    yield from at.reads(
        "SchedulerConfig",
        "scheduler_cls async_scheduling",
        "Our scheduler in place of the one that vLLM would take.",
    )
    yield from at.reads(
        "ParallelConfig",
        "_api_process_count _api_process_rank",
        "Of several API servers the first one says what is active.",
    )
    yield from at.reads(
        "ParallelConfig",
        "tensor_parallel_size data_parallel_size data_parallel_size_local "
        "data_parallel_rank_local local_engines_only",
        "Bytes of all ranks, and blocks of one engine.",
    )


def _gate() -> Iterator[Hook]:
    # If one of these goes, what it tells must be asked in another way: the gate cannot fail open.
    why = "The gate refuses what was not verified."
    at = _In("vllm.config")
    yield from at.reads(
        "VllmConfig",
        "diffusion_config kv_events_config kv_transfer_config speculative_config "
        "use_v2_model_runner watermark_config",
        why,
    )
    yield from at.reads(
        "ModelConfig",
        "attention_chunk_size enforce_eager is_attention_free is_diffusion is_encoder_decoder "
        "is_hybrid is_multimodal_model runner_type use_mla uses_alibi",
        why,
    )
    yield from at.reads("VllmConfig", "lora_config", _REPEAT)
    yield from at.reads("ModelConfig", "enable_prompt_embeds", _REPEAT)
    yield at("call", "ModelConfig.get_sliding_window()", why)
    yield from at.reads(
        "CacheConfig",
        "cache_dtype hash_block_size kv_offloading_size kv_sharing_fast_prefill prefix_match_unit",
        why,
    )
    yield from at.reads(
        "ParallelConfig",
        "decode_context_parallel_size enable_dbo pipeline_parallel_size "
        "prefill_context_parallel_size ubatch_size",
        why,
    )
    yield from at.reads("SchedulerConfig", "enable_chunked_prefill", why)
    yield from at.reads("KVTransferConfig", "kv_connector", why)
    yield from at.reads("KVEventsConfig", "enable_kv_cache_events", why)
    yield from _In("vllm.envs").reads("", "VLLM_USE_RUST_FRONTEND VLLM_USE_V2_MODEL_RUNNER", why)

    why = "The gate refuses layers that do what our attention does not."
    at = _In("vllm.model_executor.layers.attention")
    yield from at.reads(
        "Attention",
        "attn_type dtype has_sink head_size head_size_v kv_cache_torch_dtype "
        "kv_sharing_target_layer_name sliding_window use_mm_prefix",
        why,
    )
    for module, owner in (
        ("cpu_attn", "CPUAttentionBackendImpl"),
        ("triton_attn", "TritonAttentionImpl"),
    ):
        yield from _In(f"vllm.v1.attention.backends.{module}").reads(
            owner, "alibi_slopes attn_type logits_soft_cap sinks sliding_window", why
        )
    yield from _In("vllm.v1.attention.backends.triton_attn").reads(
        "TritonAttentionImpl", "chunk_lookback", why
    )


def _scheduler() -> Iterator[Hook]:
    at = _In("vllm.v1.core.sched.scheduler")
    yield at("subclass", "Scheduler", "Compactions are decided where blocks are given out.")
    yield at("override", "Scheduler.__init__(...)", "Plans and counters of our own.")
    yield at("override", "Scheduler.add_request(request)", "Makes a request's plan.")
    yield at(
        "override",
        "Scheduler.schedule(throttle_prefills=)",
        "Compacts what is due before vLLM gives out blocks; tells workers with the output.",
    )
    yield at(
        "override",
        "Scheduler._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)",
        "Ends a chunk of a prompt where a compaction is due: vLLM asks this of every chunk.",
    )
    yield at(
        "override",
        "Scheduler._get_local_prefix_cache_hit(request)",
        "Keeps what a policy must see computed out of the prefix cache's hits.",
        until=(0, 32),
    )
    yield at(
        "override",
        "Scheduler._get_local_prefix_cache_hit(request, max_cache_hit_length)",
        "Keeps what a policy must see computed out of the prefix cache's hits.",
        since=(0, 33),
    )
    yield at(
        "override",
        "Scheduler._preempt_request(request, ...)",
        "A preempted request is compacted again; what it shared comes free.",
    )
    yield at(
        "override",
        "Scheduler._free_request(request, ...)",
        "Forgets a request, and tells its client what it held.",
    )
    yield at(
        "override",
        "Scheduler.update_from_output(scheduler_output, model_runner_output)",
        "Takes the workers' reports; tells clients what a request holds.",
    )
    yield at("override", "Scheduler.make_stats(...)", "Our numbers travel with vLLM's.")
    why = "What the scheduler knows."
    yield from at.reads(
        "Scheduler",
        "kv_cache_config kv_cache_manager max_model_len requests running vllm_config",
        why,
    )
    why = "What the next step will ask of the pool, for --kv-pressure."
    yield from at.reads(
        "Scheduler", "max_num_active_reqs max_num_scheduled_tokens scheduler_config waiting", why
    )
    yield from _In("vllm.v1.request").reads(
        "Request", "num_tokens_with_spec num_output_placeholders", why
    )
    yield from _In("vllm.config").reads("SchedulerConfig", "long_prefill_token_threshold", why)
    yield _In("vllm.v1.core.sched.request_queue")("call", "RequestQueue.peek_request()", why)
    at = _In("vllm.v1.core.sched.async_scheduler")
    yield at("subclass", "AsyncScheduler", "The same for asynchronous scheduling.")

    at = _In("vllm.v1.core.sched.output")
    yield at("call", "SchedulerOutput(*, " + ", ".join(_OUTPUT) + ")", _STATISTICS)
    yield at("call", "NewRequestData(*, " + ", ".join(_NEW_REQUEST) + ")", _STATISTICS)
    yield at("import", "CachedRequestData", _STATISTICS)
    yield at("call", "CachedRequestData(*, " + ", ".join(_CACHED_REQUEST) + ")", _STATISTICS)
    yield at("call", "CachedRequestData.make_empty()", _STATISTICS)
    yield from at.reads(
        "SchedulerOutput",
        "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens finished_req_ids "
        "preempted_req_ids total_num_scheduled_tokens",
        "Which requests come, go, and are in a step; it carries our commands to workers.",
    )
    yield from at.reads("NewRequestData", "req_id", "Requests that are new to workers.")
    yield from at.reads(
        "CachedRequestData", "resumed_req_ids", "Requests that workers must take up again."
    )

    at = _In("vllm.v1.request")
    yield at("import", "Request", "What the scheduler's methods are given.")
    yield from at.reads(
        "Request",
        "request_id sampling_params num_prompt_tokens num_computed_tokens num_tokens max_tokens "
        "resumable prompt_embeds block_hashes all_token_ids",
        "Plans follow from a request's lengths; which requests are copies, from its tokens.",
    )
    at = _In("vllm.v1.metrics.stats")
    yield at("import", "SchedulerStats", "What `make_stats` gives.")
    yield at(
        "attribute",
        "SchedulerStats.kv_connector_stats",
        "The one free-form field that reaches API servers: carries our numbers.",
    )

    at = _In("vllm.v1.core.kv_cache_manager")
    yield at("import", "KVCacheBlocks", "What a look-up in the prefix cache gives.")
    yield from at.reads("KVCacheManager", "block_pool coordinator", "The way to the blocks.")
    yield at(
        "call",
        "KVCacheManager.truncate_computed_blocks(blocks, num_computed_tokens)",
        "Cuts a hit of the prefix cache.",
        until=(0, 32),
    )
    at = _In("vllm.v1.core.kv_cache_coordinator")
    yield from at.reads("KVCacheCoordinator", "single_type_managers", "The way to our manager.")

    at = _In("vllm.v1.core.single_type_kv_cache_manager")
    yield at("subclass", "FullAttentionManager", "Block counts follow from slots, not from tokens.")
    yield at("override", "FullAttentionManager.__init__(...)", "Slot shifts of our own.")
    why = "Subtracts the tokens whose slots are gone."
    yield at(
        "override",
        "FullAttentionManager.get_num_blocks_to_allocate(request_id, num_tokens, ...)",
        why,
    )
    yield at(
        "attribute",
        "FullAttentionManager.get_num_blocks_to_allocate",
        "Given `apply_admission_cap`, counts on the plan's bound.",
    )
    yield at(
        "override",
        "FullAttentionManager.allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)",
        why,
    )
    yield at(
        "override",
        "FullAttentionManager.cache_blocks(request, num_tokens, ...)",
        "After a compaction no block is hashed.",
    )
    yield at(
        "override",
        "FullAttentionManager.pop_blocks_for_free(request_id)",
        "The one way out for finish, abort and preemption.",
    )
    yield from at.reads(
        "FullAttentionManager", "block_pool block_size req_to_blocks", "Its blocks."
    )

    at = _In("vllm.v1.core.block_pool")
    why = "Compactions take blocks and give others back."
    yield at("call", "BlockPool.get_num_free_blocks()", why)
    yield at("call", "BlockPool.get_new_blocks(num_blocks)", why)
    yield at("call", "BlockPool.free_blocks(ordered_blocks)", why)
    yield at("call", "BlockPool.evict_blocks(block_ids)", why)
    yield at("call", "BlockPool.touch(blocks)", why)
    yield from at.reads("BlockPool", "blocks", "The live page's map.")
    at = _In("vllm.v1.core.kv_cache_utils")
    yield at("import", "KVCacheBlock", "What a request's list of blocks has.")
    yield from at.reads(
        "KVCacheBlock", "block_id ref_cnt block_hash", "Never writes what others can see."
    )

    at = _In("vllm.v1.kv_cache_interface")
    yield at(
        "subclass", "FullAttentionSpec", "Marks the layers whose blocks our manager gives out."
    )
    yield at(
        "override",
        "FullAttentionSpec.max_memory_usage_bytes(vllm_config)",
        "A pool may be smaller than one raw request.",
    )
    yield from at.reads("FullAttentionSpec", "block_size page_size_bytes num_kv_heads", "Sizes.")
    yield at("import", "KVCacheSpec", "What a runner tells of its layers.")
    yield from at.reads(
        "KVCacheConfig", "kv_cache_groups kv_cache_tensors num_blocks", "Bytes of a block."
    )
    yield from at.reads("KVCacheGroupSpec", "layer_names kv_cache_spec", "Layers of a block.")
    yield from at.reads("KVCacheTensor", "size", "Bytes of a block.")
    at = _In("vllm.v1.kv_cache_spec_registry")
    yield at("import", "KVCacheSpecRegistry", "Where managers are found by their specs.")
    yield at(
        "call",
        "KVCacheSpecRegistry._ensure_registered()",
        "vLLM's own are registered only while the list is empty: lets them go first.",
    )
    yield at(
        "call",
        "KVCacheSpecRegistry.register(kvcache_spec_cls, manager_class, *, uniform_type_base_spec)",
        "Our manager for our spec.",
    )


_REPEAT = "The model reads a context again, for policies that need that."
_STATISTICS = "Steps of our own, in which workers take statistics for transform tables."
_OUTPUT = (
    "scheduled_new_reqs",
    "scheduled_cached_reqs",
    "num_scheduled_tokens",
    "total_num_scheduled_tokens",
    "scheduled_spec_decode_tokens",
    "scheduled_encoder_inputs",
    "finished_req_ids",
    "free_encoder_mm_hashes",
)
_NEW_REQUEST = (
    "req_id",
    "prompt_token_ids",
    "mm_features",
    "sampling_params",
    "pooling_params",
    "block_ids",
    "num_computed_tokens",
    "lora_request",
    "prefill_token_ids",
)


_CACHED_REQUEST = (
    "req_ids",
    "resumed_req_ids",
    "new_token_ids",
    "all_token_ids",
    "new_block_ids",
    "num_computed_tokens",
    "num_output_tokens",
)


def _worker() -> Iterator[Hook]:
    at = _In("vllm.v1.worker.cpu_worker")
    yield at("subclass", "CPUWorker", "vLLM's worker on CPUs, with our runner.")
    yield at("override", "CPUWorker.init_device()", "Puts our runner where it looks for one.")
    yield at(
        "override",
        "CPUWorker.compile_or_warm_up_model()",
        "Takes statistics before there are requests.",
    )
    yield from at.reads("CPUWorker", "model_runner use_v2_model_runner", "Which runner it has.")
    yield at("attribute", "CPUModelRunner", "Where it looks for the V1 runner.")
    at = _In("vllm.v1.worker.gpu_worker")
    yield at("subclass", "Worker", "vLLM's worker on GPUs, with our runner.")
    yield at("override", "Worker._make_model_runner()", "Makes ours.")
    yield at(
        "override",
        "Worker.determine_available_memory()",
        "Leaves free what lies beside the pool.",
    )
    yield at(
        "override",
        "Worker.compile_or_warm_up_model()",
        "Takes statistics before there are graphs.",
    )
    yield from at.reads(
        "Worker",
        "cache_config device model_runner use_v2_model_runner vllm_config",
        "For our runner.",
    )

    at = _In("vllm.v1.worker.cpu_model_runner")
    yield at("subclass", "CPUModelRunner", "The V1 runner on CPUs.")
    why = "Compactions run before the step that they belong to."
    yield at(
        "override",
        "CPUModelRunner.execute_model(scheduler_output, intermediate_tensors=)",
        why,
    )
    yield at(
        "override",
        "CPUModelRunner._prepare_inputs(scheduler_output, num_scheduled_tokens)",
        "Shifts slots and lengths; positions stay true.",
    )
    yield at(
        "override", "CPUModelRunner._model_forward(...)", "Keeps queries after each forward pass."
    )
    yield at(
        "override",
        "CPUModelRunner.sample_tokens(grammar_output)",
        "Reports to the scheduler; keeps seeds of unfinished prompts from CPU generators.",
    )
    yield from at.reads(
        "CPUModelRunner",
        "discard_request_mask input_batch optimistic_seq_lens_cpu positions query_start_loc "
        "requests seq_lens",
        "The batch of a step, as attention will see it.",
    )
    yield from at.reads("CPUModelRunner", "input_ids model", _REPEAT)
    yield from _runner(at, "CPUModelRunner")
    at = _In("vllm.v1.worker.gpu_input_batch")
    yield from at.reads(
        "InputBatch",
        "req_ids req_id_to_index num_computed_tokens_cpu num_reqs generators block_table",
        "The V1 batch.",
    )
    yield from at.reads("CachedRequestState", "block_ids", "Replaced by a compaction.")
    yield at("call", "CachedRequestState.get_token_id(idx)", _REPEAT)
    at = _In("vllm.v1.worker.block_table")
    yield at("call", "MultiGroupBlockTable.add_row(block_ids, row_idx)", "Installs blocks.")
    yield at(
        "call",
        "MultiGroupBlockTable.compute_slot_mapping(num_reqs, query_start_loc, positions)",
        "Slots of a step.",
    )
    yield from _In("vllm.v1.worker.gpu_model_runner").reads(
        "AsyncGPUModelRunnerOutput", "_model_runner_output", "Our report rides on the inner one."
    )

    at = _In("vllm.v1.worker.cpu.model_runner")
    yield at("subclass", "CPUModelRunner", "The V2 runner on CPUs.")
    yield at("attribute", "CPUModelRunner", "Where the CPU worker looks for it.")
    at = _In("vllm.v1.worker.gpu.model_runner")
    yield at("subclass", "GPUModelRunner", "The V2 runner.")
    yield at(
        "override",
        "GPUModelRunner.execute_model(scheduler_output, intermediate_tensors=, dummy_run=, ...)",
        why,
    )
    yield at(
        "override",
        "GPUModelRunner._remove_request(req_id)",
        "Every way out of a batch: its state goes to another request.",
    )
    yield at(
        "override",
        "GPUModelRunner.update_requests(scheduler_output)",
        "Compacts between the requests that go and the blocks that come.",
    )
    yield at(
        "override",
        "GPUModelRunner.prepare_attn(input_batch)",
        "Gives attention shifted slots and lengths.",
    )
    yield at("override", "GPUModelRunner.sample_tokens(grammar_output)", "Reports.")
    yield from at.reads(
        "GPUModelRunner",
        "attn_groups block_tables max_num_reqs model_state req_states",
        "States of requests, to which slot shifts belong.",
    )
    yield from _In("vllm.v1.worker.utils").reads(
        "AttentionGroup", "metadata_builders", "Where attention finds the pages of all requests."
    )
    yield from _runner(at, "GPUModelRunner")
    at = _In("vllm.v1.worker.gpu.states")
    yield from at.reads("RequestState", "req_id_to_index", "A request's state.")
    at = _In("vllm.v1.worker.gpu.block_table")
    yield at(
        "call",
        "BlockTables.append_block_ids(req_index, new_block_ids, *, overwrite)",
        "Installs the blocks of a compacted request.",
    )
    at = _In("vllm.v1.worker.gpu.buffer_utils")
    yield at("call", "StagedWriteTensor(size, dtype, device)", "Slot shifts on the device.")
    yield at("call", "StagedWriteTensor.stage_write_elem(index, x)", "Slot shifts on the device.")
    yield at("call", "StagedWriteTensor.apply_write()", "Slot shifts on the device.")
    yield from at.reads("StagedWriteTensor", "gpu", "Slot shifts on the device.")
    at = _In("vllm.v1.worker.gpu.input_batch")
    yield at("import", "InputBatch", "The V2 batch.")
    yield from at.reads(
        "InputBatch",
        "req_ids idx_mapping idx_mapping_np num_computed_tokens_np num_reqs "
        "num_reqs_after_padding num_scheduled_tokens num_tokens_after_padding positions "
        "query_start_loc seq_lens seq_lens_cpu_upper_bound",
        "The V2 batch, of which attention gets a copy with other slots and lengths.",
    )
    at = _In("vllm.v1.worker.gpu.model_states.default")
    yield at("subclass", "DefaultModelState", "Makes attention's metadata from the batch.")
    yield at(
        "override",
        "DefaultModelState.prepare_attn(input_batch, ...)",
        "Makes it from slots held instead.",
    )
    yield from _In("vllm.v1.worker.gpu.async_utils").reads(
        "AsyncOutput", "model_runner_output", "Our report rides on the inner one."
    )

    at = _In("vllm.config")
    yield at(
        "call",
        "get_layers_from_vllm_config(vllm_config, layer_type)",
        "All attention layers of a loaded model.",
    )
    at = _In("vllm.model_executor.layers.attention")
    yield at("import", "Attention", "The layers that have a KV cache.")
    yield from at.reads(
        "Attention", "attn_backend impl kv_cache", "Our attention in place of vLLM's."
    )
    at = _In("vllm.model_executor.models.utils")
    yield at("call", "extract_layer_index(layer_name)", "Which transform tables a layer has.")
    at = _In("vllm.distributed")
    yield at("call", "get_tensor_model_parallel_rank()", "Which heads are this rank's.")
    yield at("call", "get_tensor_model_parallel_world_size()", "Whether ranks must agree.")
    yield at("call", "get_tp_group()", "Tells other ranks of a policy's scores and failures.")
    at = _In("vllm.distributed.parallel_state")
    yield at("call", "GroupCoordinator.all_gather(input_, *, dim)", "Scores of all heads.")
    yield at("call", "GroupCoordinator.broadcast_object(obj, *, src)", _STATISTICS)
    yield from at.reads("GroupCoordinator", "cpu_group world_size", "Agreement between ranks.")
    at = _In("vllm.utils.torch_utils")
    yield at("call", "async_tensor_h2d(data, *, device, out)", "Copies without waiting.")
    at = _In("vllm.logger")
    yield at("call", "init_logger(name)", "Lines that show in vLLM's log.")
    at = _In("vllm.tokenizers")
    yield at("call", "cached_tokenizer_from_config(model_config)", _STATISTICS)
    at = _In("vllm.forward_context")
    yield at(
        "call",
        "set_forward_context(attn_metadata, vllm_config, num_tokens, *, slot_mapping)",
        _REPEAT,
    )


def _runner(at: _In, owner: str) -> Iterator[Hook]:
    yield at("override", f"{owner}.__init__(vllm_config, device)", "State of our own.")
    yield at("override", f"{owner}.load_model(...)", "Our attention in place of vLLM's.")
    yield at("override", f"{owner}.get_kv_cache_spec()", "Our spec in place of vLLM's.")
    yield at(
        "override",
        f"{owner}.initialize_kv_cache(kv_cache_config, ...)",
        "Describes the cache to our kernels.",
    )
    yield at("call", f"{owner}.get_model()", "What it says over compressed KV, for losses.")
    yield from at.reads(
        owner,
        "cache_config compilation_config device max_num_tokens model_config parallel_config "
        "vllm_config",
        "Sizes, and where to compute.",
    )
    yield from _In("vllm.config").reads(
        "CompilationConfig", "static_forward_context", "The layers by their names."
    )


def _attention() -> Iterator[Hook]:
    at = _In("vllm.v1.attention.backend")
    graphs = "Graphs of decode steps only."
    yield at("subclass", "AttentionMetadataBuilder", "What our attention needs to know of a step.")
    yield at(
        "override",
        "AttentionMetadataBuilder.__init__(kv_cache_spec, layer_names, vllm_config, device)",
        "The regions of a step.",
    )
    yield at(
        "override",
        "AttentionMetadataBuilder.build(common_prefix_len, common_attn_metadata, fast_build=)",
        "Adds requests' regions to lengths and block tables.",
    )
    yield at(
        "override",
        "AttentionMetadataBuilder.get_cudagraph_support(vllm_config, kv_cache_spec)",
        graphs,
    )
    yield at(
        "override",
        "AttentionMetadataBuilder.build_for_cudagraph_capture(common_attn_metadata)",
        "A graph must know all kinds of pages.",
    )
    yield from at.reads("AttentionMetadataBuilder", "kv_cache_spec", "Sizes.")
    yield at("import", "AttentionCGSupport", graphs)
    yield at("attribute", "AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE", graphs)
    yield at("import", "CommonAttentionMetadata", "What vLLM knows of a step.")
    yield from at.reads(
        "CommonAttentionMetadata",
        "block_table_tensor max_query_len num_actual_tokens num_reqs query_start_loc seq_lens "
        "slot_mapping",
        "What vLLM knows of a step.",
    )
    yield at("call", "MultipleOf(base)", "Block sizes that our kernels take.")

    forward = (
        "forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale=, "
        "output_block_scale=)"
    )
    for module, backend, impl in (
        ("cpu_attn", "CPUAttentionBackend", "CPUAttentionBackendImpl"),
        ("triton_attn", "TritonAttentionBackend", "TritonAttentionImpl"),
    ):
        at = _In(f"vllm.v1.attention.backends.{module}")
        yield at("subclass", backend, "A layer's backend, with our attention.")
        yield at(
            "override",
            f"{backend}.supported_kv_cache_layouts()",
            "All layers' pages of a block lie together.",
        )
        yield at("override", f"{backend}.get_impl_cls()", "Our attention.")
        yield at("override", f"{backend}.get_builder_cls()", "Our metadata.")
        yield at(
            "override",
            f"{backend}.forward_includes_kv_cache_update",
            "Our attention stores keys and values itself.",
        )
        yield at("subclass", impl, "A layer's attention: becomes ours when the model is loaded.")
        yield at("override", f"{impl}.{forward}", "Stores and attends with our kernels.")
        yield from at.reads(
            impl, "head_size num_heads num_kv_heads scale", "What our kernels need to know."
        )
    at = _In("vllm.v1.attention.backends.cpu_attn")
    yield at(
        "override",
        "CPUAttentionBackend.get_supported_kernel_block_sizes(kv_cache_spec=)",
        "Our kernels take more sizes than vLLM's.",
    )
    at = _In("vllm.v1.kv_cache_interface")
    yield at("import", "KVCacheLayout", "All layers' pages of a block lie together.")
    yield at("attribute", "KVCacheLayout.BLHNC", "All layers' pages of a block lie together.")


def _front_end() -> Iterator[Hook]:
    at = _In("vllm.v1.engine.async_llm")
    yield at("import", "AsyncLLM", "Through which a server's requests enter the engine.")
    constructed = "Wraps the rest of the front end once an engine is made."
    yield at("wrap", "AsyncLLM.__init__(*, vllm_config, ...)", constructed)
    yield at(
        "wrap",
        "AsyncLLM.generate(*, prompt, sampling_params, lora_request=, ...)",
        "Refuses bad parameters in time for an HTTP 400.",
    )
    ready = "Checks requests that their caller made, which pass by the input processor."
    yield at("wrap", "AsyncLLM.add_request(*, prompt, ...)", ready)
    yield from at.reads("AsyncLLM", "input_processor", "What checked requests.")
    at = _In("vllm.v1.engine.llm_engine")
    yield at("import", "LLMEngine", "Through which requests of `LLM` enter the engine.")
    yield at("wrap", "LLMEngine.__init__(*, vllm_config, ...)", constructed)
    yield at("wrap", "LLMEngine.add_request(*, prompt, ...)", ready)
    at = _In("vllm.v1.engine.input_processor")
    yield at("import", "InputProcessor", "Which all requests pass that are not made by hand.")
    yield at(
        "wrap", "InputProcessor._validate_params(params, ...)", "Refuses bad parameters at last."
    )
    yield at(
        "wrap",
        "InputProcessor.process_inputs(*, params, ...)",
        "Knows a prompt's length, refuses what no pool could hold, and counts requests.",
    )
    yield from at.reads("InputProcessor", "vllm_config", "What parameters are checked against.")
    at = _In("vllm.v1.engine")
    yield at("import", "EngineCoreRequest", ready)
    yield from at.reads(
        "EngineCoreRequest", "sampling_params prompt_token_ids prompt_embeds", ready
    )
    why = "Rules of --kv-budget-rules may be for one adapter."
    yield from at.reads("EngineCoreRequest", "lora_request", why)
    yield from _In("vllm.lora.request").reads("LoRARequest", "lora_name", why)
    why = "The one place through which middleware that reads a caller's headers gets in."
    flags = _In("vllm.entrypoints.launchers.cli_args")
    yield flags("attribute", "FrontendArgs.middleware", why, until=(0, 32))
    flags = _In("vllm.entrypoints.common.cli_args")
    yield flags("attribute", "FrontendArgs.middleware", why, since=(0, 33))
    why = "Carries what a request holds to the API server."
    yield from at.reads("EngineCoreOutput", "request_id kv_transfer_params", why)
    yield from at.reads("EngineCoreOutputs", "outputs", why)
    at = _In("vllm.sampling_params")
    yield at(
        "call",
        "SamplingParams(*, temperature, max_tokens, extra_args, prompt_logprobs, detokenize, "
        "skip_reading_prefix_cache)",
        "Carries parameters.",
    )
    yield from at.reads(
        "SamplingParams", "extra_args max_tokens", "Carries a request's parameters."
    )
    at = _In("vllm.exceptions")
    yield at("call", "VLLMValidationError(message, *, parameter)", "HTTP 400, naming a parameter.")

    at = _In("vllm.v1.engine.output_processor")
    yield at("import", "RequestState", why)
    yield at(
        "wrap",
        "RequestState.make_request_output(new_token_ids, pooling_output, finish_reason, "
        "stop_reason, kv_transfer_params, ...)",
        why,
    )
    yield from at.reads(
        "RequestState", "detokenizer parent_req prompt_len request_index", "Usage between reports."
    )
    at = _In("vllm.v1.engine.detokenizer")
    yield at("call", "IncrementalDetokenizer.num_output_tokens()", "Usage between reports.")
    at = _In("vllm.outputs")
    yield at("import", "RequestOutput", "Has our usage as an attribute.")
    yield at("wrap", "RequestOutput.add(next_output, ...)", "Keeps it when outputs are joined.")

    at = _In("vllm.v1.metrics.loggers")
    yield at("subclass", "StatLoggerBase", "Puts our numbers on /metrics.")
    yield at("override", "StatLoggerBase.__init__(vllm_config, engine_index=)", "Labels.")
    yield at(
        "override",
        "StatLoggerBase.record(scheduler_stats, iteration_stats, mm_cache_stats=, engine_idx=)",
        "Takes what the scheduler sent.",
    )
    yield at("override", "StatLoggerBase.log_engine_initialized()", "Nothing to log.")
    yield at("import", "StatLoggerManager", "Has the loggers of a server.")
    yield at(
        "wrap",
        "StatLoggerManager.__init__(*, vllm_config, custom_stat_loggers, ...)",
        "Adds ours, where stats are logged at all.",
    )
    at = _In("vllm.distributed.kv_transfer.kv_connector.v1.metrics")
    for name in ("KVConnectorLogging", "KVConnectorProm"):
        yield at("import", name, "Would take our numbers for a connector's.")
        yield at("wrap", f"{name}.observe(transfer_stats_data, ...)", "Keeps ours from it.")


def _canary() -> Iterator[Hook]:
    give_way = "Canaries end when somebody else comes, and their front ends are told."
    at = _In("vllm.v1.core.sched.scheduler")
    yield at("call", "Scheduler.finish_requests(request_ids, finished_status)", give_way)
    at = _In("vllm.v1.request")
    yield at("import", "RequestStatus", give_way)
    yield at("attribute", "RequestStatus.FINISHED_ABORTED", give_way)
    yield at("attribute", "Request.client_index", give_way)
    at = _In("vllm.v1.engine")
    yield at("call", "EngineCoreOutput(request_id, new_token_ids, *, finish_reason)", give_way)
    yield at("call", "EngineCoreOutputs()", give_way)
    why = "A canary scores the tokens of a request that has ended."
    yield at("import", "FinishReason", why)
    yield from at.reads("FinishReason", "ABORT STOP LENGTH REPETITION", why)
    yield from at.reads(
        "EngineCoreOutput",
        "new_token_ids new_logprobs new_prompt_logprobs_tensors finish_reason",
        why,
    )
    yield at(
        "call",
        "EngineCoreRequest(*, request_id, external_req_id, prompt_token_ids, mm_features, "
        "sampling_params, pooling_params, arrival_time, lora_request, cache_salt, "
        "data_parallel_rank)",
        why,
    )
    yield from at.reads(
        "EngineCoreRequest",
        "request_id mm_features cache_salt data_parallel_rank resumable",
        why,
    )
    at = _In("vllm.v1.engine.async_llm")
    yield from at.reads("AsyncLLM", "output_processor engine_core", why)
    at = _In("vllm.v1.engine.core_client")
    yield at("call", "EngineCoreClient.add_request_async(request)", why)
    yield at("call", "EngineCoreClient.abort_requests_async(request_ids)", why)
    at = _In("vllm.v1.engine.output_processor")
    yield at("import", "OutputProcessor", why)
    yield at("wrap", "OutputProcessor.add_request(request, ...)", "Draws requests by chance.")
    yield at("wrap", "OutputProcessor.process_outputs(engine_core_outputs, ...)", why)
    yield at("wrap", "OutputProcessor.abort_requests(...)", "Forgets requests that were drawn.")
    yield from at.reads("OutputProcessor", "request_states", why)
    yield at("call", "OutputProcessor.get_num_unfinished_requests()", "Whether a server is idle.")
    yield from at.reads("RequestState", "prompt_token_ids", why)
    at = _In("vllm.sampling_params")
    yield at("call", "SamplingParams.clone()", why)
    yield from at.reads(
        "SamplingParams", "logprobs logprob_token_ids structured_outputs", "What is comparable."
    )
    at = _In("vllm.v1.outputs")
    yield from at.reads("LogprobsLists", "logprob_token_ids logprobs", why)
    yield from at.reads("LogprobsTensors", "logprob_token_ids logprobs", why)


def _endpoints() -> Iterator[Hook]:
    fields = "Top-level fields kv_policy and kv_budget."
    usage = "Adds usage.kv_tokens_details."
    for api, request in (("chat_completion", "Chat"), ("completion", ""), ("responses", None)):
        at = _In(f"vllm.entrypoints.openai.{api}.protocol")
        name = "ResponsesRequest" if request is None else f"{request}CompletionRequest"
        yield at("import", name, fields)
        yield at("wrap", f"{name}.to_sampling_params(...)", fields)
        yield from at.reads(name, "model", "Label of the refusals metric.")
        if request is not None:
            yield at("wrap", f"{name}.to_beam_search_params(...)", fields)
            yield from at.reads(name, "vllm_xargs", "Beam search drops them.")
    at = _In("vllm.entrypoints.openai.chat_completion.serving")
    yield at("import", "OpenAIServingChat", usage)
    yield at(
        "wrap",
        "OpenAIServingChat.create_chat_completion(request, raw_request=, ...)",
        "Other APIs make a chat request of what they know of theirs.",
    )
    yield at(
        "wrap", "OpenAIServingChat.chat_completion_full_generator(*, result_generator, ...)", usage
    )
    yield at(
        "wrap",
        "OpenAIServingChat.chat_completion_stream_generator(*, result_generator, ...)",
        usage,
        until=(0, 32),
    )
    yield at(
        "wrap",
        "OpenAIServingChat.chat_completion_stream_generator_raw(*, result_generator, ...)",
        usage,
        since=(0, 33),
    )
    at = _In("vllm.entrypoints.openai.chat_completion.batch_serving")
    yield at("import", "OpenAIServingChatBatch", usage)
    yield at(
        "wrap",
        "OpenAIServingChatBatch.chat_completion_full_generator_batch(*, generators, ...)",
        usage,
    )
    at = _In("vllm.entrypoints.openai.completion.serving")
    yield at("import", "OpenAIServingCompletion", usage)
    yield at(
        "wrap",
        "OpenAIServingCompletion.request_output_to_completion_response(*, final_res_batch, ...)",
        usage,
    )
    yield at(
        "wrap",
        "OpenAIServingCompletion.completion_stream_generator(*, result_generator, ...)",
        usage,
    )
    at = _In("vllm.entrypoints.openai.responses.serving")
    yield at("import", "OpenAIServingResponses", usage)
    yield at(
        "wrap",
        "OpenAIServingResponses._generate_with_builtin_tools(*, sampling_params, engine_input, "
        "...)",
        "Calls the engine from inside a generator, too late for a 400.",
    )
    yield at("wrap", "OpenAIServingResponses.responses_full_generator(*, context, ...)", usage)
    at = _In("vllm.entrypoints.openai.responses")
    yield at("import", "context", usage)
    at = _In("vllm.entrypoints.openai.responses.context")
    for name in ("SimpleContext", "ParsableContext", "HarmonyContext"):
        yield at("import", name, usage)
        yield at("wrap", f"{name}.append_output(output, ...)", usage)
    at = _In("vllm.entrypoints.scale_out.token_in_token_out.serving")
    yield at("import", "ServingTokens", usage)
    yield at("wrap", "ServingTokens.serve_tokens(request, raw_request=, ...)", fields)
    for how in ("full", "stream"):
        yield at(
            "wrap", f"ServingTokens.serve_tokens_{how}_generator(*, result_generator, ...)", usage
        )
    at = _In("vllm.entrypoints.scale_out.render.serving")
    yield at("import", "ServingRender", fields)
    for what in ("chat", "completion", "responses"):
        yield at("wrap", f"ServingRender.render_{what}_request(request, raw_request=)", fields)
    yield from at.reads("ServingRender", "models", "The way to the engine, if there is one.")
    at = _In("vllm.entrypoints.generate.beam_search.online")
    yield at("import", "BeamSearchOnlineMixin", fields)
    yield at("wrap", "BeamSearchOnlineMixin.beam_search(*, prompt, params, ...)", fields)
    at = _In("vllm.entrypoints.generate.generative_scoring.serving")
    yield at("import", "ServingGenerativeScoring", fields)
    yield at("wrap", "ServingGenerativeScoring.create_generative_scoring(request, ...)", fields)
    at = _In("vllm.entrypoints.generate.structured_decisions.serving")
    yield at("import", "ServingStructuredDecisions", fields)
    yield at("wrap", "ServingStructuredDecisions.create_decision(request, ...)", fields)
    at = _In("vllm.entrypoints.serve.exception_handling.error_response")
    yield at("call", "create_error_response(message)", "Errors in the format of another API.")

    at = _In("vllm.entrypoints.anthropic")
    yield at("import", "protocol", usage)
    yield at("import", "serving", usage)
    at = _In("vllm.entrypoints.anthropic.serving")
    yield at("wrap", "_build_anthropic_usage(usage)", usage)
    at = _In("vllm.entrypoints.anthropic.protocol")
    yield from at.reads("", "AnthropicUsage AnthropicMessagesResponse AnthropicStreamEvent", usage)


def _rendering() -> Iterator[Hook]:
    why = "Where a prompt's text and tokens are known, and which chat it was."
    at = _In("vllm.renderers.online_renderer")
    yield at("import", "OnlineRenderer", why)
    yield at("wrap", "OnlineRenderer.preprocess_chat(*, request, messages, ...)", why)
    yield at("wrap", "OnlineRenderer.preprocess_cmpl(request, ...)", why)
    yield from at.reads("OnlineRenderer", "renderer", why)
    at = _In("vllm.renderers.base")
    again = "How a request was rendered, to render it again."
    yield at(
        "call", "BaseRenderer.render_chat_async(conversations, chat_params, tok_params)", again
    )
    yield at("call", "BaseRenderer.render_cmpl_async(prompts, tok_params)", again)
    yield at("call", "BaseRenderer.render_messages_async(messages, params)", again)
    yield at("call", "BaseRenderer.tokenize_prompts_async(prompts, params)", again)
    at = _In("vllm.renderers.params")
    yield from at.reads("TokenizeParams", "return_token_offsets", "Which text a token is.")


def _live_page() -> Iterator[Hook]:
    why = "The live page is one of vLLM's endpoint plug-ins, with a flag of its own."
    yield _In("vllm")("import", "plugins", why)
    yield _In("vllm.plugins")("wrap", "load_endpoint_plugins(...)", why)
    why = "The server's API key guards the live page's data as it guards /v1."
    yield _In("vllm.entrypoints.serve.middleware")("import", "authenticate", why)
    at = _In("vllm.entrypoints.serve.middleware.authenticate")
    yield from at.reads("", "GUARDED_PREFIX", why)
    why = "API servers ask engines for what the live page shows."
    at = _In("vllm.v1.engine.core_client")
    yield from at.reads("AsyncMPClient", "core_engines engine_ranks_managed", why)
    yield at("call", "AsyncMPClient._call_utility_async(method, *, engine)", why)
    at = _In("vllm.v1.engine.core")
    yield at("import", "EngineCore", why)
    yield from at.reads("EngineCore", "scheduler", why)
    at = _In("vllm.v1.request")
    yield from at.reads("Request", "arrival_time", "How long a request has been here.")


def _tracing() -> Iterator[Hook]:
    why = "Adds attributes to the span of a request."
    yield _In("vllm.v1.engine")("import", "output_processor", why)
    at = _In("vllm.v1.engine.output_processor")
    yield at("wrap", "OutputProcessor.do_tracing(engine_core_output, req_state, ...)", why)
    yield at("wrap", "instrument_manual(*, attributes, ...)", why)


HOOKS: tuple[Hook, ...] = tuple(dict.fromkeys(_table()))
