"""Claims of base/select.py: what is quantized follows from kind and place, each exception named."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertForMaskedLM, FalconConfig

from qlora_trainer.base.load import BaseSpec, build_weightless_base
from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.base.select import head_paths, path_matches, select_quantized, stays_fp32
from tests.base.conftest import tiny_config


def weightless(family: str, model_class: type = AutoModelForCausalLM) -> nn.Module:
    with torch.device("meta"):
        build = getattr(model_class, "from_config", None) or model_class._from_config
        return build(tiny_config(family))


def test_every_weight_matrix_is_either_quantized_or_has_a_reason() -> None:
    for family in ("llama", "gpt2", "mixtral", "qwen2-moe", "gemma2"):
        model = weightless(family)
        selection = select_quantized(model)
        with_matrix = {
            path
            for path, module in model.named_modules()
            if any(p.dim() > 1 for p in module.parameters(recurse=False))
        }
        assert set(selection.quantized) | selection.kept.keys() == with_matrix
        assert not set(selection.quantized) & selection.kept.keys()
        assert all(selection.kept.values())


def test_everything_on_top_of_the_transformer_is_a_head() -> None:
    heads = head_paths(weightless("bert", BertForMaskedLM))
    assert "cls.predictions.transform.dense" in heads
    assert "cls.predictions.decoder" in heads
    assert not any(path.startswith("bert") for path in heads)
    assert head_paths(weightless("llama")) == {"lm_head"}


def test_routers_and_single_row_gates_stay() -> None:
    kept = select_quantized(weightless("qwen2-moe")).kept
    assert kept["model.layers.0.mlp.gate"].startswith("router")
    assert kept["model.layers.0.mlp.shared_expert_gate"].startswith("a gate")


def test_a_weight_shared_by_two_layers_stays_and_stays_shared() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.Linear(8, 8))
    selection = select_quantized(model)
    assert selection.quantized == ("2",)
    assert set(selection.kept.values()) == {"its weight is shared with another layer"}


def test_a_subclass_with_its_own_product_stays_but_falcons_does_not() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    selection = select_quantized(nn.Sequential(Scaled(8, 8)))
    assert selection.kept == {"0": "Scaled is not a plain linear layer"}
    falcon = FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = build_weightless_base(falcon, AutoModelForCausalLM, BaseSpec("nf4"))
    assert sum(isinstance(module, NF4Linear) for module in model.modules()) == 8


@pytest.mark.parametrize(
    ("path", "name", "fits"),
    [
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1.mlp.up_proj", "layers.1.mlp", True),
        ("model.layers.11.mlp.up_proj", "layers.1", False),
        ("model.layers.1.mlp.up_proj", "proj", False),
    ],
)
def test_names_fit_whole_components_of_a_path(path: str, name: str, fits: bool) -> None:
    assert path_matches(path, name) == fits


def test_what_a_class_wants_in_fp32_is_found_by_its_own_lists() -> None:
    class Model(nn.Module):
        _keep_in_fp32_modules = ("wo",)
        _keep_in_fp32_modules_strict = ("gate.bias_*",)

    bf16, fp16 = stays_fp32(Model(), fp16=False), stays_fp32(Model(), fp16=True)
    assert bf16 is not None
    assert fp16 is not None
    assert bf16.search("layers.0.gate.bias_correction")
    assert not bf16.search("layers.0.wo.weight")
    assert fp16.search("layers.0.wo.weight")
    assert not fp16.search("layers.0.two.weight")
    assert stays_fp32(nn.Linear(2, 2), fp16=True) is None
