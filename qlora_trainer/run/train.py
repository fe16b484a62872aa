"""Training from a run file to an adapter, in a run folder that explains itself."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.base.audit import audit_base
from qlora_trainer.base.dtype import dtype_name
from qlora_trainer.base.files import write_text_atomically
from qlora_trainer.base.machine import versions
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.lora.files import save_adapter
from qlora_trainer.run.check import inspect
from qlora_trainer.run.report import Reporter, rows_read, tensors_loaded
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.training import setup
from qlora_trainer.training.card import model_card
from qlora_trainer.training.curve import draw_losses
from qlora_trainer.training.folder import RunFolder
from qlora_trainer.training.log import RunLog
from qlora_trainer.training.loop import run_training
from qlora_trainer.training.optimizer import AdapterAdamW
from qlora_trainer.training.plan import Run, TrainingOutcome
from qlora_trainer.training.resume import compare_settings, require_same_run
from qlora_trainer.training.scaler import LossScaler
from qlora_trainer.training.trackers import open_trackers


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        folder: The run folder.
        adapter: The adapter to use; None while the run is not complete.
        outcome: Steps, best step, why it ended.
        metrics: Final figures, among them `loss_before` and `loss` where rows are held out.
    """

    folder: Path
    adapter: Path | None
    outcome: TrainingOutcome
    metrics: dict[str, float]


def train(
    run: RunConfig, *, restart: bool = False, reporter: Reporter | None = None
) -> TrainResult:
    """Train an adapter, or go on with an unfinished run in the same folder.

    Args:
        run: The settings.
        restart: Discard what the run folder holds.
        reporter: Told what happens.

    Raises:
        UserError: Something only the user can mend; what was saved so far stays.
    """
    told = reporter or Reporter()
    with RunFolder(Path(run.output.folder).expanduser(), restart=restart) as folder:
        earlier = folder.earlier_settings
        if earlier is not None:
            run = _at_the_same_commit(run, earlier)
        source = setup.open_model(run)
        settings = resolved_settings(run, source.resolved.revision)
        if earlier is not None:
            differences = compare_settings(earlier, settings)
            require_same_run(differences)
            for line in differences.allowed:
                told.say(f"this run differs from the saved one: {line}")
        return _train_in(folder, run, settings, source, told)


def _at_the_same_commit(run: RunConfig, earlier: dict[str, Any]) -> RunConfig:
    """Go on with the commit of a hub model that the run began with, whatever its branch is now."""
    model = earlier.get("model") or {}
    if run.model.revision is not None or model.get("source") != run.model.source:
        return run
    pinned = run.model.model_copy(update={"revision": model.get("revision")})
    return run.model_copy(update={"model": pinned})


def resolved_settings(run: RunConfig, revision: str | None) -> dict[str, Any]:
    """Every setting, so that the run file holds anywhere: paths absolute, a hub commit pinned.

    Args:
        run: As the user gave it.
        revision: The commit found for a hub model; None for a local folder.
    """
    settings = run.model_dump()
    settings["model"]["revision"] = revision or run.model.revision
    if run.model.chat_template is not None:
        settings["model"]["chat_template"] = _absolute(run.model.chat_template)
    if run.data.cache_folder is not None:
        cache_folder = Path(run.data.cache_folder).expanduser().absolute()
        settings["data"]["cache_folder"] = str(cache_folder)
    settings["model"]["source"] = _absolute(settings["model"]["source"])
    for source in (*settings["data"]["train"], *settings["data"]["eval"]):
        source["path"] = _absolute(source["path"])
    settings["output"]["folder"] = str(Path(run.output.folder).expanduser().absolute())
    return settings


def _absolute(source: str) -> str:
    """A local path made absolute; the name of something on the hub as it is."""
    path = Path(source).expanduser()
    is_local = path.exists() or any(character in source for character in "*?[")
    return str(path.absolute()) if is_local else source


def _train_in(
    folder: RunFolder,
    run: RunConfig,
    settings: dict[str, Any],
    source: setup.ModelSource,
    told: Reporter,
) -> TrainResult:
    data = setup.open_data(run, source, rows_read(told))
    gate = inspect(run, source, data)
    told.gate(gate)
    model = setup.load_model(run, source, tensors_loaded(told))
    account = audit_base(model)
    told.audit(account)
    spec = setup.add_adapter(run, model, source.base_spec.compute_dtype)
    setup.set_activations(run, model)
    task = CausalLM.for_model(model, chunk_tokens=run.train.loss_chunk_tokens)
    optimizer = setup.make_optimizer(run, model)
    for line in setup.notes(task, optimizer):
        told.say(line)
    environment = _environment(source)
    folder.write_settings(settings)
    folder.write_json("environment.json", environment)
    folder.write_json("data.json", gate.to_json())
    folder.write_json("audit.json", account.to_json())

    def save(target: Path) -> None:
        save_adapter(
            model,
            spec,
            target,
            base_source=settings["model"]["source"],
            task_type="CAUSAL_LM",
            base_revision=source.resolved.revision,
        )

    outcome = _run_loop(folder, run, settings, source, data, model, task, optimizer, save)
    result = _finished(folder, settings, source, outcome)
    if outcome.complete:
        rows = {"training": gate.train.rows}
        if gate.evaluation is not None:
            rows["held out"] = gate.evaluation.rows
        template = data.encoder.template.text if data.encoder.template else None
        _write_cards(folder, settings, source, result, rows, environment, template)
        folder.write_json("result.json", {**asdict(outcome), "metrics": result.metrics})
    return result


def _run_loop(
    folder: RunFolder,
    run: RunConfig,
    settings: dict[str, Any],
    source: setup.ModelSource,
    data: setup.RunData,
    model: Any,
    task: CausalLM,
    optimizer: AdapterAdamW,
    save: Callable[[Path], None],
) -> TrainingOutcome:
    windows = setup.make_windows(run, data, model.config._attn_implementation)
    plan = setup.training_plan(run, windows)
    trackers = open_trackers(
        run.output.trackers,
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
        folder.path / "metrics.jsonl",
        total_steps=plan.total_steps,
        every_steps=run.output.log_every_steps,
        trackers=trackers,
        device=source.device,
    )
    with log:
        return run_training(
            Run(
                model=model,
                task=task,
                optimizer=optimizer,
                windows=windows,
                device=source.device,
                folder=folder.path,
                save_adapter=save,
                identity={"data_fingerprint": data.train.fingerprint},
                log=log,
                eval_batches=setup.eval_batches(run, data),
                scaler=LossScaler() if source.base_spec.compute_dtype == torch.float16 else None,
                decode=source.tokenizer.decode,
            ),
            plan,
        )


def _environment(source: setup.ModelSource) -> dict[str, Any]:
    name = torch.cuda.get_device_name(source.device) if source.device.type == "cuda" else "cpu"
    return {
        "versions": versions(),
        "device": name,
        "compute_dtype": dtype_name(source.base_spec.compute_dtype),
        "threads": torch.get_num_threads(),
        "model_revision": source.resolved.revision,
    }


def _finished(
    folder: RunFolder, settings: dict[str, Any], source: setup.ModelSource, outcome: TrainingOutcome
) -> TrainResult:
    draw_losses(folder.path / "metrics.jsonl", folder.path / "loss.png")
    metrics = {f"{name}_before": value for name, value in (outcome.first_evaluation or {}).items()}
    metrics |= outcome.best_evaluation or {}
    metrics = {name: value for name, value in metrics.items() if not name.startswith("tokens")}
    adapter = folder.path / "adapter" if outcome.complete else None
    return TrainResult(folder.path, adapter, outcome, metrics)


def _write_cards(
    folder: RunFolder,
    settings: dict[str, Any],
    source: setup.ModelSource,
    result: TrainResult,
    rows: dict[str, int],
    environment: dict[str, Any],
    template: str | None,
) -> None:
    card = model_card(
        base_source=settings["model"]["source"],
        revision=source.resolved.revision,
        settings=settings,
        metrics=result.metrics,
        rows=rows,
        versions=environment["versions"],
    )
    if template is not None:  # asked elsewhere, the adapter shall be asked as it was trained
        source.tokenizer.chat_template = template
    for name in ("adapter", "adapter-last"):
        target = folder.path / name
        if target.is_dir():
            write_text_atomically(target / "README.md", card)
            source.tokenizer.save_pretrained(target)
