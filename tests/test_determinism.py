"""Same seed, same bits on the same machine, whatever else the process did; another seed, others."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from qlora_trainer import train
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.training.log import read_metrics
from tests.run.conftest import make_run, tiny_model

__all__ = ["make_run", "tiny_model"]  # pytest finds fixtures by their names here


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]


def test_a_seed_decides_every_bit(make_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    torch.rand(7)  # what the process drew before is of no weight
    adapter = {"dropout": 0.1}
    here = train(make_run(adapter=adapter)).folder
    cache = {"cache_folder": str(tmp_path / "another cache")}
    again = make_run(adapter=adapter, data=cache, output={"folder": str(tmp_path / "again")})
    file = tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(again.model_dump(mode="json")))
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONHASHSEED": "4711"}
    command = [sys.executable, "-m", "qlora_trainer", "train", str(file)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | threads, timeout=300)
    other = make_run(adapter=adapter, train={"seed": 7}, output={"folder": str(tmp_path / "other")})
    first, second, third = (trained(p) for p in (here, tmp_path / "again", train(other).folder))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert losses(here) == losses(tmp_path / "again")
    assert not all(torch.equal(first[name], third[name]) for name in first)
