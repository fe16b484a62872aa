"""How the proof holds its two models: whole, or a layer at a time where one does not fit whole.

Base + adapter runs in this process, the export in one of its own, never both at a time. On a CPU
the export stays mapped from its files; a GPU has to take all of it, four times what the base takes
in NF4. So the two are decided apart: the base may be whole where its export is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from qlora_trainer.base.device_memory import Memory
from qlora_trainer.base.spec import BaseSpec
from qlora_trainer.errors import UserError
from qlora_trainer.export.proof import Precision, ProofRequest, Row
from qlora_trainer.units import format_bytes

Held = Literal["model", "layer"]
_FLOAT_BYTES = 4
# A process' CUDA context and kernels, and what a row takes inside a layer: more than it is.
_BESIDE_CARD_BYTES = 2**30


@dataclass(frozen=True)
class Holding:
    """Whether each of the two is held whole ("model") or one "layer" at a time."""

    reference: Held = "model"
    export: Held = "model"


def reference_needs(
    tensors: Mapping[str, tuple[int, bool]],
    spec: BaseSpec,
    precisions: Sequence[Precision],
    device: torch.device,
    beside_bytes: int = 0,
) -> Memory:
    """Memory base + adapter takes when held whole.

    It holds a little over half a byte a weight in NF4 and the compute dtype elsewhere.

    Args:
        tensors: Name -> (elements, whether it is held in NF4).
        spec: How training held the base.
        precisions: Of the comparison.
        device: Where it runs.
        beside_bytes: On a GPU, beside the weights.
    """
    nf4_bytes = 0.5 + (0.016 if spec.double_quant else 4 / spec.block_size)
    wide = max(
        _FLOAT_BYTES if precision == "fp32" else spec.compute_dtype.itemsize
        for precision in precisions
    )
    weights = int(sum(n * (nf4_bytes if packed else wide) for n, packed in tensors.values()))
    # A GPU takes them one by one from the mapped files.
    return Memory(weights) if device.type != "cuda" else Memory(0, weights + beside_bytes)


def export_needs(
    elements: int,
    dtype: torch.dtype,
    precisions: Sequence[Precision],
    device: torch.device,
    beside_bytes: int = 0,
) -> Memory:
    """Memory the export takes when held whole by plain transformers.

    Args:
        elements: Of all its weights.
        dtype: In which it is written.
        precisions: Of the comparison; fp32 is cast in host memory before a GPU gets it.
        device: Where it runs.
        beside_bytes: On a GPU, beside the weights.
    """
    host = elements * _FLOAT_BYTES if "fp32" in precisions else 0
    if device.type != "cuda":
        return Memory(host)
    return Memory(host, max(host, elements * dtype.itemsize) + beside_bytes)


def beside_weights_bytes(rows: Sequence[Row], widest: int, dtype: torch.dtype) -> int:
    """What a GPU holds beside the weights while the longest row passes.

    The logits are there as they were computed, as those chosen of them, and in float32.

    Args:
        rows: As `chosen_rows` gives them.
        widest: Most columns the logits can have.
        dtype: Of the logits.
    """
    lengths = (len(value) for row in rows for value in row.values() if value.dim() == 1)
    logits = max(lengths, default=1) * widest * (2 * dtype.itemsize + _FLOAT_BYTES)
    return logits + _BESIDE_CARD_BYTES


def choose_holding(
    request: ProofRequest,
    reference: Memory,
    export: Memory,
    left: Memory,
    *,
    by_layer_possible: bool,
) -> Holding:
    """Decide how both are held, and say why where it is not as a whole.

    Args:
        request: What was asked for.
        reference: What base + adapter needs when whole.
        export: What the export needs when whole.
        left: What there is.
        by_layer_possible: The base's weights can be read a layer at a time.

    Raises:
        UserError: Base + adapter does not fit whole, and its layers cannot be had.
    """
    why = why_by_layer(request, "base + adapter", reference, left)
    if why is None:
        return Holding("model", choose_export_holding(request, "the export", export, left))
    if not by_layer_possible:
        anyway = " (--proof-by model holds it whole all the same)" * (request.by == "auto")
        raise UserError(
            f"the comparison cannot run layer by layer ({why}): the base is packed in 4 bits by "
            f"bitsandbytes and is opened whole{anyway}. Close other programs, or leave the proof "
            "out (--no-proof)"
        )
    request.say(f"comparing layer by layer: {why}")
    return Holding("layer", "layer")


def choose_export_holding(request: ProofRequest, what: str, needed: Memory, left: Memory) -> Held:
    """The same for an export alone, whose layers can always be had; `what` names it."""
    why = why_by_layer(request, what, needed, left)
    if why is None:
        return "model"
    request.say(f"running {what} layer by layer: {why}")
    return "layer"


def why_by_layer(request: ProofRequest, what: str, needed: Memory, left: Memory) -> str | None:
    """Why a model is to be held a layer at a time, or None where it is held whole."""
    if request.by != "auto":
        return "as asked" if request.by == "layer" else None
    kinds = (
        ("memory", needed.host_bytes, left.host_bytes),
        (f"the memory of {request.device}", needed.card_bytes, left.card_bytes),
    )
    short = [
        f"{what} as a whole needs about {format_bytes(need)} of {where}, {format_bytes(there)} "
        "are available"
        for where, need, there in kinds
        if need > there
    ]
    return "; ".join(short) or None
