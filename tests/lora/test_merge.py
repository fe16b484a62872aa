"""A merged module answers as its base plus its adapter, for every kind and shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.base.weight_parts import dense_weight
from qlora_trainer.lora.layer import LowRankLayer
from qlora_trainer.lora.merge import low_rank_delta, merged_weight

sizes = st.integers(1, 9)
KINDS = st.sampled_from(
    ["linear", "conv1d", "conv2d", "embedding", "scaled embedding", "nf4", "nf4 conv1d"]
)


@st.composite
def bases(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """A base module of any kind and shape, and an input for it."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    kind, inner, outer = draw(KINDS), draw(sizes), draw(sizes)
    if kind == "linear":
        return nn.Linear(inner, outer, bias=draw(st.booleans())), torch.randn(3, inner)
    if kind == "conv1d":
        return Conv1D(outer, inner), torch.randn(3, inner)
    if kind == "embedding":
        return nn.Embedding(inner, outer), torch.randint(inner, (2, 3))
    if kind == "scaled embedding":
        table = Gemma3TextScaledWordEmbedding(inner, outer, padding_idx=0, embed_scale=3.0)
        return table, torch.randint(inner, (2, 3))
    if kind.startswith("nf4"):
        base = NF4Linear.quantize(
            torch.randn((64, outer) if kind == "nf4 conv1d" else (outer, 64)),
            torch.randn(outer),
            compute_dtype=torch.float32,
            device=torch.device("cpu"),
            fan_in_fan_out=kind == "nf4 conv1d",
        )
        return base, torch.randn(3, 64)
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    stride, padding = draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, (2, 1), "valid"]))
    conv = nn.Conv2d(inner, outer, kernel, stride=stride, padding=padding)
    return conv, torch.randn(2, inner, 5, 6)


def put_weight(base: nn.Module, layer: LowRankLayer) -> nn.Module:
    """A plain module of the base's shapes holding the merged weight."""
    if isinstance(base, NF4Linear):
        turned = base.fan_in_fan_out
        plain = Conv1D(base.out_features, 64) if turned else nn.Linear(64, base.out_features)
        weight = dense_weight(base, torch.float32)
        weight = weight.t() if turned else weight
        plain.bias = base.bias
    else:
        plain, weight = base, base.weight
    merged = merged_weight(weight, layer.lora_A, layer.lora_B, layer.scale, layer.kind.name)
    plain.weight = nn.Parameter(merged)
    return plain


@given(bases(), sizes, st.floats(0.1, 4))
@settings(deadline=None, max_examples=150)
def test_merged_output_is_base_plus_adapter_output(
    case: tuple[nn.Module, torch.Tensor], rank: int, scale: float
) -> None:
    base, x = case
    layer = LowRankLayer(base, name="m", rank=rank, scale=scale)
    with torch.no_grad():
        untouched = base(x)
        assert torch.equal(layer(x), untouched)  # the first product is zero
        for factor in (layer.lora_A, layer.lora_B):
            factor.normal_()
        expected = layer(x)
        merged = put_weight(base, layer)(x)
    assert (merged - expected).abs().max() <= 1e-5 * (1 + expected.abs().max()) * (1 + rank)


def test_the_sum_is_float32_and_exact_for_half_precision_parts() -> None:
    torch.manual_seed(0)
    weight, a, b = (torch.randn(shape).bfloat16() for shape in ((6, 8), (2, 8), (6, 2)))
    merged = merged_weight(weight, a, b, 0.5, "linear")
    assert merged.dtype == torch.float32
    exact = weight.double() + 0.5 * b.double() @ a.double()
    assert (merged.double() - exact).abs().max() <= 1e-6
    assert torch.equal(low_rank_delta(a, torch.zeros(6, 2), 0.5, "linear"), torch.zeros(6, 8))


def test_inputs_are_left_alone() -> None:
    weight, a, b = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    before = [t.clone() for t in (weight, a, b)]
    merged_weight(weight, a, b, 2.0, "linear")
    assert all(torch.equal(x, y) for x, y in zip(before, (weight, a, b), strict=True))


def test_a_weight_of_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"update has shape \(8, 6\), its weight \(6, 8\)"):
        merged_weight(torch.zeros(6, 8), torch.zeros(2, 8), torch.zeros(6, 2), 1.0, "conv1d")
