"""The fused MLP equals the modules it replaces, tiled or not, and computed only as needed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.lora.fuse import FusedGatedMLP, fuse_mlps
from qlora_trainer.lora.gated_mlp import GatedMLP, Projection, gated_mlp
from qlora_trainer.lora.inject import (
    adapter_parameters,
    adapters_disabled,
    inject_adapter,
    reset_reached,
    unreached_layers,
)
from qlora_trainer.lora.spec import AdapterSpec

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 50,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, mlp_bias=True)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SIZES)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**SIZES)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SIZES)),
    "smollm3": lambda: tf.SmolLM3ForCausalLM(tf.SmolLM3Config(**SIZES)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES)),
}
MLP = r".*\.(gate_proj|up_proj|down_proj|gate_up_proj)"


def family(name: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[name]().to(dtype)
    spec = AdapterSpec(rank=4, alpha=8, dropout=dropout)
    inject_adapter(model, spec, dtype=dtype)
    for index, parameter in enumerate(adapter_parameters(model).values()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(index))
    return model


def quantized(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    for module in model.modules():
        base = getattr(module, "base", None)
        if isinstance(base, nn.Linear):
            module.base = NF4Linear.quantize(
                base.weight, base.bias, compute_dtype=dtype, device=torch.device("cpu")
            )
    return model


def run(model: nn.Module) -> dict[str, torch.Tensor]:
    """Logits and the gradient of every factor."""
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=ids, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 7].sum().backward()
    found = {name: p.grad.clone() for name, p in adapter_parameters(model).items()}
    return {**found, "logits": logits.detach()}


def mlp_of(
    base: Any, activation: str, tile: int | None, dropout: float = 0.0, keeps: bool = False
) -> Any:
    """The function of (x, factors...) for gradcheck."""

    def function(x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        pairs = zip(base, factors[::2], factors[1::2], strict=True)
        projections = tuple(Projection(b, A, B, 0.7, dropout) for b, A, B in pairs)
        return gated_mlp(x, GatedMLP(projections, activation, tile, keeps))

    return function


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("tile", [None, 2])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("keeps", [False, True])
def test_gradients_are_the_derivatives_in_float64(
    activation: str, tile: int | None, joined: bool, dropout: float, keeps: bool
) -> None:
    torch.manual_seed(1)
    wide, inner, rank = 6, 8, 2
    shapes = [(wide, 2 * inner)] if joined else [(wide, inner), (wide, inner)]
    shapes.append((inner, wide))
    base = [nn.Linear(i, o).double().requires_grad_(False) for i, o in shapes]
    factors = [
        torch.randn(size, dtype=torch.float64, requires_grad=True)
        for i, o in shapes
        for size in ((rank, i), (o, rank))
    ]
    x = torch.randn(1, 5, wide, dtype=torch.float64, requires_grad=True)
    function = mlp_of(base, activation, tile, dropout, keeps)
    assert torch.autograd.gradcheck(function, (x, *factors), fast_mode=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_known_architecture_computes_the_same_bits_in_one_tile(name: str) -> None:
    model = family(name, dropout=0.2)
    plain = run(model)
    found = fuse_mlps(model)
    assert len(found.modules) == 2
    assert not found.kept
    fused = run(model)
    assert plain.keys() == fused.keys()
    assert all(torch.equal(plain[key], fused[key]) for key in plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_known_architecture_computes_gate_and_up_together(name: str) -> None:
    model = family(name)  # without dropout, which would have them computed one by one
    plain = run(model)
    assert not fuse_mlps(model).kept
    for key, found in run(model).items():
        torch.testing.assert_close(found, plain[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("tile", [None, 4])
def test_what_is_kept_changes_no_bit(tile: int | None) -> None:
    model = quantized(family("llama", dtype=torch.bfloat16, dropout=0.2), torch.bfloat16)
    fuse_mlps(model, tile_tokens=tile)
    again = run(model)
    fuse_mlps(model, tile_tokens=tile, keeps_inner=True)
    kept = run(model)
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[key], kept[key]) for key in again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_on_nf4_change_nothing_but_rounding(dtype: torch.dtype) -> None:
    model = quantized(family("llama", dtype=dtype), dtype)
    plain = run(model)
    assert len(fuse_mlps(model, tile_tokens=4).modules) == 2
    tiled = run(model)
    allowed = 0.02 if dtype == torch.bfloat16 else 1e-5
    for key, expected in plain.items():
        assert (tiled[key] - expected).norm() <= allowed * expected.norm(), key


def test_evaluation_goes_through_the_modules_own_forward() -> None:
    model = quantized(family("llama"), torch.float32).eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with adapters_disabled(model):
            base = model(input_ids=ids).logits
        fuse_mlps(model, tile_tokens=4)
        torch.testing.assert_close(model(input_ids=ids).logits, plain)
        with adapters_disabled(model):
            torch.testing.assert_close(model(input_ids=ids).logits, base)


def assert_names_stay_and_adapters_are_reached(fuse: Callable[[nn.Module], Any]) -> None:
    model = family("llama")
    before = list(adapter_parameters(model))
    fuse(model)
    fuse(model)
    assert list(adapter_parameters(model)) == before
    reset_reached(model)
    run(model)
    assert unreached_layers(model) == []


def test_parameters_keep_their_names_and_the_adapters_are_reached() -> None:
    assert_names_stay_and_adapters_are_reached(fuse_mlps)


def test_only_the_input_and_the_factors_are_saved() -> None:
    model = quantized(family("llama", dtype=torch.bfloat16), torch.bfloat16)
    fuse_mlps(model, tile_tokens=4)
    mlp = model.model.layers[0].mlp.train()
    x = torch.randn(1, 9, 64, dtype=torch.bfloat16, requires_grad=True)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(x)
    own = {p.data_ptr() for p in adapter_parameters(mlp).values()}
    assert {t.data_ptr() for t in saved} == own | {x.data_ptr()}


class Counting(nn.Linear):
    """Counts how often its dense weight is asked for."""

    asked = 0

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        self.asked += 1
        return self.weight.detach().to(dtype)


def test_recomputing_a_layer_stops_before_the_output_nobody_needs() -> None:
    torch.manual_seed(0)
    base = [Counting(8, 16), Counting(8, 16), Counting(16, 8)]
    factors = [torch.randn(2, n, requires_grad=True) for n in (8, 8, 16)]
    others = [torch.randn(n, 2, requires_grad=True) for n in (16, 16, 8)]
    projections = tuple(Projection(*part) for part in zip(base, factors, others, strict=True))

    def layer(x: torch.Tensor) -> torch.Tensor:
        return x + gated_mlp(x.tanh(), GatedMLP(projections, "silu", None))

    x = torch.randn(4, 8, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    # forward 1; nothing in the recomputed forward; backward: z and u again, then one for each dx
    assert [b.asked for b in base] == [3, 3, 2]


def test_what_is_kept_is_not_computed_again() -> None:
    torch.manual_seed(0)
    base = [Counting(8, 16), Counting(8, 16), Counting(16, 8)]
    projections = tuple(Projection(part, None, None) for part in base)
    x = torch.randn(4, 8, requires_grad=True)
    gated_mlp(x, GatedMLP(projections, "silu", None, keeps_inner=True)).sum().backward()
    assert [b.asked for b in base] == [2, 2, 2]  # forward, and the gradient of the input


def test_what_is_not_known_keeps_its_own_forward_and_is_named() -> None:
    torch.manual_seed(0)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))
    found = fuse_mlps(model)
    assert not found.modules
    assert found.kept == {"transformer.h.0.mlp": "GPT2MLP is no layout we know"}
    trained = FAMILIES["llama"]()
    spec = AdapterSpec(rank=2, alpha=4, target_modules=("q_proj",), modules_to_save=("up_proj",))
    inject_adapter(trained, spec, dtype=torch.float32)
    reasons = set(fuse_mlps(trained).kept.values())
    assert reasons == {"up_proj is itself trained"}


def test_fusing_again_changes_the_tile_only() -> None:
    model = family("llama")
    fuse_mlps(model)
    fused = model.model.layers[0].mlp
    assert isinstance(fused, FusedGatedMLP)
    fuse_mlps(model, tile_tokens=7)
    assert model.model.layers[0].mlp is fused
    assert fused.tile_tokens == 7


@pytest.mark.parametrize("tile", [None, 4])
def test_runs_without_values_on_meta(tile: int | None) -> None:
    model = family("llama", dropout=0.1).to("meta")
    fuse_mlps(model, tile_tokens=tile)
    mlp = model.model.layers[0].mlp.train()
    x = torch.empty(1, 9, 64, device="meta", requires_grad=True)
    mlp(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape for p in adapter_parameters(mlp).values())
