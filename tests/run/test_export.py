"""A run's export is the model that was trained, whole or not there at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_trainer import load_trained, train
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.run.export import export_run

Make = Callable[..., RunConfig]


def test_a_merged_run_answers_as_base_and_adapter(make_run: Make, tmp_path: Path) -> None:
    result = train(make_run())
    exported = export_run(result.folder, tmp_path / "merged", dtype="fp32", onto="dequantized")
    assert exported.report["rows"]["from"] == "held-out rows"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    trained = load_trained(result.folder)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        ours, theirs = trained.model(ids).logits.float(), merged(ids).logits
    assert (ours - theirs).norm() / ours.norm() < 2e-2  # one side computes in bf16
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    with pytest.raises(UserError, match="exists already"):
        export_run(result.folder, tmp_path / "merged")


def test_a_bare_adapter_needs_its_base(make_run: Make, tiny_model: Path, tmp_path: Path) -> None:
    adapter = train(make_run()).folder / "adapter"
    exported = export_run(
        adapter, tmp_path / "merged", base=str(tiny_model), onto="original", prove=False
    )
    assert (exported.folder / "model.safetensors").is_file()
    with pytest.raises(UserError, match="neither a finished run nor an adapter"):
        export_run(tmp_path, tmp_path / "none")
    with pytest.raises(UserError, match="no such folder"):
        export_run(adapter, tmp_path / "none", base="/not/there")
    assert not (tmp_path / "none").exists()
