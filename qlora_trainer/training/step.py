"""One training step, and the only place that knows what it is.

The trainer runs it on a device, the memory room runs the same function on weightless tensors, the
benchmarks time it. It therefore asks no tensor for its value: trained tokens are counted on the
host, results stay tensors, and whoever wants to look at them before the optimizer moves passes
`check`.

A step takes a window of micro-batches. Each loss is a *sum* divided by the trained tokens of the
whole window, so that eight micro-batches of one row equal one of eight, however unevenly the rows
are masked. Random state (dropout) is a pure function of seed, step and micro-batch: resuming has
nothing to restore, and several processes that deal the window out among them draw the same.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qlora_trainer.errors import UserError
from qlora_trainer.tasks.task import Batch, Task, to_device
from qlora_trainer.training.gradient_sum import GradientSum
from qlora_trainer.training.optimizer import AdapterAdamW
from qlora_trainer.training.processes import ALONE, Processes


@dataclass(frozen=True)
class StepResult:
    """What a step found out; tensors, so that nothing waits for the device.

    Attributes:
        loss: Mean over the window's trained tokens, fp32.
        gradient_norm: Global norm before clipping, fp32.
        trained_tokens: Of the window.
        applied: False where `check` refused: nothing moved.
    """

    loss: Tensor
    gradient_norm: Tensor
    trained_tokens: int
    applied: bool = True


def train_step(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    *,
    task: Task,
    optimizer: AdapterAdamW,
    learning_rate: float,
    device: torch.device,
    seed: int = 0,
    step: int = 0,
    max_grad_norm: float | None = 1.0,
    loss_scale: float = 1.0,
    check: Callable[[StepResult], bool] | None = None,
    processes: Processes = ALONE,
) -> StepResult:
    """Forward and backward over a window, clip, update.

    Args:
        model: In training mode, on `device`.
        micro_batches: The whole window, prepared by the task; this process' share goes to the
            device, each when its turn comes.
        task: The loss.
        optimizer: Holds the trained parameters.
        learning_rate: Of this step.
        device: Where the model is.
        seed: Of the run.
        step: Its number, from 0.
        max_grad_norm: Clip the global gradient norm; None leaves it.
        loss_scale: For fp16; undone before clipping.
        check: Looks at the result before the optimizer moves; False or an exception prevents it.
        processes: All of them make the step together; each updates its own copy.

    Raises:
        UserError: No token of the window is trained, or the update itself ran out of memory.
    """
    weight = sum(task.loss_weight(batch) for batch in micro_batches)
    if weight == 0:
        raise UserError(f"step {step}: none of its tokens is trained; check the data's labels")
    total, gradients = None, None
    with processes.together():
        for index in processes.share(len(micro_batches)):
            seed_random(seed, step, index)
            loss = task.loss_sum(model, to_device(micro_batches[index], device))
            (loss * (loss_scale / weight)).backward()
            total = loss.detach() if total is None else total + loss.detach()
            del loss
        if processes.count > 1:
            gradients = GradientSum(optimizer.parameters.values(), processes, device)
    if gradients is not None:
        total = gradients.over(torch.zeros((), device=device) if total is None else total)
        del gradients
    assert total is not None
    norm = gradient_norm(optimizer.parameters.values())
    factor: Tensor | None = None
    if loss_scale != 1.0:
        norm = norm / loss_scale
        factor = torch.full_like(norm, 1.0 / loss_scale)
    if max_grad_norm is not None:
        clipping = (max_grad_norm / (norm + 1e-6)).clamp_(max=1.0)
        factor = clipping if factor is None else factor * clipping
    result = StepResult(total / weight, norm, weight)
    if check is not None and not check(result):
        optimizer.drop_gradients()
        return replace(result, applied=False)
    try:
        optimizer.step(learning_rate, factor)
    except torch.OutOfMemoryError as error:
        # Some parameters have moved: trying the step again would move them twice.
        raise UserError(
            f"step {step}: out of memory in the optimizer's update ({error}); use "
            "train.optimizer: adamw_8bit, a lower adapter.rank, or fewer target modules"
        ) from error
    return result


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of all gradients together, in fp32 whatever their dtype."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        raise UserError("no trained parameter got a gradient: the adapters are not in the graph")
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    norms: list[Tensor] = []
    for tensors in groups.values():
        norms += torch._foreach_norm(tensors, 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


def seed_random(seed: int, step: int, micro_batch: int) -> None:
    """Set torch's generators as a pure function of where the run stands (SplitMix64's mixer)."""
    mask = 2**64 - 1
    state = 0
    for part in (seed, step, micro_batch):
        state = (state ^ part) + 0x9E3779B97F4A7C15 & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    torch.manual_seed(state >> 1)
