"""Settings that contradict each other, found before anything heavy starts.

Each rule names the settings it looks at, so that it is not told where one of them is faulty
itself. A resolved run file lists defaults too, so only a value of its own counts as given.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel

from qlora_trainer.config.settings import RunConfig
from qlora_trainer.config.tasks import tasks_of

_WITH_VOCABULARY = ("causal-lm", "seq2seq-lm")  # tasks whose head is the model's own


@dataclass(frozen=True)
class Contradiction:
    """One fault between settings.

    Attributes:
        settings: The settings it is between; the fault is told where the first one stands.
        message: What is wrong and the way out.
    """

    settings: tuple[tuple[str | int, ...], ...]
    message: str


def contradictions(config: RunConfig) -> Iterator[Contradiction]:
    """Every contradiction between settings."""
    yield from _row_order(config)
    yield from _held_out_rows(config)
    yield from _precision(config)
    yield from _head(config)
    yield from _streaming(config)
    yield from _sharding(config)
    yield from _quantized_cache(config)
    yield from _warm_up(config)
    yield from _mlp(config)
    yield from _loss(config)
    yield from _task(config)


def _mlp(config: RunConfig) -> Iterator[Contradiction]:
    train = config.train
    if train.fused_mlp:
        return
    for name in ("mlp_keeps_inner", "mlp_tile_tokens"):
        if value := getattr(train, name):
            yield Contradiction(
                (("train", name), ("train", "fused_mlp")),
                f"train.{name} = {value}: is a choice of the fused MLP; set train.fused_mlp: true",
            )


def _loss(config: RunConfig) -> Iterator[Contradiction]:
    train = config.train
    if train.loss_chunk_tokens is not None and not train.chunked_loss:
        yield Contradiction(
            (("train", "loss_chunk_tokens"), ("train", "chunked_loss")),
            f"train.loss_chunk_tokens = {train.loss_chunk_tokens}: is a choice of the chunked "
            "loss; set train.chunked_loss: true",
        )


def _row_order(config: RunConfig) -> Iterator[Contradiction]:
    data = config.data
    if data.mega_batch_mult is None or (data.group_by_length and not data.packing):
        return
    name = "packing" if data.packing else "group_by_length"
    yield Contradiction(
        (("data", "mega_batch_mult"), ("data", name)),
        f"data.mega_batch_mult = {data.mega_batch_mult}: is a choice of data.group_by_length, "
        f"but data.{name} = {str(getattr(data, name)).lower()}; leave it out",
    )


def _held_out_rows(config: RunConfig) -> Iterator[Contradiction]:
    data, evaluation = config.data, config.evaluation
    held_out = (("data", "eval"), ("data", "eval_fraction"))
    if data.eval and data.eval_fraction:
        yield Contradiction(
            held_out[::-1],
            f"data.eval_fraction = {data.eval_fraction}: data.eval is given too; keep one of them",
        )
    if not (data.eval or data.eval_fraction):
        for name, value in evaluation:
            if _is_given(evaluation, name):
                yield Contradiction(
                    (("evaluation", name), *held_out),
                    f"evaluation.{name} = {value}: needs held-out rows; "
                    "set data.eval or data.eval_fraction",
                )
    if evaluation.early_stopping_patience and not evaluation.every_steps:
        yield Contradiction(
            (("evaluation", "early_stopping_patience"), ("evaluation", "every_steps")),
            f"evaluation.early_stopping_patience = {evaluation.early_stopping_patience}: "
            "needs evaluation.every_steps",
        )


def _precision(config: RunConfig) -> Iterator[Contradiction]:
    model = config.model
    attention = ("model", "attention")
    if model.attention == "flash_attention_2" and model.device == "cpu":
        yield Contradiction(
            (attention, ("model", "device")),
            "model.attention = 'flash_attention_2': needs a GPU, but model.device = 'cpu'; "
            "take 'auto'",
        )
    if model.attention == "flash_attention_2" and model.compute_dtype == "fp32":
        yield Contradiction(
            (attention, ("model", "compute_dtype")),
            "model.attention = 'flash_attention_2': works in 16 bit only, "
            "but model.compute_dtype = 'fp32'",
        )
    if model.compute_dtype == "fp16" and config.adapter.dtype == "bf16":
        yield Contradiction(
            (("adapter", "dtype"), ("model", "compute_dtype")),
            "adapter.dtype = 'bf16': adapters of an fp16 model are held in fp32; take 'auto'",
        )
    for name in ("double_quant", "block_size"):
        if model.quantization == "none" and _is_given(model, name):
            yield Contradiction(
                (("model", name), ("model", "quantization")),
                f"model.{name} = {getattr(model, name)}: means nothing with "
                "model.quantization = 'none'; leave it out, or take 'nf4'",
            )


def _streaming(config: RunConfig) -> Iterator[Contradiction]:
    if config.model.stream_layers and config.train.activations == "keep":
        yield Contradiction(
            (("train", "activations"), ("model", "stream_layers")),
            "train.activations = 'keep': the layers of model.stream_layers = true leave the card "
            "before their backward; take 'recompute', 'offload' or 'auto'",
        )


def _head(config: RunConfig) -> Iterator[Contradiction]:
    model = config.model
    if model.head_on_host and model.head_bits != 16:
        yield Contradiction(
            (("model", "head_bits"), ("model", "head_on_host")),
            f"model.head_bits = {model.head_bits}: with model.head_on_host = true the head waits "
            "in host memory in 16 bits; keep one of them",
        )


def _sharding(config: RunConfig) -> Iterator[Contradiction]:
    model, name = config.model, ("model", "shard_layers")
    if model.shard_layers and config.train.activations == "keep":
        yield Contradiction(
            (("train", "activations"), name),
            "train.activations = 'keep': a layer of model.shard_layers = true is in parts again "
            "before its backward; take 'recompute', 'offload' or 'auto'",
        )
    if model.shard_layers and model.stream_layers:
        yield Contradiction(
            (("model", "stream_layers"), name),
            "model.stream_layers = true: with model.shard_layers = true the layers wait in parts "
            "on the cards; keep one of them",
        )
    if model.shard_layers and config.train.compile:
        yield Contradiction(
            (("train", "compile"), name),
            "train.compile = true: what is compiled has not been held to layers in parts "
            "(model.shard_layers = true); keep one of them",
        )


def _quantized_cache(config: RunConfig) -> Iterator[Contradiction]:
    model, name = config.model, ("model", "quantized_cache")
    if model.quantized_cache is None:
        return
    said = f"model.quantized_cache = {model.quantized_cache!r}"
    if model.quantization == "none":
        yield Contradiction(
            (name, ("model", "quantization")),
            f"{said}: nothing is quantized with model.quantization = 'none'; leave it out",
        )
    if model.trust_remote_code:
        yield Contradiction(
            (name, ("model", "trust_remote_code")),
            f"{said}: a model with Python of its own is not copied; leave it out",
        )
    if config.task not in _WITH_VOCABULARY:
        yield Contradiction(
            (name, ("task",)),
            f"{said}: the head of task = {config.task!r} is not the checkpoint's; leave it out",
        )


def _warm_up(config: RunConfig) -> Iterator[Contradiction]:
    train = config.train
    steps = ("train", "warmup_steps")
    if train.warmup_steps is None:
        return
    if _is_given(train, "warmup_ratio"):
        yield Contradiction(
            (("train", "warmup_ratio"), steps),
            f"train.warmup_ratio = {train.warmup_ratio}: train.warmup_steps is given too; "
            "keep one of them",
        )
    if train.max_steps is not None and train.warmup_steps >= train.max_steps:
        yield Contradiction(
            (steps, ("train", "max_steps")),
            f"train.warmup_steps = {train.warmup_steps}: must be below "
            f"train.max_steps = {train.max_steps}",
        )


def _task(config: RunConfig) -> Iterator[Contradiction]:
    task = ("task",)
    for name, value in config.task_settings:
        knowing = tasks_of(name)
        if config.task not in knowing and _is_given(config.task_settings, name):
            yield Contradiction(
                (("task_settings", name), task),
                f"task_settings.{name} = {value!r}: means nothing with task = {config.task!r}; "
                f"only {', '.join(knowing)} {'know' if len(knowing) > 1 else 'knows'} it",
            )
    if config.task not in _WITH_VOCABULARY:
        for name in ("label_smoothing", "z_loss"):
            if _is_given(config.train, name):
                yield Contradiction(
                    (("train", name), task),
                    f"train.{name} = {getattr(config.train, name)}: means nothing with task = "
                    f"{config.task!r}; only causal-lm and seq2seq-lm know it",
                )
    if config.task == "causal-lm":
        return
    only = "only causal-lm knows it"
    of_chats = (("model", "chat_template"), ("model", "chat_template_kwargs"))
    for section, name in (("data", "packing"), ("data", "loss_on"), *of_chats):
        if _is_given(getattr(config, section), name):
            yield Contradiction(
                ((section, name), task),
                f"{section}.{name} = {getattr(getattr(config, section), name)!r}: means nothing "
                f"with task = {config.task!r}; {only}",
            )
    for name in ("train", "eval"):
        for number, source in enumerate(getattr(config.data, name)):
            if _is_given(source, "format"):
                yield Contradiction(
                    (("data", name, number, "format"), task),
                    f"data.{name}.{number}.format = {source.format!r}: means nothing with task = "
                    f"{config.task!r}, whose rows are recognised by their fields; name them under "
                    f"data.{name}.{number}.columns where they are others",
                )


def _is_given(section: BaseModel, name: str) -> bool:
    return bool(getattr(section, name) != type(section).model_fields[name].get_default())
