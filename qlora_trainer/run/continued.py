"""Going on from a finished adapter (`adapter.init_from`), and seeing what it forgets.

The values are read into a new adapter of the same shape; optimizer and schedule begin anew. Where
the adapter comes from a run folder, that run's held-out rows are scored before the first step and
after the last, so that what the new data costs of the old task is a figure.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_trainer.config.read import read_run_file
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.lora.files import read_adapter_config, restore_adapter
from qlora_trainer.lora.inject import adapted_layers, adapter_parameters
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.run.report import Reporter
from qlora_trainer.tasks.task import Task
from qlora_trainer.training import setup
from qlora_trainer.training.environment import base_trained_on
from qlora_trainer.training.evaluate import evaluate
from qlora_trainer.training.folder import RunFolder
from qlora_trainer.training.processes import Processes

_FILE = "earlier.json"


@dataclass(frozen=True)
class Earlier:
    """The rows an adapter was scored on when it was made.

    Attributes:
        run: How it was trained.
        source: Its model.
        data: Its rows.
        processes: Those that score them together.
    """

    run: RunConfig
    source: setup.ModelSource
    data: setup.RunData
    processes: Processes

    def score(self, model: Any, task: Task) -> dict[str, float]:
        """The task's metrics on these rows, as the model is now."""
        batches = setup.eval_batches(self.run, self.data, self.processes)
        assert batches is not None  # `open_earlier` sees to it
        return evaluate(
            model,
            batches(),
            task=task,
            device=self.source.device,
            references=setup.references(self.run, self.data),
            processes=self.processes,
        )


def refuse_own_folder(run: RunConfig) -> None:
    """Refuse an adapter that lies where the run is to be written: a restart would discard it.

    Raises:
        UserError: `adapter.init_from` is `output.folder`, or lies in it.
    """
    if run.adapter.init_from is None:
        return
    own = Path(run.output.folder).expanduser().resolve()
    named = Path(run.adapter.init_from).expanduser()
    # The place of a link counts as well as where it leads.
    places = (named.resolve(), (named / "adapter").resolve(), named.parent.resolve() / named.name)
    if any(place.is_relative_to(own) for place in places):
        raise UserError(
            f"adapter.init_from = {run.adapter.init_from!r}: lies in output.folder = "
            f"{run.output.folder!r}, which this run writes anew; name another output.folder"
        )


def read_into(run: RunConfig, model: Any, spec: AdapterSpec, base_fingerprint: str) -> None:
    """Read the earlier adapter's values into the new one, where one is named.

    Args:
        run: The settings.
        model: With its new adapter.
        spec: What that is.
        base_fingerprint: Of the base here.

    Raises:
        UserError: It is not there, was trained on another base, or is of another shape.
    """
    folder = setup.earlier_adapter(run)
    if folder is None:
        return
    found = read_adapter_config(folder)
    faults = _other_sizes(model, spec, found)
    trained_on = base_trained_on(folder.parent)
    if trained_on is not None and trained_on != base_fingerprint:
        faults.append(f"model.source = {run.model.source!r}: the adapter's base is another one")
    if faults:
        raise UserError.from_faults(f"adapter.init_from = {run.adapter.init_from!r}", faults)
    try:
        restore_adapter(model, folder)
    except UserError as error:
        raise UserError(
            f"adapter.init_from = {run.adapter.init_from!r}: target_modules, layers and task must "
            f"be what that adapter was trained with. {error}"
        ) from None


def _other_sizes(model: Any, spec: AdapterSpec, found: AdapterSpec) -> list[str]:
    """Modules whose rank or scaling is not the adapter's, and the settings that say so."""
    modules = [
        f"{path}: rank {spec.rank_of(path)}, scaled by {spec.scaling(path):g}; in the adapter rank "
        f"{found.rank_of(path)}, scaled by {found.scaling(path):g}"
        for path in adapted_layers(model)
        if spec.rank_of(path) != found.rank_of(path)
        or not math.isclose(spec.scaling(path), found.scaling(path))
    ]
    if not modules:  # settings that come to the same are the same
        return []
    settings = [
        f"{name} = {getattr(spec, name)}: the adapter has {getattr(found, name)}"
        for name in ("rank", "alpha", "rslora", "rank_pattern", "alpha_pattern")
        if getattr(spec, name) != getattr(found, name)
    ]
    return settings + modules


def open_earlier(run: RunConfig, told: Reporter, processes: Processes) -> Earlier | None:
    """The held-out rows of the run an adapter comes from, if there are any.

    Raises:
        UserError: That run's data is there no more.
    """
    folder = setup.earlier_adapter(run)
    if folder is None:
        return None
    file = folder.parent / "run.yaml"
    if not file.is_file():
        told.say("adapter.init_from names no run folder, so forgetting is not measured")
        return None
    earlier = read_run_file(file)
    if earlier.task != run.task or not (earlier.data.eval or earlier.data.eval_fraction):
        told.say("the earlier run held no rows out, so forgetting is not measured")
        return None
    # Scored as this run computes, whatever machine the earlier one had.
    here = run.model.model_dump(include={"device", "attention", "compute_dtype"})
    model = earlier.model.model_copy(update=here)
    earlier = earlier.model_copy(update={"model": model})
    with processes.main_first():
        source = setup.open_model(earlier, processes)
        return Earlier(earlier, source, setup.open_data(earlier, source), processes)


def score_before(earlier: Earlier | None, folder: RunFolder, model: Any, task: Task) -> None:
    """Score the earlier rows once, before the first step of the run."""
    if earlier is None:
        return
    if earlier.processes.from_main(folder.read_json(_FILE)) is None:
        folder.write_json(_FILE, {"before": earlier.score(model, task)})


def score_after(
    earlier: Earlier | None, folder: RunFolder, model: Any, task: Task, told: Reporter
) -> None:
    """Score the earlier rows with the adapter that is kept, and say what has changed."""
    if earlier is None:
        return
    with earlier.processes.together():
        if earlier.processes.is_main:
            restore_adapter(model, folder.path / "adapter")
    for parameter in adapter_parameters(model).values():
        earlier.processes.take_from_main(parameter)
    before = earlier.processes.from_main(folder.read_json(_FILE))["before"]
    after = earlier.score(model, task)
    folder.write_json(_FILE, {"before": before, "after": after})
    shown = ", ".join(
        f"{name} {before[name]:.4f} -> {value:.4f}"
        for name, value in after.items()
        if name in ("loss", task.best_metric)
    )
    told.say(f"the earlier run's held-out rows, before and after: {shown}")
