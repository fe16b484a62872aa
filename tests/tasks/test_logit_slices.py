"""Logits widened a slice at a time: the same loss and gradients, in less memory."""

import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.base.head import QuantizedHead
from qlora_trainer.base.host_embedding import HostEmbedding
from qlora_trainer.base.transfers import Transfers
from qlora_trainer.memory.simulate import Trace
from qlora_trainer.memory.tracker import AllocationTracker
from qlora_trainer.tasks.linear_cross_entropy import (
    CACHE_ELEMENTS,
    PLAIN,
    HeadWeight,
    Regularized,
    linear_cross_entropy,
)
from qlora_trainer.tasks.loss_path import slice_for

VOCABULARY, WIDTH = 523, 16


def found(
    weight: HeadWeight,
    bias: Tensor | None,
    slice_elements: int | None,
    softcap: float | None,
    regularized: Regularized,
    tokens: int = 47,
) -> list[Tensor]:
    """The loss of chunks of 16 tokens, and the gradient of each that wants one."""
    random = torch.Generator().manual_seed(5)
    hidden = torch.randn(60, WIDTH, generator=random).to(weight.dtype).requires_grad_()
    positions = torch.randperm(60, generator=random)[:tokens]
    targets = torch.randint(VOCABULARY, (tokens,), generator=random)
    loss = linear_cross_entropy(
        hidden, weight, bias, positions, targets, chunk_tokens=16, logit_scale=0.5,
        softcap=softcap, regularized=regularized, slice_elements=slice_elements,
    )  # fmt: skip
    leaves = [t for t in (hidden, weight, bias) if isinstance(t, Tensor) and t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss / 3, leaves)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("regularized", [PLAIN, Regularized(0.2, 0.01)])
@pytest.mark.parametrize("slice_tokens", [0, 1, 5, 16, 400])
def test_slices_change_neither_loss_nor_gradients(
    dtype: torch.dtype, softcap: float | None, regularized: Regularized, slice_tokens: int
) -> None:
    """Of 5 tokens the last slice of a chunk is shorter; a slice of none is one token."""
    random = torch.Generator().manual_seed(6)
    weight = torch.randn(VOCABULARY, WIDTH, generator=random).to(dtype).requires_grad_()
    bias = torch.randn(VOCABULARY, generator=random).to(dtype).requires_grad_()
    given = (softcap, regularized)
    sliced = found(weight, bias, slice_tokens * VOCABULARY, *given)
    assert len(sliced) == 4
    for ours, whole in zip(sliced, found(weight, bias, 16 * VOCABULARY, *given), strict=True):
        torch.testing.assert_close(ours, whole)


@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_few_tokens_or_none_are_sliced_as_well(tokens: int) -> None:
    weight = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(7)).bfloat16()
    sliced = found(weight, None, 3 * VOCABULARY, None, PLAIN, tokens)
    for ours, whole in zip(sliced, found(weight, None, None, None, PLAIN, tokens), strict=True):
        torch.testing.assert_close(ours, whole)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_heads_logits_are_sliced(bits: int) -> None:
    torch.manual_seed(8)
    head = QuantizedHead.quantize(
        nn.Linear(WIDTH, VOCABULARY), bits=bits, block_size=64, dtype=torch.bfloat16,
        tile_elements=128 * WIDTH,
    )  # fmt: skip
    sliced = found(head, head.bias, 5 * VOCABULARY, 2.0, PLAIN)
    for ours, whole in zip(sliced, found(head, head.bias, None, 2.0, PLAIN), strict=True):
        torch.testing.assert_close(ours, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_that_of_wide_logits(dtype: torch.dtype) -> None:
    """Autocast does not narrow the logits of a wide head."""
    random = torch.Generator().manual_seed(9)
    weight = torch.randn(VOCABULARY, WIDTH, generator=random).to(dtype)
    exact = found(weight.double(), None, None, None, PLAIN)[0]
    narrow = found(weight, None, 5 * VOCABULARY, None, PLAIN)[0]
    torch.testing.assert_close(narrow.double(), exact, rtol=2e-3, atol=0)
    with torch.autocast("cpu", dtype):
        wide = found(weight.float(), None, 5 * VOCABULARY, None, PLAIN)[0]
    torch.testing.assert_close(wide.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(
    ("slice_tokens", "softcap", "wide_tokens"),
    [(None, None, 24), (None, 2.0, 12 + 12), (4, None, 4), (4, 2.0, 4 + 4)],
)
def test_a_chunk_is_as_narrow_as_the_head_and_one_slice_wide(
    device: str, slice_tokens: int | None, softcap: float | None, wide_tokens: int
) -> None:
    """Nor is the last chunk there beside the next."""
    vocabulary, chunk, tokens = 20_000, 24, 3 * 24
    hidden = torch.zeros(tokens, 8, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.zeros(vocabulary, 8, dtype=torch.bfloat16, device=device)
    index = torch.arange(tokens, device=device)
    tracker = AllocationTracker(device)
    with tracker:
        loss = linear_cross_entropy(
            hidden, weight, None, index, index, chunk_tokens=chunk, softcap=softcap,
            slice_elements=None if slice_tokens is None else slice_tokens * vocabulary,
        )  # fmt: skip
        torch.autograd.grad(loss, hidden)
    expected = vocabulary * (2 * chunk + 4 * wide_tokens)
    assert Trace(tracker.log).live().peak_bytes == pytest.approx(expected, rel=0.01)


def test_a_cpu_has_slices_and_others_have_none() -> None:
    here, weightless = nn.Linear(2, 3), nn.Linear(2, 3, device="meta")
    assert slice_for(here, None) == slice_for(weightless, True) == CACHE_ELEMENTS
    assert slice_for(weightless, None) is slice_for(here, False) is None


def test_a_table_left_on_the_host_does_not_make_it_a_cpu() -> None:
    elsewhere = torch.device("meta")
    table = HostEmbedding(nn.Embedding(4, 2), Transfers(elsewhere))
    model = nn.Sequential(table, nn.Linear(2, 3, device=elsewhere))
    assert slice_for(model, None) is None
