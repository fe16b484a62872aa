"""A task's run with PEFT and bitsandbytes: what `benchmark_tasks.py` lays beside ours.

The base is the same to the last bit: codes and scales of our NF4 layers are handed to bitsandbytes'
`Linear4bit`, which PEFT adapts and computes with. Adapter and head start from the same values, ours
saved before the first step and loaded by PEFT; rows, micro-batches, their order, the learning rate
of every step and the held-out rows are those of the run file. The rest is what one writes with
PEFT: its layers, fp32 adapters and head, torch's AdamW. So what differs at the end was made by the
training.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft_loop import Clock, train_steps

from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.base.quantize import quant_state
from qlora_trainer.lora.files import save_adapter
from qlora_trainer.lora.trained import set_module
from qlora_trainer.tasks.kind import TaskInputs
from qlora_trainer.tasks.task import to_device
from qlora_trainer.training import setup
from qlora_trainer.training.evaluate import evaluate

CPU = torch.device("cpu")


def as_linear4bit(layer: NF4Linear) -> Linear4bit:
    """The same bits in bitsandbytes' layer, which must not re-pack them (see `peft_twin.py`).

    Raises:
        ValueError: A block of weights goes over the end of a row: bitsandbytes 0.50 dequantizes
            such a weight wrongly on a CPU.
    """
    if layer.in_features % layer.block_size:
        raise ValueError(f"{layer.in_features} columns are no whole blocks of {layer.block_size}")
    held, double_quant = layer.tensors, layer.double_quant
    shape = (layer.out_features, layer.in_features)
    state = quant_state(held, shape, layer.block_size, layer.compute_dtype)
    new = Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None,
        compute_dtype=layer.compute_dtype, compress_statistics=double_quant,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    new.weight = Params4bit(
        held.codes.view(-1, 1), quant_state=state, blocksize=layer.block_size,
        compress_statistics=double_quant, quant_type="nf4", module=new, bnb_quantized=True,
    )  # fmt: skip
    new.quant_state, new.bias = state, layer.bias
    new.support_avx512bf16_for_cpu = False
    return new


def load_with_peft(run: Any, source: setup.ModelSource, data: setup.RunData) -> tuple[Any, Any]:
    """The base with PEFT's adapter in it, and PEFT's model around it."""
    settings = setup.model_settings(data.encoder)
    with tempfile.TemporaryDirectory() as scratch:
        ours = setup.load_model(run, source, settings=settings)
        spec = setup.add_adapter(run, ours, source.base_spec.compute_dtype, source.kind)
        save_adapter(ours, spec, Path(scratch), base_source=None, task_type=source.kind.peft_type)
        del ours
        base = setup.load_model(run, source, settings=settings)
        for name, module in list(base.named_modules()):
            if isinstance(module, NF4Linear):
                set_module(base, name, as_linear4bit(module))
        base.is_loaded_in_4bit = True  # what PEFT asks before it adapts such layers
        model: Any = peft.PeftModel.from_pretrained(base, scratch, is_trainable=True)
    for module in base.modules():
        if isinstance(module, peft.utils.ModulesToSaveWrapper):
            module.float().register_forward_pre_hook(_as_fp32)
    for name, parameter in base.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in name or "modules_to_save" in name, name
            parameter.data = parameter.data.float()
    return base, model


def _as_fp32(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a 16-bit base gives, for a head in fp32."""
    return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)


def train_with_peft(run: Any) -> dict[str, Any]:
    """The run's figures with PEFT: metrics at the end, seconds, share of what is trained."""
    clock = Clock()
    source = setup.open_model(run)
    data = setup.open_data(run, source)
    # PEFT puts its layers into the base itself, which is asked: some wrappers know texts only.
    base, model = load_with_peft(run, source, data)
    task = source.kind.make_task(
        TaskInputs(base, run.task_settings.model_dump(), data.encoder, data.train)
    )
    windows = setup.make_windows(run, data, base.config._attn_implementation)
    held_out = setup.eval_batches(run, data)
    assert held_out is not None
    references = setup.references(run, data)
    before = evaluate(base, held_out(), task=task, device=CPU, references=references)
    base.train()
    train_steps(
        run,
        setup.training_plan(run, windows, task),
        [p for p in base.parameters() if p.requires_grad],
        lambda step: [to_device(task.prepare(batch), CPU) for batch in windows.window(step)],
        loss_sum=lambda batch: task.loss_sum(base, batch),
        loss_weight=task.loss_weight,
    )
    metrics = evaluate(base, held_out(), task=task, device=CPU, references=references)
    count, total = model.get_nb_trainable_parameters()
    return {
        "metrics": {**{f"{name}_before": value for name, value in before.items()}, **metrics},
        "best_by": task.best_metric,
        "trained_parameters": count,
        "parameters": total,
        **clock.read(),
    }
