"""The output head and the cross-entropy as one function that never holds the logits of all tokens.

Full logits of 4,096 tokens over a vocabulary of 128,256 are 2 GiB in fp32, several times over. Only
tokens whose label is trained reach the head, a chunk at a time; the gradient with respect to the
hidden states is computed in the forward while the chunk's probabilities are at hand (Cut
Cross-Entropy, Wijmans et al. 2024, arXiv:2411.09009 and Liger Kernel do the same), written into
one buffer the size of the decoder's output, and merely scaled in the backward. A head in 8 or 4
bits is dequantized tile by tile for each chunk, once each way. A chunk's logits stay in the head's
dtype and become their own gradient, a slice of tokens at a time: fp32 is one slice, on a GPU the
whole chunk (half of it where soft-capping needs a second such tensor), and on a CPU so few tokens
that the slice's eight passes find it in the cache. Given up: double backward, and a second backward
through the same graph.

M tokens of the batch, N trained, C of a chunk, S of a slice; D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_trainer.base.head import QuantizedHead
from qlora_trainer.base.head_product import HeadWeight, head_product


@dataclass(frozen=True)
class Regularized:
    """What is added to the cross-entropy while training; both 0 leave it as it is.

    Attributes:
        label_smoothing: Share of the target spread over the whole vocabulary, as torch's
            `cross_entropy` does it (Szegedy et al. 2015, arXiv:1512.00567, section 7).
        z_loss: Factor of the squared log-sum-exp of each token's logits, which keeps them from
            drifting (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, section 5).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


PLAIN = Regularized()
CHUNK_ELEMENTS = 2**24  # logits of one chunk: 64 MiB in fp32
CACHE_ELEMENTS = 2**21  # logits of one slice on a CPU: 8 MiB in fp32


def default_chunk_tokens(vocabulary_size: int) -> int:
    """Tokens of a chunk such that its fp32 logits take about 64 MiB.

    >>> default_chunk_tokens(128_256), default_chunk_tokens(49_152)
    (130, 341)
    """
    return max(16, CHUNK_ELEMENTS // vocabulary_size)


def chunk_logits(
    hidden: Tensor,
    weight: HeadWeight,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """Logits of a few tokens in fp32 (fp64 for fp64 inputs), scaled and soft-capped: (C, V).

    No gradient is recorded.
    """
    rows = hidden.to(weight.dtype)
    raw = head_product(rows.new_empty(rows.shape[0], weight.shape[0]), rows, weight, bias)
    return _finished(raw.to(_wide(raw.dtype)), logit_scale, softcap)


def _finished(logits: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """Scaled and soft-capped in place."""
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _chunk_gradient(
    logits: Tensor,
    targets: Tensor,
    logit_scale: float,
    softcap: float | None,
    regularized: Regularized,
) -> tuple[Tensor, Tensor]:
    """Loss sum and its gradient with respect to the head's raw output.

    Overwrites the logits and makes no other tensor of their size (soft-capping needs one), which
    `logsumexp` and `softmax` would. With e = label_smoothing, z = z_loss, p = softmax(x) and
    s = logsumexp(x) of a token's V logits x, its target t:

        loss = s - (1 - e) x_t - e mean(x) + z s^2
        dx   = p (1 + 2 z s) - (1 - e) onehot(t) - e / V
    """
    smoothing, z_loss = regularized.label_smoothing, regularized.z_loss
    targets = targets.unsqueeze(1)
    capped_slope = None if softcap is None else (logits / softcap).square_().neg_().add_(1.0)
    largest = logits.amax(dim=1, keepdim=True)
    logits.sub_(largest)
    log_sum = largest if z_loss else None  # (C, 1)
    del largest
    chosen = logits.gather(1, targets)
    if smoothing:
        chosen = chosen.mul_(1 - smoothing).add_(logits.mean(dim=1, keepdim=True), alpha=smoothing)
    gradient = logits.exp_()
    total = gradient.sum(dim=1, keepdim=True)
    loss = (total.log() - chosen).sum()
    gradient.div_(total)
    if log_sum is not None:
        log_sum.add_(total.log())
        loss += z_loss * log_sum.square().sum()
        gradient.mul_(log_sum.mul_(2 * z_loss).add_(1.0))
    gradient.scatter_add_(1, targets, gradient.new_full((), smoothing - 1.0).expand_as(targets))
    if smoothing:
        gradient.sub_(smoothing / gradient.shape[1])
    if capped_slope is not None:
        gradient.mul_(capped_slope)  # d tanh(x) = 1 - tanh(x)^2
    if logit_scale != 1.0:
        gradient.mul_(logit_scale)
    return loss, gradient


def _turn_slice(
    raw: Tensor, targets: Tensor, room: Tensor | None, grad_bias: Tensor | None,
    logit_scale: float, softcap: float | None, regularized: Regularized,
) -> Tensor:  # fmt: skip
    """Overwrite what the head gave for a slice (S, V) with its gradient. -> loss sum.

    A narrow one is widened in `room`; adds to the bias's gradient.
    """
    wide = raw if room is None else room[: raw.shape[0]].copy_(raw)
    logits = _finished(wide, logit_scale, softcap)
    loss, exact = _chunk_gradient(logits, targets, logit_scale, softcap, regularized)
    if grad_bias is not None:
        grad_bias += exact.sum(0)
    if room is not None:
        raw.copy_(exact)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (M, D)
        weight: HeadWeight,  # (V, D)
        bias: Tensor | None,  # (V,)
        positions: Tensor,  # (N,) rows of hidden
        targets: Tensor,  # (N,)
        chunk_tokens: int,
        logit_scale: float,
        softcap: float | None,
        regularized: Regularized,
        slice_elements: int | None,
        wanted: tuple[bool, bool, bool],
    ) -> Tensor:
        accumulator = _wide(hidden.dtype)
        total = hidden.new_zeros((), dtype=accumulator)
        grad_hidden = torch.zeros_like(hidden) if wanted[0] else None
        grad_weight = None
        if wanted[1] and isinstance(weight, Tensor):
            grad_weight = torch.zeros_like(weight, dtype=accumulator)
        grad_bias = None
        if wanted[2] and bias is not None:
            grad_bias = torch.zeros_like(bias, dtype=accumulator)
        chunk_tokens = _even_chunk(positions.shape[0], chunk_tokens)
        slice_tokens = chunk_tokens
        if slice_elements is not None:
            slice_tokens = _even_chunk(chunk_tokens, max(1, slice_elements // weight.shape[0]))
        elif softcap is not None:  # needs another tensor like the slice
            slice_tokens = -(-chunk_tokens // 2)
        # One place for every chunk's logits, one for every slice's widened ones, and both before
        # anything smaller: so large a piece of a CPU's memory is taken back and handed out zeroed
        # each time, and a GPU's allocator would cut the free block it fits into.
        held = hidden.new_empty(chunk_tokens, weight.shape[0], dtype=weight.dtype)
        wide, room = _wide(weight.dtype), None
        if wide != weight.dtype:
            room = hidden.new_empty(slice_tokens, weight.shape[0], dtype=wide)
        chunks = zip(positions.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
        for rows, labels in chunks:
            inputs = hidden.index_select(0, rows)  # (C, D)
            gradient = held[: inputs.shape[0]]  # (C, V): logits until they are turned
            head_product(gradient, inputs.to(weight.dtype), weight, bias)
            slices = zip(gradient.split(slice_tokens), labels.split(slice_tokens), strict=True)
            for part, of_part in slices:
                total += _turn_slice(
                    part, of_part, room, grad_bias, logit_scale, softcap, regularized
                )
            if grad_hidden is not None:
                below = _input_gradient(gradient, weight)  # (C, D)
                grad_hidden.index_copy_(0, rows, below.to(hidden.dtype))
            if grad_weight is not None:
                grad_weight += gradient.T @ inputs.to(weight.dtype)
        of_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        of_bias = None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)
        ctx.gradients = (grad_hidden, of_weight, of_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: its gradients were used by an earlier call")
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                _scale_rows(gradient, grad_output)
        return (*gradients, None, None, None, None, None, None, None, None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What logits of a head in `dtype` are summed in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _even_chunk(tokens: int, most: int) -> int:
    """Tokens of a chunk, such that as few chunks as there must be are of about one size.

    >>> _even_chunk(512, 341), _even_chunk(1024, 341), _even_chunk(0, 341)
    (256, 256, 1)
    """
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))


def _input_gradient(gradient: Tensor, weight: HeadWeight) -> Tensor:
    if isinstance(weight, QuantizedHead):
        return weight.input_gradient(gradient)
    return gradient @ weight


def _scale_rows(tensor: Tensor, factor: Tensor) -> None:
    """Multiply in place, with the factor in fp32: a 16-bit factor would shift every gradient."""
    if tensor.dtype == factor.dtype:
        tensor.mul_(factor)
        return
    for rows in tensor.split(4096):
        rows.copy_(rows.to(factor.dtype).mul_(factor))


def linear_cross_entropy(
    hidden: Tensor,
    weight: HeadWeight,
    bias: Tensor | None,
    positions: Tensor,
    targets: Tensor,
    *,
    chunk_tokens: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    regularized: Regularized = PLAIN,
    slice_elements: int | None = None,
) -> Tensor:
    """Cross-entropy of a linear head, summed over the trained tokens.

    Args:
        hidden: The decoder's output, (..., D).
        weight: The head, (V, D), dense or quantized.
        bias: Its bias, (V,), if it has one.
        positions: Flat indices of the tokens whose next token is trained, (N,).
        targets: The next token of each, (N,).
        chunk_tokens: Tokens whose logits exist at one time.
        logit_scale: The head's output is multiplied by it (Cohere; Granite divides).
        softcap: Logits pass through ``softcap * tanh(logits / softcap)`` (Gemma 2).
        regularized: Label smoothing and z-loss.
        slice_elements: Logits that are widened at one time; None: those of a chunk, or of half a
            chunk where they are soft-capped.

    Returns:
        The sum, a scalar in fp32 (fp64 for fp64 inputs).
    """
    graph = torch.is_grad_enabled()
    wanted = (
        graph and hidden.requires_grad,
        graph and isinstance(weight, Tensor) and weight.requires_grad,
        graph and bias is not None and bias.requires_grad,
    )
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        positions,
        targets,
        chunk_tokens or default_chunk_tokens(weight.shape[0]),
        logit_scale,
        softcap,
        regularized,
        slice_elements,
        wanted,
    )
    return loss
