"""Adding the low-rank product to a weight, exactly and in float32.

    linear, conv1d    delta = s B A           (out, in), stored (in, out) for Conv1D of GPT-2
    conv2d            delta[o, i, :, :] = s sum_r B[o, r] A[r, i, :, :]
    embedding         delta = s (B A)^T       (rows, D), since a row of the table is a column of A

Float32 here, whatever the adapter's dtype: rounding to the checkpoint's dtype is the writer's act,
done once, after the sum. B is scaled before the product so that no second dense tensor is made.
"""

from typing import Literal

import torch
from torch import Tensor

KindName = Literal["linear", "conv1d", "conv2d", "embedding"]


def low_rank_delta(lora_A: Tensor, lora_B: Tensor, scale: float, kind: KindName) -> Tensor:
    """Dense float32 update in the layout of the base module's weight.

    Args:
        lora_A: (r, in), for conv2d (r, in, kh, kw), for embedding (r, rows).
        lora_B: (out, r), for conv2d (out, r, 1, 1), for embedding (D, r).
        scale: Factor of the product.
        kind: How the base module stores its weight.

    >>> low_rank_delta(torch.ones(1, 3), torch.ones(2, 1), 2.0, "conv1d").shape
    torch.Size([3, 2])
    """
    a = lora_A.detach().float()
    b = lora_B.detach().float().flatten(1) * scale  # (out, r)
    if kind == "conv2d":
        return (b @ a.flatten(1)).view(b.shape[0], *a.shape[1:])
    if kind == "linear":
        return b @ a
    return a.t() @ b.t()


def merged_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, kind: KindName
) -> Tensor:
    """Float32 sum of a base weight and its low-rank update, in the weight's own layout.

    Raises:
        ValueError: The shapes do not belong together.
    """
    delta = low_rank_delta(lora_A, lora_B, scale, kind)
    if delta.shape != weight.shape:
        raise ValueError(
            f"the {kind} update has shape {tuple(delta.shape)}, its weight {tuple(weight.shape)}"
        )
    return delta.add_(weight.detach().to(device=delta.device, dtype=torch.float32))
