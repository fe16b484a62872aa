"""What an output head gives, written into memory that is there.

Of so many more outputs than rows torch's library on a CPU multiplies strips in fp32 faster than the
whole (`scripts/benchmark_head.py`).

C rows of hidden states, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from qlora_trainer.base.head import QuantizedHead

HeadWeight = Tensor | QuantizedHead  # (V, D)
STRIP_ROWS = 512  # of the vocabulary, in one product on a CPU in fp32


def head_product(y: Tensor, x: Tensor, weight: HeadWeight, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` written into `y`, no gradient recorded. -> `y`.

    Args:
        y: (C, V) in the dtype of `x`.
        x: (C, D).
        weight: (V, D), dense or quantized.
        bias: (V,) or None.
    """
    if isinstance(weight, QuantizedHead):
        return weight.product_into(y, x, bias)
    in_strips = x.device.type == "cpu" and x.dtype == torch.float32
    size = STRIP_ROWS if in_strips else weight.shape[0]
    for first in range(0, weight.shape[0], size):
        rows = slice(first, first + size)
        if bias is None:
            torch.mm(x, weight[rows].t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, weight[rows].t(), out=y[:, rows])
    return y
