"""The step of every task runs without weights, padded or not: `qlora profile` foresees it."""

from typing import Any

import pytest
import torch
import transformers as tf

from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.load import build_weightless_base
from qlora_trainer.base.spec import BaseSpec
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.memory.foresight import RunShape, simulate_run
from qlora_trainer.memory.full_batch import full_batch
from qlora_trainer.memory.gpus import read_gpu
from qlora_trainer.memory.measure import measure_steps
from qlora_trainer.tasks.catalogue import task_kind
from qlora_trainer.tasks.kind import TaskInputs
from qlora_trainer.training.activations import plan_activations
from qlora_trainer.training.optimizer import AdapterAdamW

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


@pytest.mark.parametrize("padded", [False, True])
def test_biases_of_positions_take_what_was_foreseen(padded: bool) -> None:
    """T5 adds one to every score: a mask the size of the scores, which is most of this step."""
    kind, tokens = task_kind("seq2seq-lm"), 192
    config = tf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    settings = {"max_target_len": tokens, "num_beams": 1}
    shape = RunShape(
        BaseSpec("none", compute_dtype=torch.float32), AdapterSpec(4, 8.0), torch.float32,
        micro_batch_size=2, seq_len=tokens, optimizer="adamw", padded=padded, task=kind.name,
        task_settings=settings,
    )  # fmt: skip
    foreseen = simulate_run(config, shape, None).trace.live()
    model = build_weightless_base(config, kind.auto_class, shape.base).to_empty(device="cpu")
    model.tie_weights()
    for tensor in model.parameters():
        tensor.data.normal_(0, 0.02)
    inject_adapter(model, shape.adapter, dtype=torch.float32)
    plan_activations(model, decoder_layers(model), shape.activations)
    task = kind.make_task(TaskInputs(model, settings))
    real = measure_steps(
        model,
        [task.prepare(full_batch(shape, config))],
        task=task,
        optimizer=AdapterAdamW(adapter_parameters(model), kind="adamw"),
        device=torch.device("cpu"),
    )
    scores = 2 * 4 * tokens * tokens * 4
    assert real.allocated_bytes > 3 * scores
    assert foreseen.peak_bytes == pytest.approx(real.allocated_bytes, rel=0.01)
