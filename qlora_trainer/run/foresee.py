"""Memory foreseen for a run file on a card, from the model's `config.json` alone."""

import copy
import itertools
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_trainer.base.dtype import compute_dtype_for, cpu_multiplies_bf16
from qlora_trainer.base.hub import resolve_model
from qlora_trainer.base.load import load_config
from qlora_trainer.base.picture_size import processed_size
from qlora_trainer.config.read import check_values, read_run_file
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.memory.auto import choose_activations
from qlora_trainer.memory.foresight import Foresight, RunShape, SimulatedRun, simulate_run
from qlora_trainer.memory.gpus import GpuProfile, plannable_bytes
from qlora_trainer.memory.loss_chunk import with_loss_chunk
from qlora_trainer.tasks.catalogue import task_kind
from qlora_trainer.training import setup

# A comma that parts two values, and not the items of one such as [q_proj, v_proj].
_OUTSIDE_BRACKETS = re.compile(r",(?![^\[{]*[\]}])")


def run_for_model(model: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A run of default settings on a model, for asking about memory without a run file."""
    values = {"model": {"source": model}, "data": {"train": "not read"}}
    return check_values(values, overrides=overrides, name="--model")


def sweep(
    run_file: Path | None, model: str | None, overrides: Sequence[str], axes: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], RunConfig]]:
    """Every combination of the axes' values, as the settings changed and the run they make.

    Args:
        run_file: Where the other settings come from; or
        model: a model, with default settings.
        overrides: Settings changed in all of them.
        axes: `section.setting=value,value,...` each.

    Raises:
        UserError: An axis is malformed, or a combination is no run that can start.
    """
    for chosen in itertools.product(*(_axis(axis) for axis in axes)):
        every = (*overrides, *chosen)
        if run_file is not None:
            yield chosen, read_run_file(run_file, every)
        else:
            assert model is not None  # the command line asks for one of the two
            yield chosen, run_for_model(model, every)


def _axis(axis: str) -> list[str]:
    name, equals, text = axis.partition("=")
    values = _OUTSIDE_BRACKETS.split(text)
    if not equals or not all(value.strip() for value in values):
        raise UserError(f"--sweep {axis}: write section.setting=value,value,...")
    return [f"{name.strip()}={value.strip()}" for value in values]


def foresee_run(
    run: RunConfig,
    gpu: GpuProfile,
    *,
    budget_bytes: int | None = None,
    expandable_segments: bool = False,
    paged_on_card: bool = False,
    with_timeline: bool = False,
    processes: int = 1,
) -> Foresight:
    """What a run will need on a card; every sequence at `data.max_seq_len`.

    Args:
        run: The settings.
        gpu: The card.
        budget_bytes: What of it is free for this process; its usable memory unless given.
        expandable_segments: Of the allocator's configuration.
        paged_on_card: Managed memory counts on the card, as on Windows and WSL.
        with_timeline: Keep the course of allocated and reserved memory.
        processes: How many make the run together; the memory is of one of them.

    Raises:
        UserError: The model is not there or cannot have these settings.
    """
    config = read_model_config(run)
    setup.check_length(run, config)
    changed = task_config(run, config)
    found = simulate_solved(
        run, changed, run_shape(run, config, gpu, processes), gpu, budget_bytes,
        expandable_segments=expandable_segments, paged_on_card=paged_on_card,
    )  # fmt: skip
    return found.on(
        gpu,
        budget_bytes=budget_bytes,
        expandable_segments=expandable_segments,
        paged_on_card=paged_on_card,
        with_timeline=with_timeline,
    )


def simulate_solved(
    run: RunConfig,
    config: Any,
    shape: RunShape,
    gpu: GpuProfile | None,
    budget_bytes: int | None,
    *,
    expandable_segments: bool = False,
    paged_on_card: bool = False,
    choose_chunk: bool = True,
) -> SimulatedRun:
    """A run simulated as `train.activations: auto` solves it; as it is where that is not asked for.

    Of a card it is solved for what may be planned into, of a CPU for the budget as it is.

    Args:
        run: The settings.
        config: Of the model, for the task.
        shape: Of the run, `auto` not solved.
        gpu: The card; None for a CPU.
        budget_bytes: What is free for the run; of a card, None takes its usable memory.
        expandable_segments: Of the allocator's configuration.
        paged_on_card: Managed memory counts on the card.
        choose_chunk: On a card, choose the loss's chunk as well.
    """
    model_class = task_kind(run.task).auto_class
    if run.train.activations != "auto":
        return simulate_run(config, shape, gpu, model_class=model_class)
    if gpu is not None:
        budget_bytes = plannable_bytes(budget_bytes or gpu.usable_bytes)
    found = choose_activations(
        config, shape, gpu, budget_bytes, expandable_segments=expandable_segments,
        paged_on_card=paged_on_card, model_class=model_class,
    )  # fmt: skip
    solved = simulate_run(config, replace(shape, activations=found), gpu, model_class=model_class)
    if gpu is None or not choose_chunk:
        return solved
    return with_loss_chunk(
        config, solved, gpu, budget_bytes=budget_bytes, expandable_segments=expandable_segments,
        paged_on_card=paged_on_card, model_class=model_class,
    )  # fmt: skip


def read_model_config(run: RunConfig) -> Any:
    """The configuration of a folder, a `config.json` by any name, or a hub model.

    Raises:
        UserError: It is not there or not a configuration.
    """
    path = Path(run.model.source).expanduser()
    trusted = run.model.trust_remote_code
    if path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(path, Path(folder) / "config.json")
            try:
                return load_config(Path(folder), trust_remote_code=trusted)
            except UserError as error:
                said = str(error).replace(f"{folder}/config.json", str(path))
                raise UserError(said.replace(folder, str(path))) from None
    if path.is_dir():
        return load_config(path, trust_remote_code=trusted)
    resolved = resolve_model(run.model.source, run.model.revision, trust_remote_code=trusted)
    return load_config(resolved.folder, trust_remote_code=trusted)


def task_config(run: RunConfig, config: Any, found: Mapping[str, Any] | None = None) -> Any:
    """The model's configuration with what the task changes of it, such as its labels.

    Args:
        run: The settings.
        config: As the checkpoint has it; not changed.
        found: What the data says; without, what the run file alone says.
    """
    if found is None:
        found = task_kind(run.task).weightless_settings(run.task_settings.model_dump())
    changed = copy.deepcopy(config)
    for name, value in found.items():
        setattr(changed, name, value)
    return changed


def _task_settings(run: RunConfig) -> dict[str, Any]:
    """The task's settings; pictures as large as the model's own processor makes them."""
    settings = run.task_settings.model_dump()
    if task_kind(run.task).reads != "image" or settings["image_size"] is not None:
        return settings
    folder = Path(run.model.source).expanduser()
    if not folder.exists():
        folder = resolve_model(
            run.model.source, run.model.revision, trust_remote_code=run.model.trust_remote_code
        ).folder
    return settings | {"image_size": processed_size(folder)}


def run_shape(run: RunConfig, config: Any, gpu: GpuProfile | None, processes: int = 1) -> RunShape:
    """The settings of a run that decide its memory, on a card or (None) on a CPU."""
    compute_dtype = compute_dtype_for(
        run.model.compute_dtype,
        "cpu" if gpu is None else "cuda",
        config.model_type,
        None if gpu is None else gpu.compute_capability,
        cpu_multiplies_bf16(),
    )
    text = config.get_text_config()
    count: int = getattr(text, "num_hidden_layers", 0)
    return RunShape(
        base=setup.base_spec(run, compute_dtype, processes),
        adapter=setup.adapter_spec(run, count),
        adapter_dtype=setup.adapter_dtype(run, compute_dtype),
        micro_batch_size=run.train.micro_batch_size,
        seq_len=run.data.max_seq_len,
        accumulation=run.train.gradient_accumulation_steps,
        optimizer=run.train.optimizer,
        # what `auto` can come down to; `simulate_solved` finds what it needs to be
        activations="offload" if run.train.activations == "auto" else run.train.activations,
        loss_chunk_tokens=run.train.loss_chunk_tokens,
        regularized=setup.regularized(run),
        chunked_loss=run.train.chunked_loss,
        techniques=setup.techniques(run),
        task=run.task,
        task_settings=_task_settings(run),
        padded=run.train.micro_batch_size > 1 and not run.data.packing,
        packed=run.data.packing,
        mask_free=run.data.mask_free_packing,
        longest_held_out=None if run.data.eval or run.data.eval_fraction else 0,
        held_out_rows=run.evaluation.micro_batch_size,
        keep_last=run.output.keep_last,
        processes=processes,
    )
