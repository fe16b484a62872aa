"""All that a run is made of, put together in the order in which it can be refused.

data and its gate -> memory foreseen -> base -> adapters -> task, optimizer, windows, plan.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from qlora_trainer.base.audit import BaseAudit, audit_base
from qlora_trainer.base.dtype import slow_compute_notes
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.data.gate import GateReport
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.run.check import inspect
from qlora_trainer.run.continued import read_into
from qlora_trainer.run.forecast import Forecast, forecast_run
from qlora_trainer.run.report import Reporter, rows_read, tensors_loaded
from qlora_trainer.run.resolve import with_setting
from qlora_trainer.run.shares import idle_notes, require_agreement, require_passes, require_several
from qlora_trainer.tasks.task import Task
from qlora_trainer.training import setup
from qlora_trainer.training.compiled import require_compiler
from qlora_trainer.training.optimizer import AdapterAdamW
from qlora_trainer.training.plan import TrainingPlan
from qlora_trainer.training.processes import Processes
from qlora_trainer.training.trackers import require_trackers
from qlora_trainer.training.windows import Windows


@dataclass(frozen=True)
class Parts:
    """All that a run is made of, standing before anything is written.

    Attributes:
        run: The settings, the loss's chunk among them where it was chosen.
        identity: Fingerprints of base and data, which saved states are tied to.
        forecast: What memory it was foreseen to need.
        processes: Those that make the run together.
    """

    run: RunConfig
    source: setup.ModelSource
    data: setup.RunData
    gate: GateReport
    model: Any
    account: BaseAudit
    spec: AdapterSpec
    task: Task
    optimizer: AdapterAdamW
    windows: Windows
    plan: TrainingPlan
    identity: dict[str, str | None]
    forecast: Forecast
    processes: Processes


def prepare(
    run: RunConfig,
    source: setup.ModelSource,
    base: str,
    told: Reporter,
    processes: Processes,
    *,
    begins: bool = True,
) -> Parts:
    """Make all of them, telling what is found on the way; nothing is written yet.

    Args:
        run: The settings.
        source: The model.
        base: Its fingerprint.
        told: Told of data, memory and base.
        processes: Those that make the run together.
        begins: It is not one that goes on.

    Raises:
        UserError: The data, the model or the memory at hand does not allow the run.
    """
    require_passes(run, processes.count)
    require_several(run, processes.count)
    if processes.is_main:
        require_trackers(run.output.trackers)
    if run.train.compile:
        require_compiler(source.device)
    with processes.main_first():
        data = setup.open_data(run, source, rows_read(told))
    identity = {
        "base_fingerprint": base,
        "data_fingerprint": data.train.fingerprint,
        "eval_fingerprint": None if data.held_out is None else data.held_out.fingerprint,
    }
    require_agreement(run, source, identity, processes)
    gate = inspect(run, source, data)
    told.gate(gate)
    forecast = forecast_run(run, source, data, told, processes, choose_chunk=begins)
    run = with_setting(run, "train", "loss_chunk_tokens", forecast.loss_chunk_tokens)
    settings = setup.model_settings(data.encoder)
    cached = run.model.quantized_cache is not None
    with processes.main_first() if cached else nullcontext():  # made by one, read by the others
        model = setup.load_model(
            run, source, tensors_loaded(told), settings=settings, processes=processes
        )
    account = audit_base(model)
    told.audit(account)
    spec = setup.add_adapter(run, model, source.base_spec.compute_dtype, source.kind)
    read_into(run, model, spec, base)
    plain = setup.set_activations(run, model, forecast.activations)
    task = setup.make_task(run, model, source, data)
    optimizer = setup.make_optimizer(run, model)
    for line in (
        *slow_compute_notes(source.base_spec.compute_dtype, source.device),
        *idle_notes(run, processes),
        *plain,
        *setup.attention_notes(run, model),
        *setup.notes(task, optimizer),
    ):
        told.say(line)
    windows = setup.make_windows(run, data, model.config._attn_implementation)
    plan = setup.training_plan(run, windows, task)
    return Parts(
        run, source, data, gate, model, account, spec, task, optimizer, windows, plan, identity,
        forecast, processes,
    )  # fmt: skip
