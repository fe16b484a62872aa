"""The worst of a run, tried before its first step: the longest batches, an update, a save.

What would fail after three hours fails in the first minute, or makes micro-batches smaller then.
Afterwards everything is bit for bit as it was: parameters, optimizer, buffers, random states
and files are put back, whatever happened. Given up: the rehearsal takes the time of one or
two of the longest steps, and a second copy of adapter and optimizer states in host memory.
"""

import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.tasks.task import Batch
from qlora_trainer.training.attempt import StepRunner
from qlora_trainer.training.evaluate import examine
from qlora_trainer.training.plan import Rehearsal, Run
from qlora_trainer.training.state import save_state
from qlora_trainer.units import format_bytes, format_seconds

_FOLDER = ".rehearsal"


def rehearse(run: Run, rehearsal: Rehearsal, steps: StepRunner, *, step: int) -> None:
    """Step, evaluate and save on the longest batches; then put everything back.

    Args:
        run: The parts of the run.
        rehearsal: The longest batches.
        steps: Keeps from here how far micro-batches had to be cut.
        step: Where the run stands.

    Raises:
        UserError: A single sequence does not fit, or the folder cannot be written.
    """
    began = time.perf_counter()
    before = _Snapshot(run)
    folder = run.folder / _FOLDER
    if run.processes.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed here
    try:
        if _weight(run, rehearsal.window):
            steps.rehearse(rehearsal.window)
        if rehearsal.held_out is not None and _weight(run, [rehearsal.held_out]):
            examine(
                run.model, [rehearsal.held_out], task=run.task, device=run.device,
                say=run.log.say, references=run.references, processes=run.processes,
            )  # fmt: skip
        with run.processes.together():
            written = _save(run, folder, step) if run.processes.is_main else 0
    finally:
        if run.processes.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        before.put_back(run)
    run.log.say(
        f"rehearsed in {format_seconds(time.perf_counter() - began)}: a step on "
        f"{_shape(rehearsal.window[0])}"
        + (f", evaluation on {_shape(rehearsal.held_out)}" if rehearsal.held_out else "")
        + f", a saved state of {format_bytes(written)}; everything is as it was before"
    )


def _save(run: Run, folder: Path, step: int) -> int:
    """Write an adapter and a state; -> bytes of the latter."""
    (folder / "adapter").mkdir(parents=True)
    run.save_adapter(folder / "adapter")
    saved = save_state(folder / "states", step, optimizer=run.optimizer, trainer={}, keep_last=1)
    return sum(file.stat().st_size for file in saved.iterdir())


def _weight(run: Run, batches: Sequence[Batch]) -> int:
    return sum(run.task.loss_weight(run.task.prepare(batch)) for batch in batches)


def _shape(batch: Batch) -> str:
    if "input_ids" in batch:
        rows, tokens = batch["input_ids"].shape
        return f"{rows} x {tokens} tokens"
    return f"{next(iter(batch.values())).shape[0]} images"


class _Snapshot:
    """Everything that a step, an evaluation or a save can change, copied to the host."""

    def __init__(self, run: Run) -> None:
        optimizer = run.optimizer
        self._parameters = {name: _copy(p) for name, p in optimizer.parameters.items()}
        tensors, self._values = optimizer.state()
        self._states = {name: _copy(tensor) for name, tensor in tensors.items()}
        self._buffers = [(m, name, b, _copy(b)) for m, name, b in _live_buffers(run.model)]
        self._training = run.model.training
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._python, self._numpy = random.getstate(), np.random.get_state()

    @torch.no_grad()
    def put_back(self, run: Run) -> None:
        optimizer = run.optimizer
        optimizer.drop_gradients()
        optimizer.load(self._states, self._values)
        optimizer.half_applied = False
        for name, p in optimizer.parameters.items():
            p.copy_(self._parameters[name])
        for module, name, buffer, value in self._buffers:
            buffer.copy_(value)
            if getattr(module, name, None) is not buffer:
                setattr(module, name, buffer)  # a forward may replace one by a tensor of its own
        run.model.train(self._training)
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        np.random.set_state(self._numpy)


def _live_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Buffers that a forward may change (running means, position caches), not quantized weights."""
    return [
        (module, name, buffer)
        for module in model.modules()
        if not isinstance(module, NF4Linear)
        for name, buffer in module.named_buffers(recurse=False)
    ]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
