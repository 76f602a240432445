"""Greedy decoding in Hugging Face transformers with a cache that is gathered, between tokens, to
given tokens per layer and head, at true positions, and rounded as the codec of its pages rounds
them: what a compacted request must reproduce."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

# At n tokens: how many slots, from the first, lie in compressed pages.
Packed = Mapping[int, int]
# Turns keys and values [k, D] of these slots of (layer, head), in place, into what pages give back.
Rounding = Callable[[int, int, Tensor, Tensor], None]


class Reference:
    """One float32 model, kept between calls."""

    def __init__(self, model_path: str):
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(
        self,
        prompt: list[int],
        new_tokens: int,
        kept: Mapping[int, list[Tensor]],
        rounding: Rounding | None = None,
        packed: Packed | None = None,
    ) -> list[int]:
        """Greedy tokens after `prompt`. `kept[n][layer]`, `[heads, k]`: cache slots that stay,
        ascending, when n tokens have KV; every slot that it does not name is dropped. The first
        `packed[n]` of them then are rounded."""
        cache = DynamicCache()
        tokens = list(prompt)
        done = 0
        stops = [*sorted(n for n in kept if n <= len(prompt)), len(prompt)]
        logits = torch.empty(0)
        for stop in dict.fromkeys(stops):
            logits = self._forward(tokens, done, stop, cache)
            done = stop
            if stop in kept and stop < len(prompt):
                self._gather(cache, kept[stop])
                self._round(cache, rounding, (packed or {}).get(stop, 0))
        output = []
        for _ in range(new_tokens):
            token = int(logits[-1].argmax())
            output.append(token)
            tokens.append(token)
            if done in kept:
                self._gather(cache, kept[done])
                self._round(cache, rounding, (packed or {}).get(done, 0))
            logits = self._forward(tokens, done, done + 1, cache)
            done += 1
        return output

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

    @staticmethod
    def _gather(cache: DynamicCache, kept: list[Tensor]) -> None:
        for layer, slots in zip(cache.layers, kept, strict=True):
            size = layer.keys.shape[-1]
            index = slots[None, :, :, None].expand(-1, -1, -1, size)
            layer.keys = layer.keys.gather(2, index)
            layer.values = layer.values.gather(2, index)

    @staticmethod
    def _round(cache: DynamicCache, rounding: Rounding | None, packed: int) -> None:
        if rounding is None or not packed:
            return
        for index, layer in enumerate(cache.layers):
            for head in range(layer.keys.shape[1]):
                rounding(index, head, layer.keys[0, head, :packed], layer.values[0, head, :packed])
