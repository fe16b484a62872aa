"""Operators that torch cannot run without weights: run once on ones, their inner memory bounded.

An operator from a package, or one whose result's shape depends on values, may have no `meta`
implementation. Run on the CPU with real ones of the same shapes it shows what it makes; of
`nonzero` and its like ones give the largest result. What its CUDA kernel takes while it runs is
not to be seen there. It is counted as once more all that the operator reads and writes, and this
is the bound of the error: the peak is too high by at most that where the kernel takes none, and
too low only where it takes more than that.

Given up: operators whose operands are larger than `MOST_BYTES`, that write to their arguments or
return them, or that refuse ones and zeros.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

MOST_BYTES = 2**30


def stand_in(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
    """What an operator makes of weightless tensors, found on the CPU.

    Args:
        func: The operator overload.
        args: Tensors among them on `meta`.
        kwargs: As args.

    Returns:
        Its result on `meta`, and the bytes it may hold inside at most, by the assumption above.

    Raises:
        ValueError: It cannot be stood in for.
    """
    schema = getattr(func, "_schema", None)
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    read_bytes = sum(t.numel() * t.element_size() for t in given)
    aliased = schema is None or any(
        part.alias_info is not None for part in (*schema.arguments, *schema.returns)
    )
    if aliased or read_bytes > MOST_BYTES:
        raise ValueError("it writes to its arguments, returns them, or is too large to try")
    for fill in (torch.ones, torch.zeros):
        with _disable_current_modes():
            try:
                made = func(*_real(args, fill), **_real(kwargs, fill))
            except (RuntimeError, IndexError, ValueError, TypeError):
                continue
            result = tree_map_only(
                Tensor,
                lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"),
                made,
            )
            parts = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
            return result, read_bytes + sum(t.numel() * t.element_size() for t in parts)
    raise ValueError("it runs neither on ones nor on zeros")


def _real(values: Any, fill: Callable[..., Tensor]) -> Any:
    return tree_map_only(Tensor, lambda t: fill(t.shape, dtype=t.dtype) if t.is_meta else t, values)
