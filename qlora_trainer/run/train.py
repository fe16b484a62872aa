"""Training from a run file to an adapter, in a run folder that explains itself.

Several processes make one run together: all compute, the main one writes and tells.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qlora_trainer.base.device_memory import free_memory
from qlora_trainer.base.files import write_text_atomically
from qlora_trainer.base.fingerprint import base_fingerprint
from qlora_trainer.base.machine import unused_gpu
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.data.encode import Encoder
from qlora_trainer.lora.files import save_adapter
from qlora_trainer.run.continued import (
    open_earlier,
    refuse_own_folder,
    score_after,
    score_before,
)
from qlora_trainer.run.parts import Parts, prepare
from qlora_trainer.run.rehearsal import rehearsal_of
from qlora_trainer.run.report import Reporter
from qlora_trainer.run.rescore import prove_saved
from qlora_trainer.run.resolve import (
    at_the_same_commit,
    earlier_made_whole,
    resolved_settings,
    with_the_same_choices,
    with_the_same_dtype,
)
from qlora_trainer.tasks.task import ScoredTask
from qlora_trainer.training import setup
from qlora_trainer.training.card import model_card
from qlora_trainer.training.curve import draw_losses
from qlora_trainer.training.environment import (
    always_alike,
    describe_environment,
    environment_changes,
    with_resumption,
)
from qlora_trainer.training.folder import RunFolder
from qlora_trainer.training.launch import join_processes
from qlora_trainer.training.log import RunLog
from qlora_trainer.training.loop import run_training
from qlora_trainer.training.plan import Run, TrainingOutcome
from qlora_trainer.training.processes import Processes
from qlora_trainer.training.resume import compare_settings, require_same_run, require_same_things
from qlora_trainer.training.scaler import LossScaler
from qlora_trainer.training.tokenizer import save_tokenizer
from qlora_trainer.training.trackers import open_trackers


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        folder: The run folder.
        adapter: The adapter to use; None while the run is not complete.
        outcome: Steps, best step, why it ended.
        metrics: Final figures, among them `loss_before` and `loss` where rows are held out.
        task: What was learned.
        is_main: False in those of several processes that have only computed.
    """

    folder: Path
    adapter: Path | None
    outcome: TrainingOutcome
    metrics: dict[str, float]
    task: str = "causal-lm"
    is_main: bool = True


def train(
    run: RunConfig, *, restart: bool = False, reporter: Reporter | None = None
) -> TrainResult:
    """Train an adapter, or go on with an unfinished run in the same folder.

    Where a launcher has started several processes, all call this and make one run together.

    Args:
        run: The settings.
        restart: Discard what the run folder holds.
        reporter: Told what happens.

    Raises:
        UserError: Something only the user can mend; what was saved so far stays.
    """
    refuse_own_folder(run)
    free_memory()  # of a model this process had before, which would count as another program's
    with join_processes(run.model.device) as processes, processes.together():
        told = reporter if reporter is not None and processes.is_main else Reporter()
        result = _train(run, told, processes, restart=restart)
    free_memory()
    return result


def _train(run: RunConfig, told: Reporter, processes: Processes, *, restart: bool) -> TrainResult:
    path = Path(run.output.folder).expanduser()
    with RunFolder(path, restart=restart, writes=processes.is_main) as folder:
        earlier = earlier_made_whole(processes.from_main(folder.earlier_settings))
        asked, begun = run, None
        if earlier is not None:
            begun = processes.from_main(folder.read_json("environment.json"))
            run = with_the_same_choices(at_the_same_commit(run, earlier), earlier)
            run = with_the_same_dtype(run, begun)
        with processes.main_first():
            source = setup.open_model(run, processes)
        unused = unused_gpu(source.device) if run.model.device == "auto" else None
        if unused is not None:
            told.say(f"computing on the CPU: {unused}; `qlora doctor` says what to do")
        settings = resolved_settings(run, source.resolved.revision)
        settings["model"]["compute_dtype"] = asked.model.compute_dtype
        base = base_fingerprint(source.resolved.folder)
        environment = describe_environment(
            source.device,
            source.base_spec.compute_dtype,
            model_revision=source.resolved.revision,
            base_fingerprint=base,
            processes=processes.count,
        )
        environment["evaluation"] = {
            "micro_batch_size": run.evaluation.micro_batch_size or run.train.micro_batch_size,
            "attention": run.model.attention,
        }
        if earlier is not None:
            environment = _resumed(folder, earlier, settings, begun, environment, told)
        parts = prepare(run, source, base, told, processes, begins=earlier is None)
        settings["train"]["loss_chunk_tokens"] = parts.run.train.loss_chunk_tokens
        old_rows = open_earlier(run, told, processes)
        folder.begin()
        folder.write_settings(settings)
        folder.write_json("environment.json", environment)
        folder.write_json("data.json", parts.gate.to_json())
        folder.write_json("audit.json", parts.account.to_json())
        score_before(old_rows, folder, parts.model, parts.task)
        outcome = _run_loop(folder, settings, parts, told.console())
        if not processes.is_main:
            if outcome.complete:
                score_after(old_rows, folder, parts.model, parts.task, told)
            adapter = folder.path / "adapter" if outcome.complete else None
            return TrainResult(folder.path, adapter, outcome, {}, settings["task"], is_main=False)
        memory = parts.forecast.compare(told)
        folder.write_json("memory.json", memory)
        with folder.writing():
            result = _finished(folder, settings, environment, parts, outcome, memory)
        if not outcome.complete:
            return result
        score_after(old_rows, folder, parts.model, parts.task, told)
        predicts = isinstance(parts.task, ScoredTask)
        del parts  # the fresh process loads a base of its own: there may be no room for two
        if outcome.best_evaluation is not None and predicts:
            free_memory()
            alike = always_alike(environment)
            with processes.busy():
                said = prove_saved(folder.path, outcome.best_evaluation, source.device, alike=alike)
            told.say(said)
            folder.write_json("result.json", {**folder.read_json("result.json"), "proof": said})
        return result


def _resumed(
    folder: RunFolder,
    earlier: dict[str, Any],
    settings: dict[str, Any],
    begun: dict[str, Any] | None,
    environment: dict[str, Any],
    told: Reporter,
) -> dict[str, Any]:
    """See that the run in the folder can go on here, and say what is not as it was.

    Returns:
        The environment of its beginning, with this one among its resumptions.

    Raises:
        UserError: Settings or base have changed where they cannot.
    """
    changes = compare_settings(earlier, settings)
    require_same_run(changes)
    for line in changes.allowed:
        told.say(f"this run differs from the saved one: {line}")
    if begun is None:
        return environment
    require_same_things(begun, environment, where=str(folder.path))
    for line in environment_changes(begun, environment):
        told.say(f"the run began elsewhere, so its bits may differ from here on: {line}")
    return with_resumption(begun, environment)


def _run_loop(
    folder: RunFolder, settings: dict[str, Any], parts: Parts, console: Console
) -> TrainingOutcome:
    run, source, data = parts.run, parts.source, parts.data

    def save(target: Path) -> None:
        save_adapter(
            parts.model,
            parts.spec,
            target,
            base_source=settings["model"]["source"],
            task_type=source.kind.peft_type,
            base_revision=source.resolved.revision,
        )
        if source.kind.new_head:  # label names: whoever loads the head must know what it says
            parts.model.config.save_pretrained(target)

    processes = parts.processes
    trackers = open_trackers(
        run.output.trackers if processes.is_main else (),
        folder.path / "trackers",
        run_name=folder.path.name,
        settings={
            f"{section}.{name}": value
            for section, values in settings.items()
            if isinstance(values, dict)
            for name, value in values.items()
        },
    )
    log = RunLog(
        folder.path / "metrics.jsonl" if processes.is_main else None,
        total_steps=parts.plan.total_steps,
        every_steps=run.output.log_every_steps,
        console=console,
        trackers=trackers,
        device=source.device,
    )
    with log:
        return run_training(
            Run(
                model=parts.model,
                task=parts.task,
                optimizer=parts.optimizer,
                windows=parts.windows,
                device=source.device,
                folder=folder.path,
                save_adapter=save,
                identity=parts.identity,
                log=log,
                eval_batches=setup.eval_batches(run, data, processes),
                scaler=LossScaler() if source.base_spec.compute_dtype == torch.float16 else None,
                references=setup.references(run, data),
                decode=None if source.tokenizer is None else source.tokenizer.decode,
                rehearsal=rehearsal_of(
                    run, data, parts.model, source.device, processes=processes.count
                ),
                watch=parts.forecast.watch(parts.model, parts.optimizer),
                processes=processes,
            ),
            parts.plan,
        )


def _finished(
    folder: RunFolder,
    settings: dict[str, Any],
    environment: dict[str, Any],
    parts: Parts,
    outcome: TrainingOutcome,
    memory: dict[str, Any],
) -> TrainResult:
    draw_losses(
        folder.path / "metrics.jsonl", folder.path / "loss.png",
        unit=parts.source.kind.loss_unit, metric=outcome.best_metric,
    )  # fmt: skip
    metrics = {f"{name}_before": value for name, value in (outcome.first_evaluation or {}).items()}
    metrics |= outcome.best_evaluation or {}
    metrics = {
        name: value for name, value in metrics.items() if not name.startswith(("tokens", "rows"))
    }
    if not outcome.complete:
        return TrainResult(folder.path, None, outcome, metrics, settings["task"])
    rows = {"training": parts.gate.train.rows}
    if parts.gate.evaluation is not None:
        rows["held out"] = parts.gate.evaluation.rows
    card = model_card(
        base_source=settings["model"]["source"],
        revision=parts.source.resolved.revision,
        settings=settings,
        metrics=metrics,
        rows=rows,
        versions=environment["versions"],
    )
    encoder = parts.data.encoder
    template = encoder.template if isinstance(encoder, Encoder) else None
    if template is not None:  # asked elsewhere, the adapter shall be asked as it was trained
        parts.source.tokenizer.chat_template = template.text
    for name in ("adapter", "adapter-last"):
        target = folder.path / name
        if target.is_dir():
            write_text_atomically(target / "README.md", card)
            save_tokenizer(parts.source.tokenizer or parts.source.processor, target)
    folder.write_json("result.json", {**asdict(outcome), "metrics": metrics, "memory": memory})
    return TrainResult(folder.path, folder.path / "adapter", outcome, metrics, settings["task"])
