"""The quantized copy of a base: the bits of quantizing, made once, and made anew when damaged."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_trainer.base.load import BaseSpec, load_base
from qlora_trainer.base.quantized_cache import cached_base, damages

CPU = torch.device("cpu")
SPEC = BaseSpec("nf4")
SaveTiny = Callable[..., Path]


def copy_of(folder: Path, cache: Path, spec: BaseSpec = SPEC, progress: Any = None) -> Path:
    return cached_base(folder, cache, AutoModelForCausalLM, spec, CPU, progress=progress)


def tensors(folder: Path, spec: BaseSpec) -> dict[str, torch.Tensor]:
    model = load_base(folder, AutoModelForCausalLM, spec, CPU)
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "qwen2-moe"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_copy_holds_the_bits_of_quantizing(
    save_tiny: SaveTiny, tmp_path: Path, family: str, double_quant: bool
) -> None:
    folder, cache = save_tiny(family, AutoModelForCausalLM), tmp_path / "cache"
    spec = replace(SPEC, double_quant=double_quant)
    copy = copy_of(folder, cache, spec)
    assert copy.parent == cache
    config = json.loads((copy / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    made, read = tensors(folder, spec), tensors(copy, spec)
    assert made.keys() == read.keys()
    for name, tensor in made.items():
        assert tensor.dtype == read[name].dtype, name
        assert torch.equal(tensor, read[name]), name


def test_the_other_ways_of_holding_a_base_find_their_bits_in_it(
    save_tiny: SaveTiny, tmp_path: Path
) -> None:
    folder = save_tiny("llama", AutoModelForCausalLM, torch.float32)
    spec = replace(SPEC, embeddings_on_host=True, head_bits=8)
    made, read = tensors(folder, spec), tensors(copy_of(folder, tmp_path / "cache", spec), spec)
    assert made.keys() == read.keys()
    assert all(torch.equal(tensor, read[name]) for name, tensor in made.items())


def test_it_is_made_once_and_anew_for_other_weights_or_another_way(
    save_tiny: SaveTiny, tmp_path: Path
) -> None:
    folder, cache = save_tiny("llama", AutoModelForCausalLM), tmp_path / "cache"
    quantized: list[str] = []

    def count(path: str, _number: int, _count: int) -> None:
        quantized.append(path)

    first = copy_of(folder, cache, progress=count)
    assert len(quantized) == 2 * 7
    assert copy_of(folder, cache, progress=count) == first
    assert len(quantized) == 2 * 7
    assert copy_of(folder, cache, replace(SPEC, block_size=128)) != first
    assert copy_of(folder, cache, replace(SPEC, keep_unquantized=("q_proj",))) != first
    assert copy_of(save_tiny("llama", AutoModelForCausalLM, seed=1), cache) != first


def test_one_changed_value_of_the_source_makes_another_copy(
    save_tiny: SaveTiny, tmp_path: Path
) -> None:
    folder, cache = save_tiny("llama", AutoModelForCausalLM), tmp_path / "cache"
    first = copy_of(folder, cache)
    shard = folder / "model.safetensors"
    held = load_file(shard)
    held["model.embed_tokens.weight"][-1, -1] = 5.0
    save_file(held, shard, metadata={"format": "pt"})
    second = copy_of(folder, cache)
    assert second != first
    assert tensors(second, SPEC)["model.embed_tokens.weight"][-1, -1] == 5.0


def test_a_copy_needs_no_copy(save_tiny: SaveTiny, tmp_path: Path) -> None:
    copy = copy_of(save_tiny("llama", AutoModelForCausalLM), tmp_path / "cache")
    assert copy_of(copy, tmp_path / "other") == copy


@pytest.mark.parametrize("damage", ["a bit", "a missing file", "no record", "a broken record"])
def test_a_damaged_copy_is_told_and_made_anew(
    save_tiny: SaveTiny, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, cache = save_tiny("llama", AutoModelForCausalLM), tmp_path / "cache"
    copy = copy_of(folder, cache)
    before = tensors(copy, SPEC)
    shard = copy / "model-00001.safetensors"
    if damage == "a bit":
        content = bytearray(shard.read_bytes())
        content[-5] ^= 1
        shard.write_bytes(content)
    elif damage == "a missing file":
        shard.unlink()
    elif damage == "no record":
        (copy / "cache.json").unlink()
    else:
        (copy / "cache.json").write_text("[")
    assert damages(copy)
    with caplog.at_level(logging.WARNING):
        assert copy_of(folder, cache) == copy
    assert "is damaged" in caplog.text
    assert damages(copy) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(copy, SPEC).items())


def test_transformers_reads_it_too(save_tiny: SaveTiny, tmp_path: Path) -> None:
    copy = copy_of(save_tiny("llama", AutoModelForCausalLM), tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(copy, device_map="cpu")
    found = model.model.layers[1].mlp.up_proj.weight
    stored = load_file(copy / "model-00001.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(found.data.view(-1), stored.view(-1))
