"""`train.compile`: norms, and MLPs around their projections, as kernels of `torch.compile`.

What gains is chains of element-wise operators: a norm reads its rows eight times where one kernel
reads them once, and keeps fp32 copies a kernel never makes. `nn.Module.compile` sets the kernel on
the module of this model instance, inside what is recomputed, with dynamic shapes: a batch of
another length runs the same kernel. Kernels round otherwise than the operators they stand for; for
one shape they are the same in every process, so a resumed run goes on with its bits.

Left as they are, on purpose:

- Our autograd functions (`lora/function.py`, `lora/gated_mlp.py`, `base/norm.py`, NF4 products).
  In one graph the forward's and the backward's rebuilding of a 4-bit weight are the same
  expression, and a compiler may keep the dense weight from one to the other. They are opaque.
- Attention: its kernels are fused already, and a packed row's examples, cut on the host, would be
  compiled anew for every row.
- torch's own norms (one kernel each) and norms that are trained.

What it is worth: `scripts/benchmark_step.py --part compile-1x512`. No GPU has run it.

Foresight does not count what kernels save: it runs the operators one by one. So does the step that
is measured beside it on a CPU (`memory/measure.py`).
"""

import os
import shutil
import sys

import torch
from torch import Tensor, nn

from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.base.norm import TiledRMSNorm
from qlora_trainer.errors import UserError
from qlora_trainer.lora.fuse import FusedGatedMLP
from qlora_trainer.lora.layer import LowRankLayer

# Of one forward: rows of one sequence or several, recorded or not, of an input that needs a
# gradient or not, and heads' norms (4-D) beside the layers' own.
_RECOMPILE_LIMIT = 32
_OFF = "or set train.compile: false"


def compile_modules(model: nn.Module) -> list[str]:
    """Compile what gains, each module at its first run; the model computes the same.

    Args:
        model: With its adapters and everything else that replaces modules.

    Returns:
        What was and was not found, in words for the user.
    """
    norms = [module for module in model.modules() if _is_norm(module)]
    mlps = [module for module in model.modules() if _is_mlp(module)]
    if not norms and not mlps:
        return [
            f"train.compile: {type(model).__name__} has no norm or MLP that gains (what "
            "train.tiled_norms and train.fused_mlp replace is one function already); nothing "
            "is compiled"
        ]
    for mlp in mlps:
        for inner in mlp.modules():
            if _is_ours(inner) and "forward" not in inner.__dict__:
                inner.forward = torch.compiler.disable(inner.forward)
    for module in (*norms, *mlps):
        module.compile(dynamic=True, recompile_limit=_RECOMPILE_LIMIT)
    return [
        f"train.compile: {len(norms)} norms and {len(mlps)} MLPs are compiled as they first run, "
        "which takes a while; memory is foreseen without what compiled kernels save"
    ]


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, (LowRankLayer, NF4Linear))


def _is_norm(module: nn.Module) -> bool:
    kind = type(module)
    known = kind.__name__.endswith("Norm") and not kind.__module__.startswith("torch.nn.")
    trained = any(parameter.requires_grad for parameter in module.parameters())
    return known and not trained and not isinstance(module, TiledRMSNorm)


def _is_mlp(module: nn.Module) -> bool:
    return type(module).__name__.endswith("MLP") and not isinstance(module, FusedGatedMLP)


def require_compiler(device: torch.device) -> None:
    """See that `torch.compile` works here, by compiling two operations.

    Raises:
        UserError: It does not.
    """
    compiler = os.environ.get("CXX", _default_compiler())
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"train.compile = true: torch.compile needs a C++ compiler, and {compiler!r} is not "
            f"here; install one, name one in the environment variable CXX, {_OFF}"
        )
    try:
        found = torch.compile(_probe, dynamic=False)(torch.ones(8, device=device))
    except (RuntimeError, OSError) as error:  # torch's own are RuntimeErrors
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"train.compile = true: torch.compile cannot compile for {device} here: {lines[0]}; "
            f"mend that, {_OFF}"
        ) from error
    if float(found[0]) != 3:
        raise UserError(
            "train.compile = true: torch.compile is switched off here (environment variable "
            f"TORCHDYNAMO_DISABLE, perhaps); switch it on, {_OFF}"
        )


def _probe(x: Tensor) -> Tensor:
    return x * 2 + (1 if torch.compiler.is_compiling() else 0)


def _default_compiler() -> str:
    """What torch takes where CXX is not set (torch/_inductor/cpp_builder.py)."""
    return {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
