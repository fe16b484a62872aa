"""A run file made into a run: each function one arrow of "data on its way".

base in NF4 (`open_model`, `open_data`) -> adapters -> activations -> optimizer -> windows of
micro-batches (`feed`) -> the loop. These four alone read the configuration in this room; everything
they call takes plain values. What the other three offer is reached through here as well.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

from qlora_trainer.base.attention_notes import attention_notes as base_notes
from qlora_trainer.base.layers import decoder_layers, layer_count
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.data.encode import Encoder
from qlora_trainer.data.rows import RecordEncoder, RowEncoder
from qlora_trainer.errors import UserError
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter, with_heads
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.tasks.kind import TaskInputs, TaskKind
from qlora_trainer.tasks.linear_cross_entropy import Regularized
from qlora_trainer.tasks.task import Task
from qlora_trainer.training.activations import Activation, plan_activations
from qlora_trainer.training.compiled import compile_modules
from qlora_trainer.training.feed import collate_rows, eval_batches, make_windows, references
from qlora_trainer.training.open_data import (
    RunData,
    earlier_adapter,
    encode_sources,
    head_settings,
    make_encoder,
    open_data,
    pad_id,
)
from qlora_trainer.training.open_model import (
    ModelSource,
    Progress,
    base_spec,
    check_attention,
    check_length,
    known_positions,
    load_model,
    open_model,
)
from qlora_trainer.training.optimizer import AdapterAdamW
from qlora_trainer.training.plan import TrainingPlan
from qlora_trainer.training.techniques import Techniques, apply_techniques
from qlora_trainer.training.windows import Windows
from qlora_trainer.units import format_bytes

__all__ = [
    "ModelSource",
    "Progress",
    "RunData",
    "adapter_dtype",
    "adapter_spec",
    "add_adapter",
    "base_spec",
    "check_attention",
    "check_length",
    "collate_rows",
    "earlier_adapter",
    "encode_sources",
    "eval_batches",
    "head_settings",
    "known_positions",
    "load_model",
    "make_encoder",
    "make_optimizer",
    "make_task",
    "make_windows",
    "model_adapter_spec",
    "model_settings",
    "notes",
    "open_data",
    "open_model",
    "pad_id",
    "references",
    "regularized",
    "set_activations",
    "techniques",
    "training_plan",
]


def add_adapter(
    run: RunConfig, model: Any, compute_dtype: torch.dtype, kind: TaskKind | None = None
) -> AdapterSpec:
    """Put the adapter on the base; a task's own head is trained and saved with it.

    Returns:
        Its settings for this model.

    Raises:
        UserError: Layers or modules named in the settings are not there.
    """
    spec = model_adapter_spec(run, model, kind)
    inject_adapter(model, spec, dtype=adapter_dtype(run, compute_dtype), seed=run.train.seed)
    return spec


def model_adapter_spec(run: RunConfig, model: Any, kind: TaskKind | None = None) -> AdapterSpec:
    """The adapter's settings for a model, its task's own head among what is trained in full."""
    spec = adapter_spec(run, layer_count(model))
    return with_heads(spec, model) if kind is not None and kind.new_head else spec


def adapter_spec(run: RunConfig, layer_count: int) -> AdapterSpec:
    """The adapter's settings for a model of so many decoder layers."""
    adapter = run.adapter
    targets = adapter.target_modules
    return AdapterSpec(
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        rslora=adapter.rslora,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        layers=adapter.layer_numbers(layer_count),
        modules_to_save=tuple(adapter.modules_to_save),
        rank_pattern=adapter.rank_pattern,
        alpha_pattern=adapter.alpha_pattern,
    )


def adapter_dtype(run: RunConfig, compute_dtype: torch.dtype) -> torch.dtype:
    """bf16 with bf16 compute, otherwise fp32: a sum of small updates is lost in fp16.

    Raises:
        UserError: bf16 is asked for on a device that computes in fp16.
    """
    if run.adapter.dtype == "bf16" and compute_dtype == torch.float16:
        raise UserError(
            "adapter.dtype = 'bf16': the model computes in fp16 here (model.compute_dtype = "
            f"{run.model.compute_dtype!r}), where adapters are held in fp32; take 'auto'"
        )
    if run.adapter.dtype == "auto":
        return torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32
    return torch.bfloat16 if run.adapter.dtype == "bf16" else torch.float32


def techniques(run: RunConfig) -> Techniques:
    """What replaces modules of the model."""
    train = run.train
    return Techniques(
        train.fused_mlp, train.mlp_tile_tokens, train.tiled_norms, train.mlp_keeps_inner,
        train.fused_qkv, train.fused_linear, train.attention_keeps_probabilities,
    )  # fmt: skip


def regularized(run: RunConfig) -> Regularized:
    """What is added to the cross-entropy."""
    return Regularized(run.train.label_smoothing, run.train.z_loss)


def set_activations(
    run: RunConfig, model: Any, solved: Activation | Sequence[Activation] | None = None
) -> list[str]:
    """Put the step's techniques on the model; keep, recompute or offload; compile what is left.

    Args:
        run: The settings.
        model: Adapters already on it.
        solved: What `train.activations: auto` came to; not looked at otherwise.

    Returns:
        What keeps its plain path and why, in words for the user.
    """
    wanted: Any = run.train.activations
    if wanted == "auto":
        wanted = "recompute" if solved is None else solved
    kept = apply_techniques(model, techniques(run))
    plan_activations(model, decoder_layers(model), wanted)
    if run.train.compile:
        kept += compile_modules(model)
    return kept


def model_settings(encoder: RecordEncoder) -> dict[str, Any]:
    """What the data says of the model's configuration: its labels."""
    return {} if isinstance(encoder, Encoder) else cast(RowEncoder, encoder).model_settings()


def make_task(
    run: RunConfig,
    model: Any,
    source: ModelSource,
    data: RunData | None,
    *,
    encoder: RecordEncoder | None = None,
) -> Task:
    """Loss and metrics of the run's task on this model.

    Args:
        run: The settings.
        model: With its adapter.
        source: What the model is.
        data: The run's rows; None where there are none of its own (class weights are theirs).
        encoder: Made the rows that stand in for them.
    """
    inputs = TaskInputs(
        model, run.task_settings.model_dump(), encoder if data is None else data.encoder,
        None if data is None else data.train, run.train.loss_chunk_tokens, regularized(run),
        run.train.chunked_loss,
    )  # fmt: skip
    return source.kind.make_task(inputs)


def make_optimizer(run: RunConfig, model: Any) -> AdapterAdamW:
    """AdamW over what is trained."""
    train = run.train
    return AdapterAdamW(
        adapter_parameters(model),
        kind=train.optimizer,
        weight_decay=train.weight_decay,
        betas=(train.beta1, train.beta2),
        eps=train.epsilon,
    )


def notes(task: Task, optimizer: AdapterAdamW) -> Iterator[str]:
    """What the user should know of the loss and of the optimizer's memory."""
    if isinstance(task, CausalLM) and not task.loss_path.chunked:
        yield task.loss_path.reason
    yield from optimizer.notes
    size = optimizer.optimizer_bytes()
    yield (
        f"optimizer states: {format_bytes(size.total_bytes)}, "
        f"{format_bytes(size.pageable_bytes)} of them pageable to host memory"
    )


def attention_notes(run: RunConfig, model: Any) -> Iterator[str]:
    """What the user should know of the model's attention, of packed rows' above all."""
    data = run.data
    return base_notes(
        model, packed=data.packing, mask_free=data.mask_free_packing, longest=data.max_seq_len
    )


def training_plan(run: RunConfig, windows: Windows, task: Task | None = None) -> TrainingPlan:
    """What the loop is to do.

    Raises:
        UserError: The learning rate would still be rising when the run ends, or the task has no
            metric of the name given.
    """
    best_metric, greater_is_better = best_by(run, task)
    train, evaluation, output = run.train, run.evaluation, run.output
    total = train.max_steps or windows.steps_of(train.epochs)
    warmup = train.warmup_steps
    if warmup is not None and warmup >= total:
        length = "train.max_steps" if train.max_steps else f"train.epochs = {train.epochs}"
        raise UserError(
            f"train.warmup_steps = {warmup}: must be below the run's {total} steps ({length}); "
            "take fewer, or leave it out: train.warmup_ratio fits any length"
        )
    return TrainingPlan(
        total_steps=total,
        learning_rate=train.learning_rate,
        schedule=train.schedule,
        warmup_steps=round(total * train.warmup_ratio) if warmup is None else warmup,
        max_grad_norm=train.max_grad_norm or None,
        seed=train.seed,
        evaluate_every_steps=evaluation.every_steps,
        save_every_steps=output.save_every_steps,
        save_every_seconds=output.save_every_minutes * 60,
        keep_last=output.keep_last,
        patience=evaluation.early_stopping_patience,
        best_metric=best_metric,
        greater_is_better=greater_is_better,
    )


def best_by(run: RunConfig, task: Task | None) -> tuple[str, bool]:
    """The metric that tells the best adapter, and whether greater is better.

    Raises:
        UserError: The task has no such metric.
    """
    name = run.evaluation.metric
    if task is None:
        return "loss", False
    if name == "auto":
        name = task.best_metric
    if name not in task.metrics:
        raise UserError(f"evaluation.metric = {name!r}: {run.task} has {', '.join(task.metrics)}")
    return name, task.metrics[name]
