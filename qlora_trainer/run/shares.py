"""What several processes of a run must agree on, and whether there is work for each of them."""

from collections.abc import Iterator, Mapping

from qlora_trainer.base.dtype import dtype_name
from qlora_trainer.base.machine import versions
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.training import setup
from qlora_trainer.training.processes import Processes


def require_passes(run: RunConfig, count: int) -> None:
    """See that every process has a micro-batch of each whole window.

    Raises:
        UserError: There are more processes than micro-batches.
    """
    passes = run.train.gradient_accumulation_steps
    if passes < count:
        raise UserError(
            f"train.gradient_accumulation_steps = {passes}: is dealt out over {count} processes, "
            f"so {count - passes} of them would never have anything to do; take {count} or a "
            "multiple of it, with a smaller train.micro_batch_size for the same effective batch"
        )


def require_several(run: RunConfig, count: int, way: str = "start several (README)") -> None:
    """See that there is somebody to share the layers with.

    Args:
        run: The settings.
        count: How many processes there are.
        way: How there would be more.

    Raises:
        UserError: There is nobody.
    """
    if run.model.shard_layers and count == 1:
        raise UserError(
            "model.shard_layers = true: one process has nobody to share the layers with; "
            f"{way}, or set model.shard_layers: false (model.stream_layers: true leaves the "
            "layers of a model too large for the card in host memory)"
        )


def idle_notes(run: RunConfig, processes: Processes) -> Iterator[str]:
    """What the user should know where some process waits in every step."""
    passes, count = run.train.gradient_accumulation_steps, processes.count
    if passes % count:
        yield (
            f"train.gradient_accumulation_steps = {passes} over {count} processes: "
            f"{count - passes % count} of them wait while the others make the last pass of every "
            f"step; a multiple of {count} keeps all busy"
        )


def require_agreement(
    run: RunConfig,
    source: setup.ModelSource,
    identity: Mapping[str, str | None],
    processes: Processes,
) -> None:
    """See that all processes make the same run: base, rows, settings, dtype, versions.

    Raises:
        UserError: Names all that differs.
    """
    installed = versions()
    processes.require_same(
        {
            **identity,
            "task": run.task,
            **{f"train.{name}": value for name, value in run.train.model_dump().items()},
            **{f"evaluation.{name}": value for name, value in run.evaluation.model_dump().items()},
            "adapter.rank": run.adapter.rank,
            "model.shard_layers": run.model.shard_layers,
            "compute_dtype": dtype_name(source.base_spec.compute_dtype),
            **{name: installed[name] for name in ("qlora-trainer", "torch", "bitsandbytes")},
        }
    )
