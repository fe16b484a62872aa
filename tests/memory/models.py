"""Tiny models of the real architectures, and their real steps on this CPU."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
)

from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.load import BaseSpec, build_weightless_base, choose_attention, load_base
from qlora_trainer.base.packed_attention import use_packed_attention
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.memory.full_batch import full_batch
from qlora_trainer.memory.measure import Measured, measure_steps
from qlora_trainer.memory.program import RunShape
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.training.activations import plan_activations
from qlora_trainer.training.optimizer import AdapterAdamW
from qlora_trainer.training.techniques import apply_techniques

_SHARED = {
    "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


def tiny_config(name):
    if name == "gpt2":
        return GPT2Config(
            vocab_size=1000, n_embd=128, n_layer=3, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0,
            embd_pdrop=0.0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
    if name == "gemma2":
        return Gemma2Config(**_SHARED, head_dim=32, sliding_window=32)
    if name == "qwen3":
        return Qwen3Config(**_SHARED, head_dim=32)
    return LlamaConfig(**_SHARED)


def run_shape(quantization="nf4", activations="recompute", dtype=torch.bfloat16, **changes):
    given = {
        "base": BaseSpec(quantization, compute_dtype=dtype),
        "adapter": AdapterSpec(rank=8, alpha=16),
        "adapter_dtype": dtype,
        "micro_batch_size": 2,
        "seq_len": 64,
        "accumulation": 2,
        "optimizer": "adamw",
        "activations": activations,
    }
    return RunShape(**(given | changes))


def real_steps(config, shape: RunShape) -> Measured:
    model = build_weightless_base(config, AutoModelForCausalLM, shape.base).to_empty(device="cpu")
    model.tie_weights()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(0, 0.02)
        else:
            tensor.data.zero_()
    choose_attention(model, shape.base, torch.device("cpu"))
    return steps_of(model, shape)


def loaded_steps(folder: Path, shape: RunShape) -> Measured:
    """Real steps of a checkpoint, loaded as a run loads it."""
    return steps_of(load_base(folder, AutoModelForCausalLM, shape.base, torch.device("cpu")), shape)


def steps_of(model, shape: RunShape) -> Measured:
    if shape.packed and shape.mask_free:
        use_packed_attention(model, shape.seq_len)
    inject_adapter(model, shape.adapter, dtype=shape.adapter_dtype)
    apply_techniques(model, shape.techniques)
    plan_activations(model, decoder_layers(model), shape.activations)
    task = CausalLM.for_model(
        model, chunk_tokens=shape.loss_chunk_tokens, chunked=shape.chunked_loss
    )
    optimizer = AdapterAdamW(adapter_parameters(model), kind=shape.optimizer)
    batch = task.prepare(full_batch(shape, attention=model.config._attn_implementation))
    return measure_steps(
        model,
        [batch] * min(shape.accumulation, 2),
        task=task,
        optimizer=optimizer,
        device=torch.device("cpu"),
    )
