"""Claims of base/layers.py: the repeated layers of any architecture, in order, none twice."""

import pytest
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from qlora_trainer.base.layers import decoder_layers, layer_stacks
from qlora_trainer.base.load import BaseSpec, build_weightless_base
from tests.base.conftest import tiny_config


@pytest.mark.parametrize(
    ("family", "model_class", "paths"),
    [
        ("llama", AutoModelForCausalLM, ["model.layers.0", "model.layers.1"]),
        ("mixtral", AutoModelForCausalLM, ["model.layers.0", "model.layers.1"]),
        ("gpt2", AutoModelForCausalLM, ["transformer.h.0", "transformer.h.1"]),
        ("bert", AutoModel, ["encoder.layer.0", "encoder.layer.1"]),
        (
            "t5",
            AutoModelForSeq2SeqLM,
            ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
        ),
    ],
)
def test_layers_are_found_in_order(family: str, model_class: type, paths: list[str]) -> None:
    model = build_weightless_base(tiny_config(family), model_class, BaseSpec("nf4"))
    found = decoder_layers(model)
    assert [path for path, _ in found] == paths
    assert all(model.get_submodule(path) is layer for path, layer in found)


def test_the_stacks_of_an_encoder_decoder_are_kept_apart() -> None:
    model = build_weightless_base(tiny_config("t5"), AutoModelForSeq2SeqLM, BaseSpec("nf4"))
    assert [len(stack) for stack in layer_stacks(model).values()] == [2, 2]


def test_remote_code_without_the_base_class_is_found_by_its_layer_count() -> None:
    class Config:
        num_hidden_layers = 3

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))  # same length, inside

    class Model(nn.Module):
        config = Config()

        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(2) for _ in range(3))
            self.pre = nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)])
            self.blocks = nn.ModuleList(Block() for _ in range(3))

    assert [path for path, _ in decoder_layers(Model())] == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_model_without_repeated_layers_has_none() -> None:
    assert decoder_layers(nn.Sequential(nn.Linear(2, 2))) == []
