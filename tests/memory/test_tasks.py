"""The step of every task runs without weights, padded or not: `qlora profile` foresees it."""

from typing import Any

import pytest
import torch
import transformers as tf

from qlora_trainer.base.spec import BaseSpec
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.memory.foresight import RunShape, simulate_run
from qlora_trainer.memory.gpus import read_gpu
from qlora_trainer.tasks.catalogue import task_kind

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
CONFIGS = {"bert": tf.BertConfig, "llama": tf.LlamaConfig}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("problem", ["auto", "multi", "regression"])
@pytest.mark.parametrize("padded", [False, True])
def test_classifiers_are_foreseen(name: str, problem: str, padded: bool) -> None:
    kind = task_kind("sequence-classification")
    settings: dict[str, Any] = {"problem": problem, "labels": None, "class_weights": "none"}
    config = CONFIGS[name](**SIZES)
    for key, value in kind.weightless_settings(settings).items():
        setattr(config, key, value)
    shape = RunShape(
        BaseSpec("nf4", compute_dtype=torch.bfloat16), AdapterSpec(4, 8.0), micro_batch_size=3,
        seq_len=16, padded=padded, task=kind.name, task_settings=settings,
    )  # fmt: skip
    gpu = read_gpu("rtx-4090-24gb")
    found = simulate_run(config, shape, gpu, model_class=kind.auto_class)
    heads = {"bert": 32 * 32 + 32 + (33 * config.num_labels), "llama": 32 * config.num_labels}
    assert found.accounts.trained_parameters > heads[name]
    assert found.on(gpu).allocated_bytes > 0
