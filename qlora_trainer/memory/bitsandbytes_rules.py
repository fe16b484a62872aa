"""When bitsandbytes multiplies by packed 4-bit weights without unpacking them first.

`gemm_4bit` on CUDA has a fused kernel for few rows and otherwise dequantizes the whole weight. The
choice is a long, measured ladder by card and shape in bitsandbytes/backends/cuda/ops.py. It cannot
be imported without its CUDA library, so the ladder is read from the installed source and run
as it stands: the answer is always that of the version installed, and nothing is written twice.
"""

import ast
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

_LADDER = "_gemm_4bit_use_custom_cuda"
_FLOOR = "_GEMM_4BIT_CUSTOM_FLOOR_M"
_MOST_ROWS = "_gemm_4bit_custom_max_m"


@functools.cache
def _ladder(
    capability: tuple[int, int], multiprocessors: int
) -> tuple[int, Callable[..., bool]] | None:
    """(most rows ever fused, ladder), or None when this version has no such choice."""
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or not spec.submodule_search_locations:
        return None
    source = Path(spec.submodule_search_locations[0]) / "backends" / "cuda" / "ops.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    function = next(
        (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == _LADDER), None
    )
    floor, most = _first_number(tree, _FLOOR), _first_number(tree, _MOST_ROWS)
    if function is None or floor is None or most is None:
        return None
    function.decorator_list = []
    scope: dict[str, object] = {
        "torch": torch,
        _FLOOR: floor,
        "_gpu_dispatch_props": lambda _index: (multiprocessors, *capability),
    }
    exec(compile(ast.Module([function], []), str(source), "exec"), scope)
    return most, functools.cache(scope[_LADDER])  # type: ignore[arg-type]


def _first_number(tree: ast.Module, name: str) -> int | None:
    # the first assignment is the CUDA one, ROCm's comes after `else`
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == name
            and isinstance(node.value, ast.Constant)
        ):
            return int(node.value.value)  # type: ignore[arg-type]
    return None


def uses_fused_kernel(
    capability: tuple[int, int],
    multiprocessors: int,
    dtype: torch.dtype,
    rows: int,
    out_features: int,
    in_features: int,
) -> bool:
    """Whether `gemm_4bit` on this card leaves the weight packed.

    Args:
        capability: Compute capability of the card.
        multiprocessors: Number of its SMs.
        dtype: Of the activations.
        rows: Tokens multiplied at once.
        out_features: Rows of the weight.
        in_features: Columns of the weight.

    >>> uses_fused_kernel((7, 5), 40, torch.float16, 4, 1024, 1024)
    True
    >>> uses_fused_kernel((7, 5), 40, torch.float16, 4096, 1024, 1024)
    False
    """
    ladder = _ladder(capability, multiprocessors)
    if ladder is None:
        return False
    most, decide = ladder
    return rows <= most and decide(0, dtype, rows, out_features, in_features)
