"""Looking before leaping: the machine, the data, the base."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from qlora_trainer.base.audit import BaseAudit, audit_base
from qlora_trainer.base.machine import Finding, diagnose
from qlora_trainer.config.read import read_run_file
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.data.encode import Encoder
from qlora_trainer.data.gate import GateReport, inspect_data, inspect_rows
from qlora_trainer.data.rows import RowEncoder
from qlora_trainer.export.adapter_export import planned_notes
from qlora_trainer.export.merged import plain_model
from qlora_trainer.export.serving import ServingNote
from qlora_trainer.run.report import Reporter, rows_read, tensors_loaded
from qlora_trainer.training import setup
from qlora_trainer.training.compiled import require_compiler


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run file.

    Args:
        path: The YAML file.
        overrides: `section.setting=value` each.

    Raises:
        UserError: With every fault found in it.
    """
    return read_run_file(Path(path), overrides)


def doctor(folder: str | Path = ".") -> list[Finding]:
    """Look at driver, CUDA, bitsandbytes, RAM and disk."""
    return diagnose(Path(folder))


def check(run: RunConfig, *, reporter: Reporter | None = None) -> GateReport:
    """Read and encode the data and say what would be trained.

    Raises:
        UserError: The data cannot be trained on: which rows, and what to do.
    """
    source = setup.open_model(run)
    if run.train.compile:
        require_compiler(source.device)
    return inspect(run, source, setup.open_data(run, source, rows_read(reporter or Reporter())))


def inspect(run: RunConfig, source: setup.ModelSource, data: setup.RunData) -> GateReport:
    """The gate's report on data already encoded."""
    if not isinstance(data.encoder, Encoder):
        return inspect_rows(data.train, cast(RowEncoder, data.encoder), evaluation=data.held_out)
    return inspect_data(
        data.train,
        source.tokenizer,
        evaluation=data.held_out,
        packing_capacity=run.data.max_seq_len if run.data.packing else None,
        stop_ids=source.stop_ids,
    )


def serving(run: RunConfig) -> list[ServingNote]:
    """What vLLM, llama.cpp and those that build on them cannot do with the adapter as planned.

    Raises:
        UserError: The model is not there, or has not the layers the settings name.
    """
    source = setup.open_model(run)
    model = plain_model(source.resolved.folder, source.kind.auto_class, source.base_spec, {}).model
    return planned_notes(model, setup.model_adapter_spec(run, model, source.kind))


def audit(run: RunConfig, *, reporter: Reporter | None = None) -> BaseAudit:
    """Load the base and account for every tensor."""
    source = setup.open_model(run)
    return audit_base(setup.load_model(run, source, tensors_loaded(reporter or Reporter())))
