"""Settings that contradict each other, found before anything heavy starts."""

from collections.abc import Iterator

from qlora_trainer.config.settings import RunConfig


def cross_field_faults(config: RunConfig) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield the place and the message of every contradiction between settings."""
    model, data, train = config.model, config.data, config.train
    if data.eval and data.eval_fraction:
        yield (
            ("data", "eval_fraction"),
            f"data.eval_fraction = {data.eval_fraction}: data.eval is given too; keep one of them",
        )
    if config.evaluation.early_stopping_patience and not (data.eval or data.eval_fraction):
        yield (
            ("evaluation", "early_stopping_patience"),
            "evaluation.early_stopping_patience: needs held-out rows; "
            "set data.eval or data.eval_fraction",
        )
    if config.evaluation.early_stopping_patience and not config.evaluation.every_steps:
        yield (
            ("evaluation", "early_stopping_patience"),
            "evaluation.early_stopping_patience: needs evaluation.every_steps",
        )
    if config.evaluation.every_steps and not (data.eval or data.eval_fraction):
        yield (
            ("evaluation", "every_steps"),
            "evaluation.every_steps: there are no held-out rows; "
            "set data.eval or data.eval_fraction",
        )
    if model.attention == "flash_attention_2" and model.device == "cpu":
        yield (
            ("model", "attention"),
            "model.attention = 'flash_attention_2': needs a GPU, but model.device = 'cpu'; "
            "take 'auto'",
        )
    if model.attention == "flash_attention_2" and model.compute_dtype == "fp32":
        yield (
            ("model", "attention"),
            "model.attention = 'flash_attention_2': works in 16 bit only, "
            "but model.compute_dtype = 'fp32'",
        )
    if model.compute_dtype == "fp16" and config.adapter.dtype == "bf16":
        yield (
            ("adapter", "dtype"),
            "adapter.dtype = 'bf16': adapters of an fp16 model are held in fp32; take 'auto'",
        )
    # A resolved run file lists defaults too, so only a value of its own counts as given.
    ratio_given = train.warmup_ratio != type(train).model_fields["warmup_ratio"].default
    if train.warmup_steps is not None and ratio_given:
        yield (
            ("train", "warmup_ratio"),
            "train.warmup_ratio: train.warmup_steps is given too; keep one of them",
        )
