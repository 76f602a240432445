"""Tiny random models, for tests in which the text does not matter."""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of a Llama with two query heads for each KV head."""

    layers: int
    kv_heads: int
    head_size: int
    vocabulary: int
    positions: int


def save_model(path: str, shape: Shape) -> None:
    """Saves a random Llama whose greedy text does not repeat itself at once."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=shape.layers,
        num_attention_heads=2 * shape.kv_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=shape.positions,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def save_tables(model: str, path: str, shape: Shape) -> None:
    """Saves transform tables for a model. They are fitted to random keys, because they need not be
    good. `path` must not be in the model's folder, where vLLM takes all such files for weights."""
    import torch

    from vllm_kvcrush.codecs.transform import tables as transform_tables
    from vllm_kvcrush.codecs.transform.fit import Statistics, fit
    from vllm_kvcrush.codecs.transform.points import POINTS
    from vllm_kvcrush.codecs.transform.rope import Rope
    from vllm_kvcrush.codecs.transform.tables import ModelShape

    config = json.loads((pathlib.Path(model) / "config.json").read_text())
    rope = Rope.from_config(config)
    keys = torch.randn(shape.layers, shape.kv_heads, 512, shape.head_size)
    queries = torch.randn(shape.layers, 2 * shape.kv_heads, 512, shape.head_size)
    statistics = Statistics.of(keys, queries)
    tables = [fit(statistics, point, rope, 512) for point in POINTS]
    transform_tables.save(path, ModelShape.from_config(config), tables, "random")
