"""An adapter goes out checked, with its tokenizer and what servers cannot do with it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from qlora_trainer.errors import UserError
from qlora_trainer.export.adapter_export import export_adapter, merge_adapters
from qlora_trainer.export.export import builtin_proof, export_merged
from tests.export import tiny


def test_adapter_is_exported_with_notes_and_the_bases_public_name(bench, tmp_path):
    source = bench.source("llama", target_modules=["q_proj"], modules_to_save=["lm_head"], r=32)
    made = export_adapter(replace(source, base_source="org/tiny"), tmp_path / "out")
    settings = json.loads((made.folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "org/tiny"
    assert any("modules_to_save = lm_head" in note for note in made.report["serving"])
    assert any("--max-lora-rank 32" in note for note in made.report["serving"])
    own = (source.adapter_folder / "adapter_model.safetensors").read_bytes()
    assert (made.folder / "adapter_model.safetensors").read_bytes() == own


def test_an_adapter_goes_out_with_every_file_of_marians_tokenizer(bench, tmp_path):
    source = bench.source()
    adapter = tmp_path / "adapter"
    shutil.copytree(source.adapter_folder, adapter)
    names = ("source.spm", "target.spm", "vocab.json", "target_vocab.json")
    for name in names:
        (adapter / name).write_bytes(name.encode())
    made = export_adapter(replace(source, adapter_folder=adapter), tmp_path / "out")
    for name in names:
        assert (made.folder / name).read_bytes() == name.encode()


def test_broken_adapter_is_not_exported(bench, tmp_path):
    source = bench.source()
    shutil.copytree(source.adapter_folder, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        export_adapter(replace(source, adapter_folder=tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_adapters_become_one_proven_model(bench, tmp_path):
    source = bench.source()
    other = bench.adapter(source.base_folder, target_modules=["v_proj"], seed=5)
    made = merge_adapters(
        source, [(source.adapter_folder, 0.5), (other, 1.5)], tmp_path / "out",
        dtype="fp32", onto="dequantized", proof=builtin_proof(source, precisions=("fp32",)),
    )  # fmt: skip
    figures = made.report["ways"]["dequantized"]["proof"]["fp32"]["figures"]
    assert figures["relative_difference"] < 1e-5
    assert tiny.load(made.folder).dtype == torch.float32


def test_another_base_of_the_same_shape_is_noted_in_the_report(bench, tmp_path):
    source = replace(bench.source(), base_source="org/other-name")
    made = export_merged(source, tmp_path / "out", dtype="bf16", onto="original", proof=None)
    assert any("merged with other-name" in note for note in made.report["notes"])


def test_adapters_of_different_tasks_are_not_joined(bench, tmp_path):
    source = bench.source(task_type="CAUSAL_LM")
    other = bench.adapter(source.base_folder, target_modules=["v_proj"], task_type="SEQ_2_SEQ_LM")
    with pytest.raises(UserError, match=r"for different tasks \(.*SEQ_2_SEQ_LM"):
        merge_adapters(
            source, [(source.adapter_folder, 1.0), (other, 1.0)], tmp_path / "out",
            onto="original", proof=None,
        )  # fmt: skip
