"""One wrapper, every kind of base: first values, dtypes, switching off, refusing."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.lora.inject import zero_initialised_factor
from qlora_trainer.lora.kind import kind_of
from qlora_trainer.lora.layer import LowRankLayer


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: the table's rows are scaled on their way out."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width, padding_idx=0)
        self.register_buffer("embed_scale", torch.tensor(3.0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class DoublingLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


BASES: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(8, 6), lambda: torch.randn(3, 8)),
    "doubling linear": (lambda: DoublingLinear(8, 6), lambda: torch.randn(3, 8)),
    "conv1d": (lambda: Conv1D(6, 8), lambda: torch.randn(3, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 6, (3, 2), 2, 1), lambda: torch.randn(2, 3, 7, 7)),
    "embedding": (lambda: nn.Embedding(9, 6), lambda: torch.randint(9, (2, 4))),
    "scaled embedding": (lambda: ScaledEmbedding(9, 6), lambda: torch.randint(9, (2, 4))),
}


def make(kind: str, **more: Any) -> tuple[LowRankLayer, torch.Tensor]:
    torch.manual_seed(0)
    base, x = BASES[kind][0](), BASES[kind][1]()
    return LowRankLayer(base, name="m", rank=2, scale=0.5, **more), x


@pytest.mark.parametrize("kind", BASES)
def test_starts_as_its_base_and_the_zero_factor_has_the_first_gradient(kind: str) -> None:
    layer, x = make(kind)
    assert torch.equal(layer(x), layer.base(x)) or torch.allclose(layer(x), layer.base(x))
    name, factor = zero_initialised_factor(layer)
    assert name == ("lora_A" if "embedding" in kind else "lora_B")
    assert not factor.any()
    layer(x).square().sum().backward()
    other = layer.lora_B if name == "lora_A" else layer.lora_A
    assert factor.grad.any()
    assert not other.grad.any()
    assert all(parameter.grad is None for parameter in layer.base.parameters())


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_output_has_the_base_dtype_whatever_the_factors_are(
    kind: str, adapter: torch.dtype
) -> None:
    layer, x = make(kind, dtype=adapter)
    layer.base.bfloat16()
    x = x.bfloat16() if x.is_floating_point() else x
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert y.shape == layer.base(x).shape


@pytest.mark.parametrize("kind", BASES)
def test_training_and_evaluation_paths_agree(kind: str) -> None:
    layer, x = make(kind)
    for factor in (layer.lora_A, layer.lora_B):
        nn.init.normal_(factor)
    recorded = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), recorded)


def test_dropout_on_convolutions_acts_in_training_only() -> None:
    layer, x = make("conv2d", dropout=0.5)
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("kind", BASES)
def test_switched_off_it_is_its_base_and_is_not_reached(kind: str) -> None:
    layer, x = make(kind)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))
    assert not layer.reached
    layer.enabled = True
    assert not torch.allclose(layer(x), layer.base(x))
    assert layer.reached


def test_first_values_are_peft_s_distribution() -> None:
    layer = LowRankLayer(nn.Linear(400, 300), name="m", rank=50, scale=1.0)
    bound = 1 / math.sqrt(400)  # kaiming_uniform with a = sqrt(5)
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    conv = LowRankLayer(nn.Conv2d(40, 3, 5), name="m", rank=50, scale=1.0)
    assert conv.lora_A.std().item() == pytest.approx(1 / math.sqrt(3 * 40 * 25), rel=0.02)
    table = LowRankLayer(nn.Embedding(300, 400), name="m", rank=50, scale=1.0)
    assert table.lora_B.std().item() == pytest.approx(1.0, rel=0.02)


def test_first_values_follow_from_seed_and_name_alone() -> None:
    def drawn(name: str, seed: int) -> torch.Tensor:
        torch.rand(1)  # what others drew in between does not matter
        layer = LowRankLayer(nn.Linear(8, 6), name=name, rank=2, scale=1.0, seed=seed)
        return layer.lora_A.detach()

    assert torch.equal(drawn("a", 1), drawn("a", 1))
    assert not torch.equal(drawn("a", 1), drawn("b", 1))
    assert not torch.equal(drawn("a", 1), drawn("a", 2))
    narrow = LowRankLayer(
        nn.Linear(8, 6), name="a", rank=2, scale=1.0, seed=1, dtype=torch.bfloat16
    )
    assert torch.equal(narrow.lora_A.detach(), drawn("a", 1).bfloat16())


@pytest.mark.parametrize(
    "base",
    [
        nn.LayerNorm(4),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv3d(4, 4, 3),
    ],
)
def test_bases_peft_would_treat_otherwise_are_refused(base: nn.Module) -> None:
    assert kind_of(base) is None
    with pytest.raises(TypeError, match=f"m: no low-rank adapter fits a {type(base).__name__}"):
        LowRankLayer(base, name="m", rank=2, scale=1.0)


def test_packed_4_bit_weights_of_other_libraries_are_refused() -> None:
    from bitsandbytes.nn import Linear4bit

    packed = Linear4bit(64, 64, quant_type="nf4").to("cpu")
    packed.weight = packed.weight.to("cpu")
    packed.weight.data = torch.zeros(64 * 32, 1, dtype=torch.uint8)
    assert kind_of(packed) is None


def test_model_code_may_ask_for_the_base_s_attributes_but_not_its_dense_weight() -> None:
    layer, _ = make("linear")
    assert layer.weight is layer.base.weight
    assert layer.in_features == 8
    with pytest.raises(AttributeError):
        _ = layer.nothing_such
    quantized = NF4Linear.quantize(
        torch.randn(8, 64), None, compute_dtype=torch.float32, device=torch.device("cpu")
    )
    layer = LowRankLayer(quantized, name="m", rank=2, scale=1.0)
    assert not hasattr(layer, "dense_weight")


@pytest.mark.parametrize("kind", BASES)
def test_layers_copy_and_travel_through_state_dicts(kind: str) -> None:
    layer, x = make(kind)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    other, _ = make(kind)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


@pytest.mark.parametrize("kind", BASES)
def test_every_kind_runs_without_values(kind: str) -> None:
    with torch.device("meta"):
        layer, x = make(kind)
    assert layer.lora_A.is_meta
    y = layer(x)
    y.sum().backward()
    assert layer.lora_B.grad.shape == layer.lora_B.shape
