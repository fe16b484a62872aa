"""Causal attention on this CPU: our tiles of queries beside torch's own kernel.

    python scripts/benchmark_attention.py [--json scripts/results/attention.json]
                                          [--repeats 15] [--threads 2] [--dtype bf16]

Random queries, keys and values in the shapes of real layers (`SHAPES`), laid as models lay them.
Both take turns call by call in one process, so a slow moment of the machine meets both; the ratio
is the median over turns. Errors are distances from fp64, of the output and the three gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_trainer.base.dtype import choose_compute_dtype, dtype_name
from qlora_trainer.base.tiled_attention import tiled_attention

# rows, query heads, key heads, tokens, head size
SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "SmolLM2-135M, 1 x 100": (1, 9, 3, 100, 64),
    "SmolLM2-135M, 1 x 512": (1, 9, 3, 512, 64),
    "SmolLM2-135M, 4 x 512": (4, 9, 3, 512, 64),
    "SmolLM2-135M, 1 x 1024": (1, 9, 3, 1024, 64),
    "SmolLM2-135M, 1 x 2048": (1, 9, 3, 2048, 64),
    "TinyLlama-1.1B, 1 x 512": (1, 32, 4, 512, 64),
    "TinyLlama-1.1B, 1 x 1024": (1, 32, 4, 1024, 64),
    "TinyLlama-1.1B, 1 x 2048": (1, 32, 4, 2048, 64),
    "Llama-3.1-8B, 1 x 512": (1, 32, 8, 512, 128),
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def torch_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The kernel of torch; (B, T, H, D) as ours gives it."""
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return attended.transpose(1, 2)


def made_up(shape: Sequence[int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values of a shape, and the gradient of the output."""
    rows, heads, groups, tokens, size = shape
    generator = torch.Generator().manual_seed(7)
    tensors = []
    for count in (heads, groups, groups):
        x = torch.randn(rows, tokens, count, size, generator=generator).to(dtype)
        tensors.append(x.transpose(1, 2).requires_grad_())
    return tensors, torch.randn(rows, tokens, heads, size, generator=generator).to(dtype)


def results(attend: Attend, tensors: Sequence[Tensor], slope: Tensor) -> list[Tensor]:
    """Output and gradients."""
    out = attend(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, slope)]


def seconds(attend: Attend, tensors: Sequence[Tensor], slope: Tensor) -> float:
    """Of one forward and backward."""
    began = time.perf_counter()
    results(attend, tensors, slope)
    return time.perf_counter() - began


def measure(shape: Sequence[int], repeats: int, dtype: torch.dtype) -> dict[str, Any]:
    """Turns of both, and how far both are from fp64."""
    tensors, slope = made_up(shape, dtype)
    turns = []
    for number in range(repeats + 1):
        turn = [seconds(attend, tensors, slope) for attend in (tiled_attention, torch_attention)]
        if number:  # the first warms up
            turns.append(turn)
    exact = results(
        torch_attention, [t.detach().double().requires_grad_() for t in tensors], slope.double()
    )
    pairs = [theirs / ours for ours, theirs in turns]
    return {
        "seconds": {"ours": statistics.median(t[0] for t in turns),
                    "torch": statistics.median(t[1] for t in turns)},
        "times_faster": statistics.median(pairs),
        "spread": [min(pairs), max(pairs)],
        "error": {
            name: max(_distance(one, truth) for one, truth in zip(found, exact, strict=True))
            for name, found in (
                ("ours", results(tiled_attention, tensors, slope)),
                ("torch", results(torch_attention, tensors, slope)),
            )
        },
    }  # fmt: skip


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    given = parser.parse_args()
    dtype = choose_compute_dtype(given.dtype, torch.device("cpu"), "llama")
    torch.set_num_threads(given.threads)
    found: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        found[name] = measure(shape, given.repeats, dtype)
        low, high = found[name]["spread"]
        print(f"{name}: {found[name]['times_faster']:.2f} ({low:.2f} to {high:.2f}) times as fast")
    if given.json is not None:
        content = {
            "dtype": dtype_name(dtype), "threads": given.threads, "repeats": given.repeats,
            "shapes": found,
        }  # fmt: skip
        given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
