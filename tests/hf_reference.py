"""Greedy decoding in Hugging Face transformers, which a compacted request must reproduce: between
tokens, only given slots of each layer and head stay in the cache, at true positions, and they are
rounded as the codec of their pages rounds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# By n, the number of tokens at a compaction: how many slots, from the first, lie in compressed
# pages.
Packed = Mapping[int, int]
# Turns keys and values [k, D] of these slots of (layer, head), in place, into what is read back
# from pages.
Rounding = Callable[[int, int, Tensor, Tensor], None]


class Kept(NamedTuple):
    """What a compaction leaves of one layer, where slots alone do not describe it.

    Attributes:
        slots: int64 [heads, k], cache slots that stay, in order; padding is any slot.
        extra: float32 [heads, k], what is added to the logits of these slots: -inf for padding, or
            a log bias.
        keys, values: [heads, j, D], new keys and values of the first j of these slots, or None.
    """

    slots: Tensor
    extra: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None


class Reference:
    """One float32 model, kept between calls."""

    def __init__(self, model_path: str):
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        # By layer: what is added to the logits of the first slots, [heads, k].
        self._extra: dict[int, Tensor] = {}
        ALL_ATTENTION_FUNCTIONS.register("with_extra", self._attention)

    def _attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        group = module.num_key_value_groups
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        logits = query @ key.mT * scaling + attention_mask
        extra = self._extra[module.layer_idx].repeat_interleave(group, 0)
        logits[..., : extra.shape[1]] += extra[None, :, None]
        return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    @torch.inference_mode()
    def greedy(
        self,
        prompt: list[int],
        tokens: list[int],
        kept: Mapping[int, list[Tensor]] | Mapping[int, list[Kept]],
        rounding: Rounding | None = None,
        packed: Packed | None = None,
    ) -> list[int]:
        """Returns the greedy token after `prompt` and each of `tokens` but the last. These are
        `tokens` if and only if greedy decoding gives them; read at once, they take a fraction of
        its time.

        Args:
            prompt: token ids.
            tokens: token ids that follow.
            kept: by n and layer, the cache slots [heads, k] that stay, ascending, when n tokens
                have KV; all others are dropped.
            rounding: rounds the slots in compressed pages, or None.
            packed: by n, how many of the slots that stay, from the first, are rounded.
        """
        cache = DynamicCache()
        more = any(isinstance(own, Kept) for layers in kept.values() for own in layers)
        self.model.set_attn_implementation("with_extra" if more else "sdpa")
        heads = self.model.config.num_key_value_heads
        self._extra = {i: torch.zeros(heads, 0) for i in range(len(self.model.model.layers))}
        read, done, best = [*prompt, *tokens[:-1]], 0, list[int]()
        for stop in sorted({n for n in kept if n < len(read)} | {len(read)}):
            best += self._forward(read, done, stop, cache).argmax(-1).tolist()
            done = stop
            if stop in kept:
                self._gather(cache, kept[stop])
                self._round(cache, rounding, (packed or {}).get(stop, 0))
        return best[len(prompt) - 1 :]

    def _forward(self, tokens: list[int], start: int, stop: int, cache: DynamicCache) -> Tensor:
        count, held = stop - start, cache.get_seq_length()
        # Slots are not positions: the mask is given, not derived.
        mask = torch.zeros(count, held + count)
        mask[:, held:] = torch.full((count, count), torch.finfo(torch.float32).min).triu(1)
        return self.model(
            input_ids=torch.tensor([tokens[start:stop]]),
            position_ids=torch.arange(start, stop)[None],
            attention_mask=mask[None, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[0]

    def _gather(self, cache: DynamicCache, kept: list[Any]) -> None:
        for i, (layer, own) in enumerate(zip(cache.layers, kept, strict=True)):
            slots = own.slots if isinstance(own, Kept) else own
            size = layer.keys.shape[-1]
            index = slots[None, :, :, None].expand(-1, -1, -1, size)
            layer.keys = layer.keys.gather(2, index)
            layer.values = layer.values.gather(2, index)
            if isinstance(own, Kept):
                self._extra[i] = own.extra
                if own.keys is not None and own.values is not None:
                    n = own.keys.shape[1]
                    layer.keys[0, :, :n], layer.values[0, :, :n] = own.keys, own.values

    @staticmethod
    def _round(cache: DynamicCache, rounding: Rounding | None, packed: int) -> None:
        if rounding is None or not packed:
            return
        for index, layer in enumerate(cache.layers):
            for head in range(layer.keys.shape[1]):
                rounding(index, head, layer.keys[0, head, :packed], layer.values[0, head, :packed])
