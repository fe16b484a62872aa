"""What the base really holds: every tensor's role, dtype and bytes, read from the model itself.

A "4-bit" model that is not 4-bit shows here: each large tensor outside NF4 is listed with the
reason. Nothing is computed from shapes on paper, so the table also serves a weightless model,
whose tensors have sizes and no memory; a tied parameter counts once.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from qlora_trainer.base.dtype import dtype_name
from qlora_trainer.base.head import Int8Rows
from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.base.select import head_paths, is_linear, is_router

LARGE_BYTES = 2**20  # an unquantized tensor from here on is listed with its reason
ROLES = (
    "linear weights (NF4)", "quantization state", "linear weights", "experts", "router",
    "embedding", "head", "norm", "bias", "convolution", "buffer", "other",
)  # fmt: skip


@dataclass(frozen=True)
class TensorAudit:
    """One tensor of the base.

    Attributes:
        name: Its path in the model.
        role: One of `ROLES`.
        dtype: Short name, such as "bf16".
        shape: Its shape; of packed codes, not of the weight they stand for.
        size_bytes: What it takes.
        tied_to: Other names of the same parameter.
        kept_because: Why a weight stands outside NF4; empty for codes, norms, biases, buffers.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    tied_to: tuple[str, ...] = ()
    kept_because: str = ""


@dataclass(frozen=True)
class BaseAudit:
    """All tensors of a base."""

    tensors: tuple[TensorAudit, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, each counted once."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def bytes_by_dtype(self) -> dict[str, int]:
        """Dtype -> bytes, largest first."""
        return _summed((tensor.dtype, tensor.size_bytes) for tensor in self.tensors)

    @property
    def bytes_by_role(self) -> dict[str, int]:
        """Role -> bytes, largest first."""
        return _summed((tensor.role, tensor.size_bytes) for tensor in self.tensors)

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest tensor."""
        return max((tensor.size_bytes for tensor in self.tensors), default=0)

    def large_unquantized(self, at_least_bytes: int = LARGE_BYTES) -> list[TensorAudit]:
        """Weights outside NF4 of at least so many bytes, largest first."""
        found = [t for t in self.tensors if t.kept_because and t.size_bytes >= at_least_bytes]
        return sorted(found, key=lambda tensor: -tensor.size_bytes)

    def rows(self) -> list[tuple[str, str, int, int]]:
        """(role, dtype, tensors, bytes) for a table, in the order of `ROLES`."""
        groups: dict[tuple[str, str], list[int]] = {}
        for tensor in self.tensors:
            groups.setdefault((tensor.role, tensor.dtype), []).append(tensor.size_bytes)
        ordered = sorted(groups.items(), key=lambda item: (ROLES.index(item[0][0]), item[0][1]))
        return [(role, dtype, len(sizes), sum(sizes)) for (role, dtype), sizes in ordered]

    def to_json(self) -> dict[str, Any]:
        """Plain data for the run folder."""
        return {
            "total_bytes": self.total_bytes,
            "bytes_by_dtype": self.bytes_by_dtype,
            "bytes_by_role": self.bytes_by_role,
            "rows": [
                {"role": role, "dtype": dtype, "tensors": count, "bytes": size}
                for role, dtype, count, size in self.rows()
            ],
            "large_unquantized": [asdict(tensor) for tensor in self.large_unquantized()],
        }


def audit_base(model: nn.Module) -> BaseAudit:
    """List every parameter and buffer of a base, with weights or weightless.

    Call it before adapters are put in: it takes every tensor for the base's.
    """
    heads = head_paths(model)
    kept: dict[str, str] = getattr(model, "kept_unquantized", {})
    names: dict[int, list[str]] = {}
    first: dict[int, tuple[str, str, nn.Module, Tensor]] = {}
    for path, module in model.named_modules():
        for name, tensor in _own_tensors(module):
            full_name = f"{path}.{name}" if path else name
            names.setdefault(id(tensor), []).append(full_name)
            first.setdefault(id(tensor), (path, name, module, tensor))
    return BaseAudit(
        tuple(
            _audit_tensor(*place, tied_to=tuple(names[key][1:]), heads=heads, kept=kept)
            for key, place in first.items()
        )
    )


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _audit_tensor(
    path: str,
    name: str,
    module: nn.Module,
    tensor: Tensor,
    *,
    tied_to: tuple[str, ...],
    heads: set[str],
    kept: dict[str, str],
) -> TensorAudit:
    role = _role(path, name, module, tensor, heads)
    is_weight = isinstance(tensor, nn.Parameter) and tensor.dim() > 1
    return TensorAudit(
        name=f"{path}.{name}" if path else name,
        role=role,
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        size_bytes=tensor.numel() * tensor.element_size(),
        tied_to=tied_to,
        kept_because=kept.get(path, "") if is_weight else "",
    )


def _role(path: str, name: str, module: nn.Module, tensor: Tensor, heads: set[str]) -> str:
    role = "other"
    if isinstance(module, NF4Linear) and name != "bias":
        weights = "head" if path in heads else "linear weights (NF4)"
        role = weights if name == "codes" else "quantization state"
    elif isinstance(module, Int8Rows):
        role = "head" if name == "codes" else "quantization state"
    elif not isinstance(tensor, nn.Parameter):
        role = "buffer"
    elif isinstance(module, nn.Embedding):
        role = "embedding"
    elif path in heads:
        role = "head"
    elif "norm" in type(module).__name__.lower() or "norm" in path.rpartition(".")[2].lower():
        role = "norm"
    elif name.rpartition("_")[2] == "bias":
        role = "bias"
    elif is_router(module) and tensor.dim() > 1:
        role = "router"
    elif tensor.dim() == 3 and tensor.shape[0] > 1:
        role = "experts"
    elif is_linear(module) or (isinstance(module, nn.Linear) and tensor.dim() == 2):
        role = "linear weights"
    elif isinstance(module, nn.modules.conv._ConvNd):
        role = "convolution"
    return role


def _summed(pairs: Iterator[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for key, size_bytes in pairs:
        sums[key] = sums.get(key, 0) + size_bytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
