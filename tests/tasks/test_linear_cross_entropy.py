import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qlora_trainer.base.head import QuantizedHead
from qlora_trainer.tasks.linear_cross_entropy import (
    Regularized,
    default_chunk_tokens,
    linear_cross_entropy,
)
from qlora_trainer.tasks.loss_path import full_cross_entropy


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    targets: Tensor,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    logits = F.linear(hidden.flatten(0, -2)[positions], weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.25])
@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_equal_the_plain_path_in_float64(
    softcap: float | None, logit_scale: float, chunk: int, trained_head: bool, bias: bool
) -> None:
    torch.manual_seed(1)
    hidden = torch.randn(3, 7, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(19, 8, dtype=torch.float64, requires_grad=trained_head)
    offset = torch.randn(19, dtype=torch.float64, requires_grad=trained_head) if bias else None
    positions = torch.tensor([0, 3, 4, 8, 13, 19, 20])
    targets = torch.randint(19, (7,))
    leaves = [t for t in (hidden, weight, offset) if t is not None and t.requires_grad]
    ours = linear_cross_entropy(
        hidden,
        weight,
        offset,
        positions,
        targets,
        chunk_tokens=chunk,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    theirs = plain(hidden, weight, offset, positions, targets, logit_scale, softcap)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours / 3, leaves), torch.autograd.grad(theirs / 3, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9), vocabulary=st.integers(2, 40), chunk=st.integers(1, 12), data=st.data()
)
def test_the_chunk_size_never_changes_the_loss(
    rows: int, vocabulary: int, chunk: int, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    positions = torch.randperm(rows, generator=generator)
    one, many = (
        linear_cross_entropy(hidden, weight, None, positions, targets, chunk_tokens=size)
        for size in (rows, chunk)
    )
    torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-12)


def test_bf16_gradient_is_as_close_to_exact_as_the_plain_bf16_path() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32), torch.randn(500, 32) * 0.3
    positions, targets = torch.arange(64), torch.randint(500, (64,))

    def gradient(path: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = hidden.bfloat16().to(dtype).requires_grad_()
        w = weight.bfloat16().to(dtype)
        if path == "ours":
            loss = linear_cross_entropy(x, w, None, positions, targets, chunk_tokens=16)
        else:
            loss = F.cross_entropy(F.linear(x, w).float(), targets, reduction="sum")
        (loss / 37).backward()
        assert x.grad is not None
        return loss.detach().double(), x.grad.double()

    exact_loss, exact = gradient("plain", torch.float64)
    ours_loss, ours = gradient("ours", torch.bfloat16)
    _, theirs = gradient("plain", torch.bfloat16)
    assert ours_loss.item() == pytest.approx(exact_loss.item(), rel=2e-3)
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


def test_no_tensor_of_all_logits_is_ever_made() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    hidden = torch.randn(40, 8, requires_grad=True)
    weight = torch.randn(100, 8)
    with Largest() as seen:
        linear_cross_entropy(
            hidden, weight, None, torch.arange(40), torch.randint(100, (40,)), chunk_tokens=4
        ).backward()
    assert seen.elements == 100 * 8  # the head itself; all logits would be 4,000


def test_no_gradient_is_computed_where_none_is_recorded() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(9, 8, requires_grad=True)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, None, torch.arange(4), torch.arange(4))
    assert not loss.requires_grad


def test_a_second_backward_is_refused_rather_than_wrong() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(9, 8), None, torch.arange(4), torch.arange(4))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used by an earlier call"):
        loss.backward()


def test_a_window_without_trained_tokens_gives_zero_and_zero_gradient() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    loss = linear_cross_entropy(hidden, torch.randn(9, 8), None, nothing, nothing)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_shapes_alone_are_enough() -> None:
    hidden = torch.randn(2, 6, 8, device="meta", requires_grad=True)
    weight = torch.randn(50, 8, device="meta")
    index = torch.zeros(5, dtype=torch.int64, device="meta")
    loss = linear_cross_entropy(hidden, weight, None, index, index, chunk_tokens=2, softcap=3.0)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape


def test_default_chunk_never_vanishes() -> None:
    assert default_chunk_tokens(10**9) == 16


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_label_smoothing_and_z_loss_are_torchs_and_the_formulas(
    softcap: float | None, smoothing: float, z_loss: float
) -> None:
    torch.manual_seed(2)
    hidden = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(19, 8, dtype=torch.float64, requires_grad=True)
    positions, targets = torch.tensor([0, 2, 3, 7, 10]), torch.randint(19, (5,))
    ours = linear_cross_entropy(
        hidden, weight, None, positions, targets, chunk_tokens=2, softcap=softcap,
        regularized=Regularized(smoothing, z_loss),
    )  # fmt: skip
    logits = F.linear(hidden, weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    chosen = logits[positions]
    theirs = F.cross_entropy(chosen, targets, reduction="sum", label_smoothing=smoothing)
    theirs = theirs + z_loss * (chosen.exp().sum(1).log() ** 2).sum()
    batch = {"loss_positions": positions, "loss_targets": targets}
    full = full_cross_entropy(logits, batch, Regularized(smoothing, z_loss))
    expected = torch.autograd.grad(theirs, (hidden, weight), retain_graph=True)
    for loss in (ours, full):
        torch.testing.assert_close(loss, theirs, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(loss, (hidden, weight), retain_graph=loss is full)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_a_quantized_head_loses_what_its_dense_weight_loses(bits: int, bias: bool) -> None:
    torch.manual_seed(3)
    linear = torch.nn.Linear(96, 1300, bias=bias)
    head = QuantizedHead.quantize(
        linear, bits=bits, block_size=64, dtype=torch.float32, tile_elements=520 * 96
    )
    dense = head.held.rows(0, 1300, torch.float32)
    positions, targets = torch.arange(0, 40, 3), torch.randint(1300, (14,))
    found = []
    for weight in (dense, head):
        hidden = torch.randn(40, 96, generator=torch.Generator().manual_seed(4))
        hidden.requires_grad_()
        loss = linear_cross_entropy(
            hidden, weight, head.bias, positions, targets, chunk_tokens=5, softcap=5.0
        )
        found.append((loss, *torch.autograd.grad(loss, hidden)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
