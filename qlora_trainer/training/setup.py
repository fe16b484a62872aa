"""A run file made into a run: each function one arrow of "data on its way".

model named -> folder, configuration, tokenizer -> records -> encoded rows -> base in NF4 ->
adapters -> activations -> optimizer -> windows of micro-batches -> the loop.

The only file of this room that reads the configuration; everything it calls takes plain values.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_trainer.base.dtype import choose_compute_dtype
from qlora_trainer.base.hub import ResolvedModel, resolve_model
from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.load import BaseSpec, load_base, load_config
from qlora_trainer.base.machine import choose_device
from qlora_trainer.config.settings import LayerChoice, RunConfig, SourceSettings
from qlora_trainer.data.batches import BatchPlan, collate, row_layout
from qlora_trainer.data.dataset import EncodedDataset, build_dataset, split_eval
from qlora_trainer.data.encode import Encoder, choose_pad_id
from qlora_trainer.data.isolation import refuse_packing_leak
from qlora_trainer.data.read import DataSource
from qlora_trainer.errors import UserError
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.tasks.task import Batch
from qlora_trainer.training.activations import ActivationPlan, plan_activations
from qlora_trainer.training.optimizer import AdapterAdamW
from qlora_trainer.training.plan import TrainingPlan
from qlora_trainer.training.windows import Windows
from qlora_trainer.units import format_bytes

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ModelSource:
    """A model found, its tokenizer read, nothing heavy loaded.

    Attributes:
        resolved: Folder and, for a hub model, the commit.
        config: transformers' configuration.
        tokenizer: The model's own.
        device: Where it is going to live.
        base_spec: How it is going to be held.
        stop_ids: Tokens that end an answer, by the model's generation settings.
    """

    resolved: ResolvedModel
    config: Any
    tokenizer: Any
    device: torch.device
    base_spec: BaseSpec
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class RunData:
    """Encoded rows of a run.

    Attributes:
        train: Rows to learn.
        held_out: Rows to evaluate on, if any.
        encoder: What made them.
        pad_id: Fills shorter rows; never trained.
    """

    train: EncodedDataset
    held_out: EncodedDataset | None
    encoder: Encoder
    pad_id: int


def open_model(run: RunConfig) -> ModelSource:
    """Find the model and read what is light: configuration and tokenizer.

    Raises:
        UserError: It is not there, is broken, or does not fit the device or the settings.
    """
    model = run.model
    try:
        device = choose_device(model.device)
    except ValueError as error:
        raise UserError(f"model.device = {model.device!r}: {error}") from None
    resolved = resolve_model(
        model.source, model.revision, trust_remote_code=model.trust_remote_code
    )
    config = load_config(resolved.folder, trust_remote_code=model.trust_remote_code)
    compute_dtype = choose_compute_dtype(model.compute_dtype, device, config.model_type)
    spec = base_spec(run, compute_dtype)
    check_length(run, config)
    tokenizer = _read_tokenizer(resolved, model)
    return ModelSource(resolved, config, tokenizer, device, spec, _stop_ids(resolved.folder))


def _stop_ids(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of the model's generation settings, which may be several or none."""
    file = folder / "generation_config.json"
    try:
        given = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except FileNotFoundError:
        return ()
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: is not a JSON object: {error}") from None
    return tuple(given) if isinstance(given, list) else () if given is None else (given,)


def _read_tokenizer(resolved: ResolvedModel, model: Any) -> Any:
    try:
        return AutoTokenizer.from_pretrained(
            str(resolved.folder), local_files_only=True, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise UserError(
            f"model.source = {model.source!r}: its tokenizer cannot be read from "
            f"{resolved.folder}: {error}"
        ) from error


def base_spec(run: RunConfig, compute_dtype: torch.dtype) -> BaseSpec:
    """How the base is held."""
    model = run.model
    return BaseSpec(
        quantization=model.quantization,
        double_quant=model.double_quant,
        block_size=model.block_size,
        compute_dtype=compute_dtype,
        attention=None if model.attention == "auto" else model.attention,
        keep_unquantized=tuple(model.keep_unquantized),
        trust_remote_code=model.trust_remote_code,
    )


def check_length(run: RunConfig, config: Any) -> None:
    """Refuse sequences longer than the model knows positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and run.data.max_seq_len > limit:
        raise UserError(
            f"data.max_seq_len = {run.data.max_seq_len}: {run.model.source} knows {limit} "
            f"positions; take {limit} or less"
        )


def open_data(
    run: RunConfig, source: ModelSource, progress: Callable[[int], None] | None = None
) -> RunData:
    """Read and encode all rows, or find them encoded.

    Raises:
        UserError: With every faulty row, its file and line.
    """
    data = run.data
    encoder = Encoder(source.tokenizer, chat_template=run.model.chat_template, loss_on=data.loss_on)

    def build(sources: list[SourceSettings], name: str) -> EncodedDataset:
        try:
            return build_dataset(
                [DataSource(**item.model_dump()) for item in sources],
                encoder,
                max_seq_len=data.max_seq_len,
                over_length=data.over_length,
                cache_dir=_cache_folder(data.cache_folder),
                seed=run.train.seed,
                progress=progress,
            )
        except UserError as error:
            raise UserError(f"data.{name}: {error}") from None

    train = build(data.train, "train")
    held_out = build(data.eval, "eval") if data.eval else None
    if data.eval_fraction:
        train, held_out = split_eval(train, data.eval_fraction, run.train.seed)
    if held_out is not None and run.evaluation.max_rows is not None:
        held_out = held_out.select(range(min(len(held_out), run.evaluation.max_rows)))
    return RunData(train, held_out, encoder, choose_pad_id(source.tokenizer))


def _cache_folder(setting: str | None) -> Path:
    chosen = setting or os.environ.get("QLORA_CACHE") or "~/.cache/qlora_trainer"
    return Path(chosen).expanduser() / "data"


def load_model(run: RunConfig, source: ModelSource, progress: Progress | None = None) -> Any:
    """Load the base, frozen, onto its device.

    Raises:
        UserError: The checkpoint is not whole, or the model lets packed examples see each other.
    """
    model = load_base(
        source.resolved.folder,
        AutoModelForCausalLM,
        source.base_spec,
        source.device,
        progress=progress,
    )
    if run.data.packing:
        refuse_packing_leak(model, source.device, source.config.get_text_config().vocab_size)
    return model


def add_adapter(run: RunConfig, model: Any, compute_dtype: torch.dtype) -> AdapterSpec:
    """Put the adapter on the base and set what each layer does with its activations."""
    spec = adapter_spec(run, len(decoder_layers(model)))
    inject_adapter(model, spec, dtype=adapter_dtype(run, compute_dtype), seed=run.train.seed)
    return spec


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
        layers=_layer_numbers(adapter.layers, layer_count),
        modules_to_save=tuple(adapter.modules_to_save),
        rank_pattern=adapter.rank_pattern,
        alpha_pattern=adapter.alpha_pattern,
    )


def _layer_numbers(choice: str | list[int] | LayerChoice, count: int) -> tuple[int, ...] | None:
    if isinstance(choice, str):
        return None
    if isinstance(choice, list):
        numbers = choice
    elif choice.last is not None:
        numbers = list(range(count - choice.last, count))
    elif choice.first is not None:
        numbers = list(range(choice.first))
    else:
        assert choice.range is not None  # one of the three is given, the settings see to it
        numbers = list(range(*choice.range))
    if not numbers or min(numbers) < 0 or max(numbers) >= count:
        raise UserError(f"adapter.layers: the model has layers 0 to {count - 1}, not all of these")
    return tuple(sorted(set(numbers)))


def adapter_dtype(run: RunConfig, compute_dtype: torch.dtype) -> torch.dtype:
    """bf16 with bf16 compute, otherwise fp32: a sum of small updates is lost in fp16."""
    if run.adapter.dtype == "auto":
        return torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32
    return torch.bfloat16 if run.adapter.dtype == "bf16" else torch.float32


def set_activations(run: RunConfig, model: Any) -> ActivationPlan:
    """Keep or recompute, layer by layer."""
    return plan_activations(model, decoder_layers(model), run.train.activations)


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


def notes(task: CausalLM, optimizer: AdapterAdamW) -> Iterator[str]:
    """What the user should know of the loss and of the optimizer's memory."""
    if not task.loss_path.chunked:
        yield task.loss_path.reason
    yield from optimizer.notes
    size = optimizer.optimizer_bytes()
    yield (
        f"optimizer states: {format_bytes(size.total_bytes)}, "
        f"{format_bytes(size.pageable_bytes)} of them pageable to host memory"
    )


def make_windows(run: RunConfig, data: RunData, attention: str | None) -> Windows:
    """The training data by step."""
    plan = BatchPlan(
        data.train.lengths,
        micro_batch_size=run.train.micro_batch_size,
        seed=run.train.seed,
        packing=run.data.packing,
        capacity=run.data.max_seq_len,
        order="by_length" if run.data.group_by_length and not run.data.packing else "random",
    )
    layout = row_layout(attention)

    def make(number: int) -> Batch:
        rows = plan.micro_batch(number)
        return collate(data.train, rows, pad_id=data.pad_id, packed=run.data.packing, layout=layout)

    return Windows.numbered(len(plan), make, run.train.gradient_accumulation_steps)


def eval_batches(run: RunConfig, data: RunData) -> Callable[[], Iterator[Batch]] | None:
    """Begin a pass over the held-out rows, like lengths together, every row once."""
    held_out = data.held_out
    if held_out is None:
        return None
    size = run.evaluation.micro_batch_size or run.train.micro_batch_size
    plan = BatchPlan(held_out.lengths, micro_batch_size=size, order="by_length")

    def begin() -> Iterator[Batch]:
        for number in range(len(plan)):
            yield collate(held_out, plan.micro_batch(number), pad_id=data.pad_id)

    return begin


def training_plan(run: RunConfig, windows: Windows) -> TrainingPlan:
    """What the loop is to do."""
    train, evaluation, output = run.train, run.evaluation, run.output
    total = train.max_steps or windows.steps_of(train.epochs)
    warmup = train.warmup_steps
    return TrainingPlan(
        total_steps=total,
        learning_rate=train.learning_rate,
        schedule=train.schedule,
        warmup_steps=round(total * train.warmup_ratio) if warmup is None else warmup,
        max_grad_norm=train.max_grad_norm or None,
        seed=train.seed,
        evaluate_every_steps=evaluation.every_steps,
        save_every_steps=output.save_every_steps,
        keep_last=output.keep_last,
        patience=evaluation.early_stopping_patience,
    )
