"""How the base is to be held, as plain values."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BaseSpec:
    """How the base is to be held.

    Attributes:
        quantization: "nf4" or "none" (16 bit, or 32 with an fp32 compute dtype).
        double_quant: Keep block scales in 8 bits.
        block_size: Weights per scale.
        compute_dtype: Of products, norms, embeddings, heads and the residual stream.
        attention: transformers' `attn_implementation`, or None for its own choice.
        keep_unquantized: More layers to leave in 16 bit, by path or part of a path.
        trust_remote_code: Whether the checkpoint may bring its own Python.
        embeddings_on_host: Leave the table of token embeddings in host memory.
    """

    quantization: str
    double_quant: bool = True
    block_size: int = 64
    compute_dtype: torch.dtype = torch.bfloat16
    attention: str | None = None
    keep_unquantized: tuple[str, ...] = ()
    trust_remote_code: bool = False
    embeddings_on_host: bool = False
