"""A tiny model with the real tokenizer, and a few rows: whole runs in seconds."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_trainer.config.read import check_values
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.run.report import Reporter

Settings = dict[str, dict[str, Any]]


class Lines(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="session")
def tiny_model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers that speaks SmolLM2's tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / name, folder / name)
    return folder


def tiny_run(base: Path, place: Path, /, **sections: dict[str, Any]) -> RunConfig:
    """Settings of a small run in a folder, with sections changed."""
    rows = [
        {"messages": [{"role": "user", "content": f"What is {n} plus {n}?"},
                      {"role": "assistant", "content": f"It is {2 * n}."}]}
        for n in range(24)
    ]  # fmt: skip
    data = place / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    settings: Settings = {
        "model": {"source": str(base), "device": "cpu"},
        "adapter": {"rank": 4},
        "data": {
            "train": str(data),
            "eval_fraction": 0.25,
            "max_seq_len": 128,
            "cache_folder": str(place / "cache"),
        },
        "train": {
            "max_steps": 4,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
        },
        "output": {"folder": str(place / "run")},
    }
    for section, values in sections.items():
        settings.setdefault(section, {}).update(values)
    return check_values(settings)


@pytest.fixture
def make_run(tiny_model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Settings of a small run, with sections changed."""
    return partial(tiny_run, tiny_model, tmp_path)
