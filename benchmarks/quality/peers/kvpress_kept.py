"""Says which tokens kvpress keeps of given tensors, in kvpress's own environment.

    python kvpress_kept.py TENSORS.safetensors KEPT.safetensors

The first file has keys and values [L, H, n, D], with RoPE, queries [L, Hq, n, D] without, the
inverse frequencies [D/2] and `kept` [1], how many tokens stay. The second gets, by the name of a
press, bool [L, H, n]. Imports nothing of this project.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

# With these, kvpress's presses and ours are the same method.
PRESSES = (
    *("knorm", "keydiff", "lagkv", "tova", "expected_attention", "streaming"),
    *("snapkv", "pyramidkv", "adakv"),
)


def module_of(queries: Tensor, frequencies: Tensor) -> tuple[Any, Tensor]:
    """Returns what a press takes for an attention layer, and hidden states that it projects on
    these queries, [Hq, n, D] without RoPE."""
    heads, n, size = queries.shape

    def rotary(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions[..., None].float() * torch.cat((frequencies, frequencies))
        return angle.cos(), angle.sin()

    module = SimpleNamespace(
        q_proj=lambda hidden: hidden, head_dim=size, rotary_emb=rotary, config=SimpleNamespace()
    )
    module.config.num_attention_heads = heads
    return module, queries.transpose(0, 1).reshape(1, n, heads * size)


def press_of(name: str) -> Any:
    """Returns a press by our name of its method."""
    import kvpress

    if name == "adakv":  # as kvpress's own evaluation has it
        return kvpress.AdaKVPress(
            kvpress.ExpectedAttentionPress(compression_ratio=0.5, epsilon=1e-2)
        )

    presses = {
        "knorm": kvpress.KnormPress,
        "keydiff": kvpress.KeyDiffPress,
        "lagkv": kvpress.LagKVPress,
        "tova": kvpress.TOVAPress,
        "expected_attention": kvpress.ExpectedAttentionPress,
        "streaming": kvpress.StreamingLLMPress,
        "snapkv": kvpress.SnapKVPress,
        "pyramidkv": kvpress.PyramidKVPress,
    }
    return presses[name](compression_ratio=0.5)


def kept(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """Returns what a press keeps in every layer, bool [L, H, n]."""
    press, out = press_of(name), []
    layers = zip(tensors["keys"], tensors["values"], tensors["queries"], strict=True)
    for index, (keys, values, queries) in enumerate(layers):
        module, hidden = module_of(queries, tensors["frequencies"])
        module.config.num_key_value_heads = len(keys)
        module.config.num_hidden_layers = len(tensors["keys"])
        module.config._attn_implementation = "sdpa"
        module.layer_idx = index
        n = keys.shape[1]
        embeddings = module.rotary_emb(hidden, torch.arange(n)[None])
        given = module, hidden, keys[None], values[None], None, {"position_embeddings": embeddings}
        if name == "adakv":  # which removes nothing, and says what attention is not to see
            press.compress(*given)
            _, heads, slots = module.masked_key_indices
            own = torch.ones(len(keys), n, dtype=torch.bool)
            own[heads, slots] = False
            out.append(own)
            continue
        count = int(tensors["kept"])
        if name == "pyramidkv":
            count = press.get_layer_budget(module, n)
        best = press.score(*given)[0].topk(count).indices
        out.append(torch.zeros(len(keys), n, dtype=torch.bool).scatter(1, best, True))
    return torch.stack(out)


def main() -> None:
    from safetensors.torch import load_file, save_file

    given, target = sys.argv[1:3]
    tensors = load_file(given)
    with torch.inference_mode():
        save_file({name: kept(name, tensors) for name in PRESSES}, target)


if __name__ == "__main__":
    main()
