"""What CUDA does that an operator log on weightless tensors does not show: one table of rules.

Each rule is a method of `CudaRules`, keyed by operator, with the source it was read from; the tests
hold each to its numbers. Nothing here is fitted: a byte belongs to a named tensor or workspace.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operators

from qlora_trainer.memory.attention_workspaces import (
    efficient_backward_kernel,
    efficient_backward_workspace_bytes,
    flash_backward_workspaces,
    varlen_backward_workspaces,
)
from qlora_trainer.memory.bitsandbytes_rules import uses_fused_kernel
from qlora_trainer.memory.gpus import MIB, Gpu
from qlora_trainer.memory.tracker import AllocationTracker, Rule

aten = torch.ops.aten


def cublas_workspace_bytes(gpu: Gpu) -> int:
    """Workspace of one cuBLAS handle, taken from the caching allocator.

    Source: aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize: `:4096:2:16:8`, and
    32 MiB from compute capability 9.0.
    """
    return 32 * MIB if gpu.capability >= 90 else 2 * 4096 * 1024 + 8 * 16 * 1024


def in_autograd_thread() -> bool:
    """Whether the autograd engine is calling (its device thread has cuBLAS handles of its own)."""
    return bool(torch._C._current_graph_task_id() != -1)


class CudaRules:
    """The rules for one card; `table()` is handed to the tracker."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def table(self) -> Mapping[Any, Rule]:
        """Operator overload -> rule."""
        rules: dict[Any, Rule] = dict.fromkeys(
            (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default),
            self.matrix_product,
        )
        rules[aten._softmax_backward_data.default] = self.softmax_backward
        rules[aten._scaled_dot_product_efficient_attention.default] = self.efficient_forward
        rules[aten._scaled_dot_product_efficient_attention_backward.default] = (
            self.efficient_backward
        )
        rules[aten._scaled_dot_product_flash_attention.default] = self.flash_forward
        rules[aten._scaled_dot_product_flash_attention_backward.default] = self.flash_backward
        varlen = torch.ops.torch_attn
        rules[varlen._varlen_attn.default] = self.varlen_forward
        rules[varlen._varlen_attn_backward.default] = self.varlen_backward
        rules[aten.native_dropout.default] = self.dropout
        rules.update(self._bitsandbytes())
        return rules

    def _bitsandbytes(self) -> dict[Any, Rule]:
        try:
            import bitsandbytes  # noqa: F401 - registers its operators
        except ImportError:
            return {}
        return {torch.ops.bitsandbytes.gemm_4bit.default: self.gemm_4bit}

    # -- products
    def matrix_product(self, tracker: AllocationTracker, func: Any, args: Any, kwargs: Any) -> Any:
        """The first product of a thread makes its cuBLAS handle's workspace, which stays.

        Source: getCurrentCUDABlasHandle, aten/src/ATen/cuda/CublasHandlePool.cpp. The output is
        allocated before (structured kernels), so it is recorded first.
        """
        result = tracker.run(func, args, kwargs)
        tracker.adopt(result, func.__name__)
        self.use_cublas(tracker)
        return result

    def use_cublas(self, tracker: AllocationTracker) -> None:
        """Make the workspace of this thread's cuBLAS handle if it is not there yet."""
        thread = "autograd" if in_autograd_thread() else "main"
        if thread not in tracker.state:
            tracker.state[thread] = tracker.allocate(
                cublas_workspace_bytes(self.gpu), f"cublas workspace ({thread} thread)"
            )

    def gemm_4bit(self, tracker: AllocationTracker, func: Any, args: Any, kwargs: Any) -> Any:
        """`gemm_4bit` hides a dequantized weight unless its fused kernel is chosen.

        Source: bitsandbytes/backends/cuda/ops.py, `_dequant_linear_fallback` and the registered
        kernel: absmax (when double-quantized, twice: product, then sum), the weight, the product.
        """
        x, _packed, shape = args[0], args[1], args[2]
        blocksize = args[4]
        absmax_8bit = kwargs.get("absmax_8bit", args[7] if len(args) > 7 else None)
        rows = x.numel() // x.shape[-1]
        if x.shape[-1] % blocksize == 0 and uses_fused_kernel(
            self.gpu.compute_capability, self.gpu.multiprocessors, x.dtype, rows, shape[0], shape[1]
        ):
            tracker.count_kernel("bitsandbytes gemm_4bit, fused")
            return func(*args, **kwargs)
        tracker.count_kernel("bitsandbytes gemm_4bit, dequantized")
        held = []
        if absmax_8bit is not None:
            first = tracker.allocate(4 * absmax_8bit.numel(), "gemm_4bit absmax")
            held.append(tracker.allocate(4 * absmax_8bit.numel(), "gemm_4bit absmax + offset"))
            held.append(first)
        weight = tracker.allocate(
            shape[0] * shape[1] * x.element_size(),
            "gemm_4bit dequantized weight",
            "dequantized weights",
        )
        result = func(*args, **kwargs)
        tracker.adopt(result, func.__name__)
        self.use_cublas(tracker)
        for index in (weight, *held):
            tracker.free(index)
        return result

    # -- softmax and dropout
    def softmax_backward(
        self, tracker: AllocationTracker, func: Any, args: Any, kwargs: Any
    ) -> Any:
        """`grad * output` is a full temporary beside the result.

        Source: softmax_backward_cuda_out, aten/src/ATen/native/cuda/SoftMax.cu.
        """
        result = tracker.run(func, args, kwargs)
        tracker.adopt(result, func.__name__)
        grad, output = args[0], args[1]
        wide = torch.promote_types(grad.dtype, output.dtype)
        with tracker.temporary(output.numel() * wide.itemsize, "softmax backward: grad * output"):
            return result

    def dropout(self, tracker: AllocationTracker, func: Any, args: Any, kwargs: Any) -> Any:
        """CUDA keeps a boolean mask (fused_dropout, aten/src/ATen/native/cuda/Dropout.cu)."""
        tracker.count_kernel("native_dropout with a boolean mask")
        return func(*args, **kwargs)

    # -- attention
    def efficient_forward(
        self, tracker: AllocationTracker, func: Any, args: Any, kwargs: Any
    ) -> Any:
        """Output, log-sum-exp padded to 32, and an fp32 accumulator for wide half-precision heads.

        Source: _efficient_attention_forward, attention.cu; seed and offset stay on the CPU.
        """
        tracker.count_kernel("memory-efficient attention")
        query, value = args[0], args[2]
        result = func(*args, **kwargs)
        tracker.adopt(result[0], func.__name__)
        tracker.adopt(result[1], func.__name__)
        for on_cpu in result[2:]:
            tracker.ignore(on_cpu)
        if value.shape[-1] > 128 and query.dtype != torch.float32:
            with tracker.temporary(4 * result[0].numel(), "attention output accumulator"):
                return result
        return result

    def efficient_backward(
        self, tracker: AllocationTracker, func: Any, args: Any, kwargs: Any
    ) -> Any:
        """Gradients, delta and the workspace (attention_backward.cu)."""
        tracker.count_kernel("memory-efficient attention, backward")
        grad_out, query, key, value, out = args[0], args[1], args[2], args[3], args[5]
        batch, heads, queries, head_size = query.shape
        held = []
        if not grad_out.transpose(1, 2).is_contiguous():
            held.append(
                tracker.allocate(
                    grad_out.numel() * grad_out.element_size(),
                    "attention backward: contiguous grad",
                )
            )
        result = func(*args, **kwargs)
        for part in result:
            if part is not None:
                tracker.adopt(part, func.__name__)
        width = max(head_size, value.shape[-1])
        kernel = efficient_backward_kernel(self.gpu, query.dtype, width)
        rows = 4 * batch * heads * queries
        if kernel.computes_delta:
            held.append(tracker.allocate(rows, "attention backward: delta"))
        else:
            wide = tracker.allocate(4 * out.numel(), "attention backward: grad * out")
            summed = tracker.allocate(rows, "attention backward: sum")
            held.append(tracker.allocate(rows, "attention backward: delta"))
            tracker.free(summed)
            tracker.free(wide)
        shape = (batch, heads, queries, key.shape[2], head_size)
        held.append(
            tracker.allocate(
                efficient_backward_workspace_bytes(kernel, query.dtype, shape),
                "attention backward: workspace",
            )
        )
        for index in reversed(held):
            tracker.free(index)
        return result

    def flash_forward(self, tracker: AllocationTracker, func: Any, args: Any, kwargs: Any) -> Any:
        """Output and log-sum-exp; seed and offset are two small tensors on the card."""
        tracker.count_kernel("flash attention")
        return func(*args, **kwargs)

    def flash_backward(self, tracker: AllocationTracker, func: Any, args: Any, kwargs: Any) -> Any:
        """softmax_d and dq_accum in fp32; dK and dV expanded to all heads for grouped queries.

        Source: mha_bwd, aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp.
        """
        tracker.count_kernel("flash attention, backward")
        workspaces = flash_backward_workspaces(args[1], args[2])
        return _flash_backward(tracker, func, args, kwargs, workspaces)

    def varlen_forward(self, tracker: AllocationTracker, func: Any, args: Any, kwargs: Any) -> Any:
        """Output, log-sum-exp and two numbers of a random state that is not used."""
        tracker.count_kernel("variable-length flash attention")
        return func(*args, **kwargs)

    def varlen_backward(self, tracker: AllocationTracker, func: Any, args: Any, kwargs: Any) -> Any:
        """As `flash_backward`, over the row's tokens, with 128 rows more for every example.

        Source: mha_varlen_bwd, aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp.
        """
        tracker.count_kernel("variable-length flash attention, backward")
        query, key, starts = args[1], args[2], args[6]
        workspaces = varlen_backward_workspaces(query, key, starts.numel() - 1)
        return _flash_backward(tracker, func, args, kwargs, workspaces)


def _flash_backward(
    tracker: AllocationTracker, func: Any, args: Any, kwargs: Any, workspaces: Mapping[str, int]
) -> Any:
    """The gradients, and beside them for a moment the workspaces."""
    result = func(*args, **kwargs)
    for part in result:
        tracker.adopt(part, func.__name__)
    held = [tracker.allocate(size, f"flash backward: {name}") for name, size in workspaces.items()]
    for index in reversed(held):
        tracker.free(index)
    return result
