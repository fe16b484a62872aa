"""What no step can beat: the time of its matrix products with the base, at this machine's rate."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


def flops_per_token(model: Path) -> float:
    """Operations of a step's products with the base: forward, and the gradient of the input.

    Every token goes through every linear layer and the head; adapters and attention are left out,
    so the ceiling is no better than it is.
    """
    c = _text_config(model)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    query, key = c.num_attention_heads * head, c.num_key_value_heads * head
    layer = c.hidden_size * (2 * query + 2 * key) + 3 * c.hidden_size * c.intermediate_size
    weights = c.num_hidden_layers * layer + c.hidden_size * c.vocab_size
    return 2.0 * 2.0 * float(weights)


class ProductRate:
    """Measures products in the model's own MLP shape.

    Args:
        model: Folder with its `config.json`.
        tokens: Rows of the product.
        threads: Of the product.
        dtype: Of the product: "bfloat16" or "float32".
    """

    def __init__(self, model: Path, tokens: int, threads: int, dtype: str) -> None:
        import torch

        c = _text_config(model)
        torch.set_num_threads(threads)
        computed = getattr(torch, dtype)
        self._x = torch.randn(tokens, c.hidden_size).to(computed)
        self._weight = torch.randn(c.intermediate_size, c.hidden_size).to(computed)
        self._flops = 2.0 * tokens * c.hidden_size * c.intermediate_size

    def __call__(self) -> float:
        """Operations per second, the best of a few."""
        import torch

        best = 0.0
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(4):
                torch.nn.functional.linear(self._x, self._weight)
            best = max(best, 4 * self._flops / (time.perf_counter() - began))
        return best


def _text_config(model: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config()
