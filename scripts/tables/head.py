"""A head's product on a CPU: strips beside the whole, of `benchmark_head.py`."""

from __future__ import annotations

from tables.common import result


def head_fp32() -> str:
    """One sentence."""
    found = result("head-fp32")
    ratios = "; ".join(
        f"{name} {figures['times_faster']:.2f} ({low:.2f} to {high:.2f})"
        for name, figures in found["shapes"].items()
        for low, high in [figures["quartiles"]]
    )
    return (
        f"A head's product in fp32 in strips of {found['strip_rows']} of its outputs over the "
        f"whole at once (`python scripts/benchmark_head.py`, {found['threads']} cores, medians of "
        f"{found['repeats']} turns, in brackets the quartiles): {ratios}."
    )
