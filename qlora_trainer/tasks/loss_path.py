"""How a model's logits come from its hidden states, and what they say of held-out tokens.

What stands between the decoder and the logits is read from the model's configuration *and held
against the model's own logits* on a few tokens; a head we do not understand keeps the plain path,
with the reason to be said aloud.

M tokens of the batch, N trained tokens, P tokens of the probe, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qlora_trainer.base.head import QuantizedHead
from qlora_trainer.base.head_product import HeadWeight
from qlora_trainer.base.host_embedding import compute_device
from qlora_trainer.base.host_head import HostHead
from qlora_trainer.tasks.linear_cross_entropy import (
    CACHE_ELEMENTS,
    Regularized,
    chunk_logits,
    default_chunk_tokens,
)
from qlora_trainer.tasks.task import Batch

CHUNKED = "logits are made in chunks of trained tokens"
SWITCHED_OFF = "train.chunked_loss is off: the logits of all tokens are made at once"
Result = TypeVar("Result")
_PROBE_TOKENS = 6
_TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 5e-3}
_TOLERANCE = 1e-4  # of any other dtype

Head = tuple[HeadWeight, Tensor | None]  # weight (V, D), bias (V,)


@dataclass(frozen=True)
class LossPath:
    """How logits come from hidden states: chunked by us, or by the model itself.

    Attributes:
        chunked: Our loss that never builds all logits; else the model's own logits.
        reason: Why, in words for the user.
        logit_scale: What the head's output is multiplied by.
        softcap: Soft-capping of the logits, if any.
    """

    chunked: bool
    reason: str
    logit_scale: float = 1.0
    softcap: float | None = None


def slice_for(model: nn.Module, on_cpu: bool | None) -> int | None:
    """Logits the loss widens at one time: what a CPU's cache holds, elsewhere a whole chunk.

    Args:
        model: Whose device answers where nobody says.
        on_cpu: Whether a CPU will compute it.
    """
    if on_cpu is None:
        on_cpu = compute_device(model).type == "cpu"
    return CACHE_ELEMENTS if on_cpu else None


def no_linear_head(head: Any) -> LossPath | None:
    """The plain path of a model whose output head is no plain linear layer; None if it is one."""
    if type(head) is nn.Linear or isinstance(head, (QuantizedHead, HostHead)):
        return None
    kind = "none" if head is None else type(head).__name__
    return LossPath(False, f"the output head is {kind}, not a plain linear layer")


def with_head_weight(head: Any, compute: Callable[[HeadWeight], Result]) -> Result:
    """What comes of computing with what a linear head multiplies with, (V, D).

    A quantized head stands for its own weight; one of the host is on the device meanwhile.

    Args:
        head: Of a model whose path is chunked.
        compute: Keeps no reference to the weight.
    """
    if isinstance(head, HostHead):
        return head.lend(compute)
    return compute(head if isinstance(head, QuantizedHead) else head.weight)


def hold_against_model(
    path: LossPath,
    model: Any,
    weight: HeadWeight,
    probe: Callable[[Tensor, HeadWeight], tuple[Tensor, Tensor] | None],
) -> LossPath:
    """The path, if its logits are the model's own, else the plain one.

    On `meta` there are no logits to compare: the structure alone has decided.

    Args:
        path: What the structure says.
        model: Put to evaluation mode meanwhile.
        weight: Of the head, (V, D).
        probe: From token ids (1, P) and the weight the model's own logits and ours, (P, V) both in
            fp32; None where the model's parts are not called as we know it.
    """
    if weight.is_meta:
        return path
    step = max(1, weight.shape[0] // (_PROBE_TOKENS + 1))
    tokens = torch.arange(1, _PROBE_TOKENS + 1, device=weight.device).mul_(step)[None]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = probe(tokens, weight)
    finally:
        model.train(was_training)
    difference = float("inf") if logits is None else _relative_difference(*logits)
    if difference <= _TOLERANCES.get(weight.dtype, _TOLERANCE):
        return path
    return LossPath(
        False,
        f"{type(model).__name__} makes its logits in a way we do not know (they differ by "
        f"{difference:.1%} from head times hidden states); full logits are kept, which needs "
        "more memory",
    )


def _relative_difference(own: Tensor, ours: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    if own.shape != ours.shape:
        return float("inf")
    return float((own - ours).abs().max() / own.abs().max().clamp_min(1e-12))


def full_cross_entropy(logits: Tensor, batch: Batch, regularized: Regularized) -> Tensor:
    """The loss summed over trained tokens, of the model's own logits (M, V)."""
    chosen = logits.index_select(0, batch["loss_positions"])  # (N, V)
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    loss = nn.functional.cross_entropy(
        chosen,
        batch["loss_targets"],
        reduction="sum",
        label_smoothing=regularized.label_smoothing,
    )
    if regularized.z_loss:
        loss = loss + regularized.z_loss * chosen.logsumexp(1).square().sum()
    return loss


@torch.no_grad()
def token_sums(
    outputs: Tensor, head: Head | None, batch: Batch, path: LossPath, chunk_tokens: int | None
) -> dict[str, Tensor]:
    """Loss and right tokens, summed; the largest logit is found chunk by chunk.

    Args:
        outputs: Hidden states (M, D), or without a head the model's own logits (M, V).
        head: Makes logits of hidden states.
        batch: Says in `loss_positions` (N,) which outputs are asked, in `loss_targets` (N,) for
            which token.
        path: How logits are made.
        chunk_tokens: Tokens whose logits exist at one time; None chooses by vocabulary.
    """
    vocabulary = outputs.shape[-1] if head is None else head[0].shape[0]
    chunk = chunk_tokens or default_chunk_tokens(vocabulary)
    rows, targets = batch["loss_positions"], batch["loss_targets"]
    loss = torch.zeros((), dtype=torch.float32, device=rows.device)
    right = torch.zeros((), dtype=torch.int64, device=rows.device)
    for part, labels in zip(rows.split(chunk), targets.split(chunk), strict=True):
        logits = outputs.index_select(0, part)
        if head is not None:
            logits = chunk_logits(logits, *head, path.logit_scale, path.softcap)
        loss += nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        right += (logits.argmax(1) == labels).sum()
    return {"loss": loss, "token_accuracy": right}
