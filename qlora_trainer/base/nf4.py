"""A frozen linear layer held in NF4, that trains through and never builds what it can rebuild.

Codes and scales are plain buffers, so `.to(device)`, `state_dict`, `deepcopy`, weightless (`meta`)
tensors and the audit see them. A product rebuilds the dense weight, multiplies and lets it go; the
backward pass rebuilds it again, saves no activation and computes a gradient for the input only.

bitsandbytes' own `Linear4bit` is not used for computing: on CPUs with avx512_bf16 it re-packs its
weight in place at the first product in evaluation mode, rounds its scales to bf16, and lets no
gradient through from then on.

Legend: I in_features, O out_features.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from qlora_trainer.base.quantize import (
    NF4Tensors,
    dequantize_nf4,
    empty_nf4,
    quantize_nf4,
)
from qlora_trainer.base.weight_parts import as_output, frozen_input_gradient, frozen_product

# Rows up to which bitsandbytes' fused 4-bit kernel beats rebuilding the dense weight on CUDA
# (decoding one token for a few sequences); it refuses larger ones by itself.
_FEW_ROWS = 8


class NF4Linear(nn.Module):
    """`x @ weight.T + bias` with the weight in NF4; frozen.

    Build it with `quantize`, `empty` or `from_linear4bit`.

    Attributes:
        in_features: I.
        out_features: O.
        block_size: Weights per scale.
        compute_dtype: What products are computed in.
        fan_in_fan_out: The checkpoint stores the weight as (I, O), as GPT-2's Conv1D does; here
            it is (O, I) all the same. Whoever writes the weight back must transpose it.
        on_cpu: Whether a CPU computes the products; None: as the codes lie. Foresight says it.
        codes, absmax, absmax_scale, absmax_code, absmax_offset: As in `NF4Tensors`.
        bias: (O,) in the compute dtype, or None.
    """

    codes: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_code: Tensor | None
    absmax_offset: Tensor | None

    def __init__(
        self,
        tensors: NF4Tensors,
        bias: Tensor | None,
        *,
        in_features: int,
        out_features: int,
        block_size: int,
        compute_dtype: torch.dtype,
        fan_in_fan_out: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.block_size = block_size
        self.compute_dtype = compute_dtype
        self.fan_in_fan_out = fan_in_fan_out
        self.on_cpu: bool | None = None
        self.register_buffer("codes", tensors.codes)
        self.register_buffer("absmax", tensors.absmax)
        self.register_buffer("absmax_scale", tensors.absmax_scale)
        self.register_buffer("absmax_code", tensors.absmax_code)
        self.register_buffer("absmax_offset", tensors.absmax_offset)
        self.bias = (
            None
            if bias is None
            else nn.Parameter(bias.detach().to(compute_dtype), requires_grad=False)
        )

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        *,
        compute_dtype: torch.dtype,
        device: torch.device,
        block_size: int = 64,
        double_quant: bool = True,
        fan_in_fan_out: bool = False,
    ) -> "NF4Linear":
        """Quantize a dense weight from the dtype it is in.

        Args:
            weight: (O, I); or (I, O) with `fan_in_fan_out`.
            bias: (O,) or None.
            compute_dtype: What products are computed in.
            device: Where to quantize and to stay.
            block_size: Weights per scale.
            double_quant: Keep the scales in 8 bits.
            fan_in_fan_out: The weight comes transposed.

        Raises:
            ValueError: A dtype or block size bitsandbytes does not know, or a weight not finite.
        """
        dense = weight.detach().to(device)
        if fan_in_fan_out:
            dense = dense.t().contiguous()
        out_features, in_features = dense.shape
        return cls(
            quantize_nf4(dense, block_size=block_size, double_quant=double_quant),
            # A copy, also where nothing changes: the source may be a mapped file.
            None if bias is None else bias.detach().to(device, compute_dtype, copy=True),
            in_features=in_features,
            out_features=out_features,
            block_size=block_size,
            compute_dtype=compute_dtype,
            fan_in_fan_out=fan_in_fan_out,
        )

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        compute_dtype: torch.dtype,
        device: torch.device,
        block_size: int = 64,
        double_quant: bool = True,
        fan_in_fan_out: bool = False,
    ) -> "NF4Linear":
        """A layer of the right shapes and bytes, with nothing in it (for `meta` and foresight)."""
        return cls(
            empty_nf4(
                in_features * out_features,
                block_size=block_size,
                double_quant=double_quant,
                device=device,
            ),
            torch.empty(out_features, dtype=compute_dtype, device=device) if bias else None,
            in_features=in_features,
            out_features=out_features,
            block_size=block_size,
            compute_dtype=compute_dtype,
            fan_in_fan_out=fan_in_fan_out,
        )

    @classmethod
    def from_linear4bit(
        cls,
        source: nn.Module,
        *,
        compute_dtype: torch.dtype,
        device: torch.device,
        fan_in_fan_out: bool = False,
    ) -> "NF4Linear":
        """Take over a quantized bitsandbytes `Linear4bit`, its bits unchanged.

        Raises:
            ValueError: It is not quantized yet, in another format than NF4, or re-packed by
                bitsandbytes for evaluation on a CPU.
        """
        weight = cast(Any, source.weight)
        state = weight.quant_state
        if state is None or state.quant_type != "nf4":
            kind = "not quantized" if state is None else f"quantized as {state.quant_type}"
            raise ValueError(f"is {kind}; only nf4 can be taken over")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "has evaluated on the CPU, which rounds its scales to bf16 for good; load it again"
            )
        if state.nested and state.state2.blocksize != 256:
            raise ValueError(f"double-quantized in blocks of {state.state2.blocksize}, not 256")
        # quant_storage may be another dtype holding the same bytes.
        codes = weight.data.contiguous().view(torch.uint8).reshape(-1)
        nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
        tensors = [t.detach().to(device, copy=True) for t in (codes, state.absmax, *nested)]
        bias = cast("Tensor | None", source.bias)
        out_features, in_features = state.shape
        return cls(
            NF4Tensors(*tensors),
            None if bias is None else bias.detach().to(device, compute_dtype, copy=True),
            in_features=in_features,
            out_features=out_features,
            block_size=state.blocksize,
            compute_dtype=compute_dtype,
            fan_in_fan_out=fan_in_fan_out,
        )

    @property
    def tensors(self) -> NF4Tensors:
        """Codes and scales as they stand now."""
        return NF4Tensors(
            self.codes, self.absmax, self.absmax_scale, self.absmax_code, self.absmax_offset
        )

    @property
    def double_quant(self) -> bool:
        """Whether the block scales are themselves in 8 bits."""
        return self.absmax_scale is not None

    @property
    def weight(self) -> Tensor:
        """The dense weight in the compute dtype, rebuilt at every call; for code that reads one."""
        return self.dense_weight()

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Rebuild the weight. -> (O, I) in `dtype` (default: the compute dtype)."""
        return dequantize_nf4(
            self.tensors,
            (self.out_features, self.in_features),
            self.block_size,
            dtype or self.compute_dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Multiply. x: (..., I) -> (..., O), in the dtype of x."""
        computed = x.to(self.compute_dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            y = cast(Tensor, _FrozenProduct.apply(computed, self))
        else:
            y = self.product(computed)
        return y.to(x.dtype)

    def product(self, x: Tensor) -> Tensor:
        """Multiply without recording a gradient. x: (..., I) in the compute dtype -> (..., O)."""
        few = 0 < x.numel() <= _FEW_ROWS * self.in_features
        if few and x.device.type == "cuda" and self.in_features % self.block_size == 0:
            return self._fused_product(x)
        y = frozen_product(self, x.reshape(-1, self.in_features))
        return y.view(*x.shape[:-1], self.out_features)

    def _fused_product(self, x: Tensor) -> Tensor:
        scales = (
            {"absmax": self.absmax}
            if self.absmax_scale is None
            else {
                "absmax": self.absmax_scale,
                "absmax_8bit": self.absmax,
                "absmax_code": self.absmax_code,
                "absmax_offset": self.absmax_offset,
            }
        )
        y: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
            x.contiguous(),
            self.codes.view(-1, 1),
            (self.out_features, self.in_features),
            blocksize=self.block_size,
            quant_type="nf4",
            bias=self.bias,
            **scales,
        )
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> "NF4Linear":
        """Follow `model.to(...)`: a dtype changes what is computed in, never the stored scales."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, original in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != original.dtype:
                # From the original: rounding the scales to 16 bit would change every weight.
                self._buffers[name] = original.to(moved.device)
        probe = torch.empty(0, dtype=self.compute_dtype, device=self.codes.device)
        self.compute_dtype = fn(probe).dtype
        return self

    def extra_repr(self) -> str:
        """What `print(model)` says of this layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block_size={self.block_size}, "
            f"double_quant={self.double_quant}, compute_dtype={self.compute_dtype}"
        )


class _FrozenProduct(torch.autograd.Function):
    """y = x W^T + b with W frozen: dL/dx = dL/dy W, and nothing of the batch is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        y = layer.product(x)
        return as_output(y, y.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (grad_y,) = grads
        if not ctx.needs_input_grad[0]:
            return None, None
        g = grad_y.reshape(-1, grad_y.shape[-1])
        return frozen_input_gradient(ctx.layer, g).view(ctx.shape), None
