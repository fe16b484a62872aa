"""How the base is to be held, as plain values."""

from dataclasses import dataclass, replace

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
        head_on_host: Leave the output head in host memory between losses.
        head_bits: Of the output head: 16 (the compute dtype), 8 or 4.
        stream_layers: Leave the layers in host memory, one on the device at a time.
        layer_parts: Processes that share the layers, each with its part of all; 1: none do.
    """

    quantization: str
    double_quant: bool = True
    block_size: int = 64
    compute_dtype: torch.dtype = torch.bfloat16
    attention: str | None = None
    keep_unquantized: tuple[str, ...] = ()
    trust_remote_code: bool = False
    embeddings_on_host: bool = False
    head_on_host: bool = False
    head_bits: int = 16
    stream_layers: bool = False
    layer_parts: int = 1

    def plain(self) -> "BaseSpec":
        """The same base, whole on its device, as exports and proofs take it."""
        return replace(
            self, embeddings_on_host=False, head_on_host=False, head_bits=16, stream_layers=False,
            layer_parts=1,
        )  # fmt: skip
