"""Asking a trained adapter: load base and adapter as they were trained, answer prompts."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.base.device_memory import free_memory
from qlora_trainer.base.fingerprint import base_fingerprint
from qlora_trainer.base.machine import choose_device
from qlora_trainer.config.read import read_run_file
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.data.encode import Encoder, choose_pad_id
from qlora_trainer.data.rows import RecordEncoder
from qlora_trainer.errors import UserError
from qlora_trainer.lora.files import load_adapter
from qlora_trainer.lora.inject import adapters_disabled
from qlora_trainer.run.report import Reporter, tensors_loaded
from qlora_trainer.run.stops import learned_stop_ids
from qlora_trainer.tasks.generate import generate_tokens
from qlora_trainer.training import setup
from qlora_trainer.training.environment import base_trained_on

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Trained:
    """A finished run, loaded to be asked.

    Attributes:
        run: Its settings.
        model: Base with adapter, evaluating.
        source: The model's tokenizer, configuration and device.
        encoder: Makes examples as in training.
        folder: The run folder.
        known: Task settings that training has settled: labels.
    """

    run: RunConfig
    model: Any
    source: setup.ModelSource
    encoder: RecordEncoder
    folder: Path
    known: dict[str, Any]


def load_trained(
    folder: str | Path, *, reporter: Reporter | None = None, prompted: bool = False
) -> Trained:
    """Load the base and the adapter of a run folder.

    Args:
        folder: The run folder.
        reporter: Told what happens.
        prompted: Refuse a run that answers no prompts, before anything is loaded.

    Raises:
        UserError: The folder is no finished run, or its base has changed or gone.
    """
    folder = Path(folder).expanduser()
    if not (folder / "adapter").is_dir():
        raise UserError(f"{folder}: holds no adapter (no finished run); `qlora train` writes one")
    listener = reporter or Reporter()
    run = read_run_file(folder / "run.yaml")
    if prompted and run.task != "causal-lm":
        raise _answers_no_prompts(folder, run)
    run = _with_attention_of_here(run, listener)
    free_memory()
    source = setup.open_model(run)
    if base_trained_on(folder) != base_fingerprint(source.resolved.folder):
        raise UserError(
            f"{folder}: {run.model.source} is not the base this adapter was trained on any more; "
            "put the same release back"
        )
    known = setup.head_settings(folder / "adapter") if source.kind.new_head else {}
    encoder = setup.make_encoder(run, source, known=known)
    settings = setup.model_settings(encoder)
    told = tensors_loaded(listener)
    model = setup.load_model(run, source, told, settings=settings)
    # Wherever it was trained: fp32 holds a bf16 adapter exactly, where the model computes in fp16.
    computes_in_bf16 = source.base_spec.compute_dtype == torch.bfloat16
    dtype = torch.bfloat16 if computes_in_bf16 and run.adapter.dtype != "fp32" else torch.float32
    load_adapter(model, folder / "adapter", dtype=dtype, trainable=False)
    return Trained(run, model.eval(), source, encoder, folder, known)


def _answers_no_prompts(folder: Path, run: RunConfig) -> UserError:
    return UserError(
        f"{folder}: its task is {run.task}, which answers no prompts; put rows into a file and "
        f"use `qlora predict {folder} --data FILE --out FILE`, or, where the rows have labels, "
        f"`qlora evaluate {folder} --data FILE`"
    )


def _with_attention_of_here(run: RunConfig, listener: Reporter) -> RunConfig:
    """The settings, with another attention kernel where this machine lacks the run's."""
    try:
        setup.check_attention(run.model.attention, choose_device(run.model.device))
    except ValueError:
        return run  # no such device: refused with all that is known of it when the model is opened
    except UserError:
        listener.say(
            f"trained with model.attention = {run.model.attention!r}, which this machine does not "
            "have: going on with 'auto', the same attention more slowly, up to rounding"
        )
        model = run.model.model_copy(update={"attention": "auto"})
        return run.model_copy(update={"model": model})
    return run


def generate(
    trained: Trained,
    prompts: Sequence[Prompt],
    *,
    adapter: bool = True,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    temperature: float = 0.0,
    system: str | None = None,
    seed: int = 0,
    raw: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Answer prompts.

    Args:
        trained: From `load_trained`.
        prompts: A question each, or a list of chat messages.
        adapter: False answers with the base alone.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts per forward pass.
        temperature: 0 is greedy.
        system: A system message put before every question.
        seed: Of sampling.
        raw: A prompt that is text is asked as it is, not as a question of a chat.
        progress: Called with the number of prompts answered.

    Returns:
        One answer per prompt, in order, without special tokens.

    Raises:
        UserError: As `encode_prompts`.
    """
    return answer_encoded(
        trained, encode_prompts(trained, prompts, system=system, raw=raw), adapter=adapter,
        max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature, seed=seed,
        progress=progress,
    )  # fmt: skip


def answer_encoded(
    trained: Trained,
    asked: Sequence[list[int]],
    *,
    adapter: bool = True,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Answer prompts of `encode_prompts`; all else as in `generate`."""
    tokenizer = trained.source.tokenizer
    with nullcontext() if adapter else adapters_disabled(trained.model):
        answers = generate_tokens(
            trained.model,
            asked,
            pad_token_id=choose_pad_id(tokenizer),
            stop_token_ids=sorted(
                {
                    tokenizer.eos_token_id,
                    *trained.source.stop_ids,
                    *learned_stop_ids(trained.folder, tokenizer),
                }
            ),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
            seed=seed,
            progress=progress,
        )
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]


def encode_prompts(
    trained: Trained, prompts: Sequence[Prompt], *, system: str | None = None, raw: bool = False
) -> list[list[int]]:
    """Token ids of prompts, as `generate` asks them.

    Raises:
        UserError: The run answers no prompts, or a prompt is empty or longer than the model knows.
    """
    encoder = trained.encoder
    if not isinstance(encoder, Encoder):
        raise _answers_no_prompts(trained.folder, trained.run)
    asked = [
        encoder.encode_prompt(
            prompt if raw and isinstance(prompt, str) else _as_chat(prompt, system)
        )
        for prompt in prompts
    ]
    limit = setup.known_positions(trained.source.config)
    for number, ids in enumerate(asked, start=1):
        if not ids:
            raise UserError(f"prompt {number} is empty; ask something")
        if limit is not None and len(ids) >= limit:
            raise UserError(
                f"prompt {number} has {len(ids):,} tokens, and the model knows {limit:,} positions "
                "for it and its answer; shorten it, or show fewer examples"
            )
    return asked


def _as_chat(prompt: Prompt, system: str | None) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [{"role": "system", "content": system}, *turns] if system else turns
