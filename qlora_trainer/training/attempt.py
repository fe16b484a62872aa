"""One step made to happen, or a reason why not: overflow, out of memory, a loss that is not finite.

fp16 overflow: halve the loss scale, same step again. Out of memory: halve the micro-batch (a packed
row between its examples), double their number, same step again; the window's loss is a sum over its
own trained tokens, so the result is the same. A loss that is not finite: nothing moves, the batch
is kept for whoever looks into it. Of several processes all try again, or none.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from qlora_trainer.base.files import replace_folder
from qlora_trainer.errors import UserError
from qlora_trainer.tasks.task import Batch, Task, cut_rows
from qlora_trainer.training.checks import LearningChecks
from qlora_trainer.training.optimizer import AdapterAdamW
from qlora_trainer.training.processes import ALONE, Processes
from qlora_trainer.training.scaler import LossScaler
from qlora_trainer.training.step import StepResult, train_step

Decode = Callable[[Sequence[int]], str]


class StepRunner:
    """Runs steps until each is applied.

    Attributes:
        micro_batch_parts: Every micro-batch is cut into so many; grows when memory does not
            suffice, is saved with the state.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        task: Task,
        optimizer: AdapterAdamW,
        checks: LearningChecks,
        device: torch.device,
        seed: int,
        max_grad_norm: float | None,
        scaler: LossScaler | None,
        failure_folder: Path,
        decode: Decode | None,
        say: Callable[[str], None],
        processes: Processes = ALONE,
    ) -> None:
        self._model, self._task, self._optimizer = model, task, optimizer
        self._checks, self._device, self._seed = checks, device, seed
        self._max_grad_norm, self._scaler = max_grad_norm, scaler
        self._failure_folder, self._decode, self._say = failure_folder, decode, say
        self._processes = processes
        self.micro_batch_parts = 1

    def run(
        self, window: Sequence[Batch], *, step: int, learning_rate: float, verify: bool
    ) -> tuple[StepResult, float, float]:
        """Apply one step.

        Args:
            window: Collated micro-batches.
            step: Counted from 0.
            learning_rate: Of this step.
            verify: Require that every adapter that ran gets a gradient.

        Returns:
            The result, with loss and gradient norm as numbers.

        Raises:
            UserError: The loss or its gradient is not finite, or one row does not fit.
        """
        self._model.train()
        while True:
            numbers = [math.nan, math.nan]
            if verify:
                self._checks.begin()

            def check(result: StepResult, numbers: list[float] = numbers) -> bool:
                numbers[:] = torch.stack([result.loss, result.gradient_norm]).tolist()
                return self._may_move(*numbers, step=step, window=window, verify=verify)

            scale = 1.0 if self._scaler is None else self._scaler.scale
            result = self._attempt(
                window, step, learning_rate, check, f"step {step}", loss_scale=scale
            )
            if result is None:
                continue  # fewer rows at a time
            if not result.applied:
                assert self._scaler is not None
                self._scaler.overflowed()
                continue
            if self._scaler is not None:
                self._scaler.applied()
            return result, numbers[0], numbers[1]

    def rehearse(self, window: Sequence[Batch]) -> None:
        """Run one step as `run` would, only to see that it fits; the caller puts back what moved.

        Its loss is not scaled: an overflow would be nothing `run` could not mend, but it would
        leave adapters that are no numbers to whoever looks at them before they are put back.

        Raises:
            UserError: One row does not fit.
        """
        self._model.train()
        when = "rehearsal of the longest batch"
        while self._attempt(window, 0, 0.0, None, when, loss_scale=1.0) is None:
            pass

    def _attempt(
        self,
        window: Sequence[Batch],
        step: int,
        learning_rate: float,
        check: Callable[[StepResult], bool] | None,
        when: str,
        *,
        loss_scale: float,
    ) -> StepResult | None:
        """Run the step once; None where it ran out of memory and smaller parts are to be tried."""
        batches = [part for batch in window for part in cut_rows(batch, self.micro_batch_parts)]
        try:
            return train_step(
                self._model,
                [self._task.prepare(batch) for batch in batches],
                task=self._task,
                optimizer=self._optimizer,
                learning_rate=learning_rate,
                device=self._device,
                seed=self._seed,
                step=step,
                max_grad_norm=self._max_grad_norm,
                loss_scale=loss_scale,
                check=check,
                processes=self._processes,
            )
        except torch.OutOfMemoryError as error:
            message = str(error).split(". ")[0]
        # Outside the handler: the exception held the failed step's frames, and so its tensors.
        self._optimizer.drop_gradients()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        rows = max(next(iter(batch.values())).shape[0] for batch in batches)
        longest = max((b["input_ids"].shape[1] for b in batches if "input_ids" in b), default=0)
        if all(len(cut_rows(batch, 2)) == 1 for batch in batches):
            what = f"sequence of {longest} tokens" if longest else "image"
            raise UserError(
                f"{when}: out of memory with a single {what} "
                f"({message}). Ways out: a smaller data.max_seq_len, train.activations: recompute, "
                "train.optimizer: adamw_8bit, a lower adapter.rank"
            )
        self.micro_batch_parts *= 2
        if rows > 1:
            had, next_ = f"{rows} sequences at a time", f"{-(-rows // 2)} at a time"
            lower = "train.micro_batch_size"
        else:
            had, next_ = f"{longest} packed tokens at a time", "about half of them at a time"
            lower = "train.micro_batch_size or data.max_seq_len"
        self._say(
            f"{when}: out of memory with {had} ({message}); going on "
            f"with {next_} and twice as many passes. The effective batch and "
            f"the result stay the same; {lower} can be lowered in the run file"
        )
        return None

    def _may_move(
        self, loss: float, norm: float, *, step: int, window: Sequence[Batch], verify: bool
    ) -> bool:
        if math.isfinite(loss) and not math.isfinite(norm) and self._scaler is not None:
            return False
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient is {norm}"
            folder = self._failure_folder
            if self._processes.is_main:
                replace_folder(folder, lambda path: _save_batch(path, window, self._decode))
            raise UserError(
                f"step {step}: {what}; nothing was updated and the batch is kept in {folder}. "
                "Usual causes: a learning rate too high (train.learning_rate), a row of garbage "
                "(look at batch.txt), or a compute dtype the model overflows in "
                "(model.compute_dtype: bf16 or fp32)"
            )
        if verify:
            with self._processes.together():
                self._checks.require_gradients()
        return True


def _tokens(batch: Batch) -> list[list[int]]:
    return batch["input_ids"].tolist() if "input_ids" in batch else []


def _save_batch(folder: Path, window: Sequence[Batch], decode: Decode | None) -> None:
    tensors = {
        f"{index}.{name}": tensor.contiguous().clone()
        for index, batch in enumerate(window)
        for name, tensor in batch.items()
    }
    save_file(tensors, folder / "batch.safetensors")
    if decode is not None:
        texts = [decode(row) for batch in window for row in _tokens(batch)]
        divider = "\n" + "-" * 80 + "\n"
        (folder / "batch.txt").write_text(divider.join(texts), encoding="utf-8")
