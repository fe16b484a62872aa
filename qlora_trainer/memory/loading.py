"""The load as the tracker sees it: each tensor of the base born on the card, or left on the host.

A linear weight is on the card in 16 bit while it is quantized there. A quantized head comes from
the host as it is; a streamed layer is quantized on the card and goes back at once, of a sharded
one a part stays.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from qlora_trainer.base.audit import audit_base
from qlora_trainer.base.head import QuantizedHead
from qlora_trainer.base.host_embedding import HostEmbedding
from qlora_trainer.base.host_head import HostHead
from qlora_trainer.base.layer_shards import WeightlessShards
from qlora_trainer.base.layer_stream import HostStore, stream_of
from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.memory.tracker import AllocationTracker

ROLE_COMPONENTS = {
    "linear weights (NF4)": "base weights",
    "linear weights": "base weights",
    "experts": "base weights",
    "router": "base weights",
    "convolution": "base weights",
    "quantization state": "quantization state",
    "embedding": "embeddings and heads",
    "head": "embeddings and heads",
}


@dataclass
class LoadedBase:
    """What a base is, beside its births.

    Attributes:
        parameters: Numbers, unpacked.
        largest_tensor_bytes: The largest tensor on its way to the card.
        host_table_bytes: Token embeddings left in host memory.
        waiting_bytes: Pinned host memory of streamed layers, and of a head that waits there.
        part_bytes: Of sharded layers, what this process holds.
        large_unquantized: Path -> bytes of weights outside NF4.
    """

    parameters: int = 0
    largest_tensor_bytes: int = 0
    host_table_bytes: int = 0
    waiting_bytes: int = 0
    part_bytes: int = 0
    large_unquantized: dict[str, int] = field(default_factory=dict)


def watch_load(tracker: AllocationTracker, model: Any) -> LoadedBase:
    """Log the load of a weightless base."""
    with _disable_current_modes():
        audit = {item.name: item for item in audit_base(model).tensors}
    stream, loaded = stream_of(model), LoadedBase()
    store = None if stream is None else stream.store
    streamed = {} if stream is None else stream.names
    loaded.waiting_bytes = store.host_bytes if isinstance(store, HostStore) else 0
    loaded.waiting_bytes += sum(m.host_bytes for m in model.modules() if isinstance(m, HostHead))
    dense = _quantized_on_the_card(model)
    on_host = {
        f"{path}.base.weight"
        for path, module in model.named_modules()
        if isinstance(module, HostEmbedding)
    }
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors |= dict(model.named_buffers())
    if isinstance(store, WeightlessShards):
        loaded.part_bytes = store.shard_bytes
        for index, part in enumerate(store.shards):
            whole = {name: tensors[name] for name, layer in streamed.items() if layer == index}
            _watch_sharing(tracker, whole, dense, part)
        dense = {name: size for name, size in dense.items() if name not in streamed}
    for name, tensor in tensors.items():
        item = audit.get(name)
        role = item.role if item is not None else "other"
        component = ROLE_COMPONENTS.get(role, "norms and other")
        if name in dense:
            with tracker.temporary(dense[name], "weight before quantization"):
                if name in streamed:  # what stands in its place from now on takes nothing
                    tracker.free(tracker.allocate(tensor.nbytes, "weight on its way to the host"))
                tracker.adopt(tensor, "load", component)
        else:
            tracker.adopt(tensor, "load", component)
        if name in on_host:
            tracker.move_to_host(tensor)
            loaded.host_table_bytes += tensor.nbytes
        if item is not None and item.kept_because:
            loaded.large_unquantized[name] = item.size_bytes
    loaded.parameters = sum(
        2 * t.numel() if t.dtype == torch.uint8 else t.numel()
        for n, t in tensors.items()
        if n.endswith(".codes") or isinstance(t, nn.Parameter)
    )
    sizes = [t.nbytes for t in tensors.values()] + list(dense.values())
    loaded.largest_tensor_bytes = max(sizes, default=0)
    return loaded


def _watch_sharing(
    tracker: AllocationTracker, whole: dict[str, Tensor], dense: dict[str, int], part: Tensor
) -> None:
    """Log one layer on the card, then as one buffer beside it, then as the part that stays."""
    taken = []
    for name, tensor in whole.items():
        with tracker.temporary(dense.get(name, 0), "weight before quantization"):
            taken.append(tracker.allocate(tensor.nbytes, "layer to be shared", "layer parts"))
    size_bytes = sum(tensor.nbytes for tensor in whole.values())
    with tracker.temporary(size_bytes, "layer in one piece"):
        tracker.adopt(part, "load", "layer parts")
    for index in taken:
        tracker.free(index)


def _quantized_on_the_card(model: Any) -> dict[str, int]:
    """Path of NF4 codes -> bytes of the 16-bit weight they come from; a head's comes as codes."""
    modules = dict(model.named_modules())
    heads = tuple(f"{name}." for name, part in modules.items() if isinstance(part, QuantizedHead))
    return {
        f"{name}.codes": part.out_features * part.in_features * 2
        for name, part in modules.items()
        if isinstance(part, NF4Linear) and not name.startswith(heads)
    }
