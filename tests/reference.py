"""The reference.

Transformers in fp32, with keys and values in fp32, or rounded to fp16 as in bpo's KV cache.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, LlamaForCausalLM
from transformers.utils import logging

torch.set_num_threads(1)
logging.disable_progress_bar()
logging.set_verbosity_error()


class RoundedCache(DynamicCache):
    """A KV cache that rounds keys and values to fp16."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Called once per layer and step, after RoPE."""
        return super().update(
            key_states.half().float(), value_states.half().float(), *args, **kwargs
        )


class Reference:
    """A checkpoint folder, opened by transformers. Its weights are rounded to fp16.

    The arithmetic is fp32.
    """

    def __init__(self, folder: Path):
        self.model = LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for weight in self.model.parameters():
            weight.data = weight.data.half().float()

    @torch.inference_mode()
    def logits(self, ids: list[int], rounded: bool = False) -> np.ndarray:
        """Logits [n][V] of all positions of a whole input of n ids."""
        cache = RoundedCache() if rounded else DynamicCache()
        return (
            self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0].numpy()
        )

    @torch.inference_mode()
    def greedy(self, ids: list[int], max_new: int, eos: int) -> tuple[list[int], list[float]]:
        """Up to max_new ids, each the likeliest, with K and V rounded; EOS is included.

        And by how many standard deviations of the logits each led the second best.
        """
        cache, tokens, gaps, fresh = RoundedCache(), [], [], ids
        while len(tokens) < max_new and tokens[-1:] != [eos]:
            row = self.model(torch.tensor([fresh]), past_key_values=cache, use_cache=True).logits[
                0, -1
            ]
            best = row.topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float((best.values[0] - best.values[1]) / row.std()))
            fresh = tokens[-1:]
        return tokens, gaps
