"""Attention on a CPU: our tiles of queries beside torch's kernel, of `benchmark_attention.py`."""

from __future__ import annotations

from typing import Any

from tables.common import markdown, result


def attention() -> str:
    """A row per shape of a real layer, in bf16."""
    return _attention(result("attention"))


def attention_fp32() -> str:
    """The same on a CPU without bf16 products."""
    return _attention(result("attention-fp32"))


def _attention(found: dict[str, Any]) -> str:
    rows = []
    for shape, figures in found["shapes"].items():
        low, high = figures["spread"]
        ours, torch = (
            f"{figures['seconds'][who] * 1e3:.1f} ms ({_share(figures['error'][who])})"
            for who in ("ours", "torch")
        )
        rows.append(
            [shape, ours, torch, f"{figures['times_faster']:.2f} ({low:.2f} to {high:.2f})"]
        )
    head = ["rows x tokens of a layer", "ours", "torch's", "ours over torch's"]
    return (
        f"{markdown(head, rows)}\n\nForward and backward, {found['dtype']}, "
        f"{found['threads']} threads: "
        f"medians of {found['repeats']} calls of both in turn; beside them, in brackets, the "
        "largest distance of output or a gradient from fp64. Beside the ratio: the least and the "
        "most."
    )


def _share(error: float) -> str:
    """In percent, or as a power of ten where that would show nothing.

    >>> _share(0.0037), _share(3.6e-7)
    ('0.37%', '4e-07')
    """
    return f"{error:.2%}" if error >= 1e-4 else f"{error:.0e}"
