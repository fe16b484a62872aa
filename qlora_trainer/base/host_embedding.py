"""Token embeddings in host memory: a look-up moves a row per token and never needs the table.

Llama-3.1-8B's table is 1,002 MiB, of which a step of 2,048 tokens reads 16. The rows looked up on
the host are the table's bits, so nothing changes but where it lies. Cost: the ids come to the host
and the rows go to the device at the start of every pass, before anything is computed. Foresight
books a weightless table (`meta`) as the host's, and both copies (`memory/transfers.py`).

Given up: training them, and tables tied to an output head on the device, which needs them whole.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from qlora_trainer.base.transfers import Transfers
from qlora_trainer.errors import UserError


class HostEmbedding(nn.Module):
    """An embedding whose table stays on the host wherever the model goes.

    Args:
        base: The embedding, of any class; its own forward does the look-up.
        transfers: Copies of the device the model computes on; another may be put in its place.
    """

    def __init__(self, base: nn.Module, transfers: Transfers) -> None:
        super().__init__()
        self.base, self.transfers = base, transfers

    @property
    def weight(self) -> Tensor:
        """The table, for code that asks for its shape or dtype."""
        return cast(Tensor, self.base.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, T) on any device -> (B, T, D) there."""
        return self.transfers.compute_on_host(self.base, ids)

    def _apply(self, fn: Any, recurse: bool = True) -> "HostEmbedding":
        """Follow `model.to(dtype)`, and to `meta`; stay on the host where the model moves."""
        probe = fn(torch.empty(0, dtype=self.weight.dtype, device=self.transfers.device))
        if probe.device != self.transfers.device:
            self.transfers = Transfers(probe.device)
        if probe.device.type == "meta":
            return cast(HostEmbedding, super()._apply(fn, recurse))
        if probe.dtype != self.weight.dtype:
            self.base.to(probe.dtype)
        return self


def compute_device(model: nn.Module) -> torch.device:
    """Where a model computes; its first parameter may be the table that was left on the host."""
    tables = {
        id(table)
        for module in model.modules()
        if isinstance(module, HostEmbedding)
        for table in module.parameters()
    }
    return next(p.device for p in model.parameters() if id(p) not in tables)


def host_table(model: Any, beside: Sequence[Tensor] = ()) -> Tensor:
    """The table that may stay on the host.

    Args:
        model: As transformers made it.
        beside: What stays there as well: the head's weight.

    Raises:
        UserError: The model has none of its own, or it is tied to a head the device holds.
    """
    embedding = model.get_input_embeddings()
    table = getattr(embedding, "weight", None)
    if not isinstance(embedding, nn.Embedding) or not isinstance(table, Tensor):
        raise UserError(
            "model.embeddings_on_host = true: this model looks tokens up in no plain table; "
            "set model.embeddings_on_host: false"
        )
    owners = [name for name, p in model.named_parameters(remove_duplicate=False) if p is table]
    if len(owners) > (2 if any(table is other for other in beside) else 1):
        raise UserError(
            f"model.embeddings_on_host = true: one weight serves as {' and '.join(owners)}, which "
            "the device needs; nothing is gained, set model.embeddings_on_host: false (or "
            "model.head_on_host: true beside it, if one of them is the head)"
        )
    return table


def keep_on_host(model: Any, device: torch.device) -> None:
    """Put the wrapper around the model's embedding; its table must be where it shall stay.

    transformers takes the device of a model's first parameter, the table, for the model's, and
    `generate` moves ids, mask and positions there at every token. So this instance, and no other
    of its class, says where it computes.

    Args:
        model: All of it settled.
        device: Where it computes.
    """
    model.set_input_embeddings(HostEmbedding(model.get_input_embeddings(), Transfers(device)))
    kind = type(model)
    says = {"__module__": kind.__module__, "device": property(compute_device)}
    model.__class__ = type(kind.__name__, (kind,), says)
