"""What a run will need, found by running its very step on weightless tensors.

`foresee` builds the base without weights, puts the adapter on it, makes the optimizer and calls
`training/step.py`'s `train_step` twice and the task's evaluation once, all on `meta` tensors under
the tracker; the log is then replayed as any card's allocator. Nothing is written down as a formula,
so nothing drifts from the code that trains. Numbers are for the torch, transformers and
bitsandbytes installed here.

Assumed, and said: every sequence has the full length; every token is trained (the loss then makes
the most logits chunks); rows are not padded and not packed unless `padded` says so.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM

from qlora_trainer.base.audit import audit_base
from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.load import BaseSpec, build_weightless_base
from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.memory.attention import ANSWERS, attention_for
from qlora_trainer.memory.gpus import GpuProfile
from qlora_trainer.memory.log import RESET_PEAK
from qlora_trainer.memory.simulate import LiveTensor, Peaks, Trace, simulate
from qlora_trainer.memory.tracker import AllocationTracker
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.tasks.task import Batch, Task
from qlora_trainer.training.activations import Activation, plan_activations
from qlora_trainer.training.optimizer import AdapterAdamW, OptimizerKind
from qlora_trainer.training.step import StepResult, train_step

_ROLE_COMPONENTS = {
    "linear weights (NF4)": "base weights",
    "linear weights": "base weights",
    "experts": "base weights",
    "router": "base weights",
    "convolution": "base weights",
    "quantization state": "quantization state",
    "embedding": "embeddings and heads",
    "head": "embeddings and heads",
}


@dataclass(frozen=True)
class RunShape:
    """The settings of a run that decide its memory.

    Attributes:
        base: How the base is held.
        adapter: The low-rank update.
        adapter_dtype: Of its factors.
        micro_batch_size: Sequences per forward pass.
        seq_len: Tokens per sequence.
        accumulation: Forward passes per optimizer step.
        optimizer: Kind of AdamW.
        activations: One choice for all layers, or one per layer.
        loss_chunk_tokens: As in the run file.
        padded: Batches carry an attention mask.
    """

    base: BaseSpec
    adapter: AdapterSpec
    adapter_dtype: torch.dtype = torch.bfloat16
    micro_batch_size: int = 1
    seq_len: int = 1024
    accumulation: int = 1
    optimizer: OptimizerKind = "paged_adamw_32bit"
    activations: Activation | tuple[Activation, ...] = "recompute"
    loss_chunk_tokens: int | None = None
    padded: bool = False


@dataclass(frozen=True)
class Foresight:
    """The prediction for one configuration on one card; sizes in bytes.

    Attributes:
        allocated_bytes: Peak of live blocks.
        reserved_bytes: Peak of what the allocator holds: what must fit, beside the context.
        context_bytes: CUDA context and kernels, outside the allocator (an assumption of the card).
        paged_bytes: Optimizer states in managed memory: host RAM, or on the card when touched.
        total_bytes: reserved + context.
        by_component: Live bytes at the peak.
        allocated_by_phase: Peak of each phase.
        peak_phase: Where the peak is.
        alive: The largest tensors at the peak, with the line that made them.
        kernels: Chosen kernels and how often.
        fits_without_retry: False where the allocator must give cached memory back to get through.
        fits: The replay at the card's capacity got through.
        host_bytes: Host RAM the load needs.
        disk_bytes: Artefact -> bytes.
        trained_parameters: How many numbers are trained.
        large_unquantized: Path -> bytes of large weights outside NF4.
    """

    gpu: str
    capacity_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    context_bytes: int
    paged_bytes: int
    by_component: dict[str, int]
    allocated_by_phase: dict[str, int]
    reserved_by_phase: dict[str, int]
    peak_phase: str
    alive: tuple[LiveTensor, ...]
    kernels: dict[str, int]
    fits: bool
    fits_without_retry: bool
    host_bytes: int
    disk_bytes: dict[str, int]
    trained_parameters: int
    large_unquantized: dict[str, int]
    timeline: tuple[tuple[int, int, str], ...] = field(default=(), repr=False)

    @property
    def total_bytes(self) -> int:
        """What the process takes of the card."""
        return self.reserved_bytes + self.context_bytes

    @property
    def verdict(self) -> str:
        """`fits`, `tight` (less than 5 % of the card left) or `does not fit`."""
        if not self.fits:
            return "does not fit"
        left = self.capacity_bytes - self.total_bytes
        return "tight" if left < 0.05 * self.capacity_bytes else "fits"


@dataclass
class SimulatedRun:
    """A simulated configuration: its trace, and what is known beside it. Replay it on any card."""

    trace: Trace
    shape: RunShape
    paged_bytes: int = 0
    trained_parameters: int = 0
    trained_bytes: int = 0
    optimizer_bytes: int = 0
    base_parameters: int = 0
    largest_tensor_bytes: int = 0
    large_unquantized: dict[str, int] = field(default_factory=dict)

    def on(
        self,
        gpu: GpuProfile,
        *,
        budget_bytes: int | None = None,
        expandable_segments: bool = False,
        with_timeline: bool = False,
    ) -> Foresight:
        """What it takes on a card of the same architecture.

        Args:
            gpu: The card.
            budget_bytes: What of it is free for this process; its usable memory unless given.
            expandable_segments: Of the allocator's configuration.
            with_timeline: Keep allocated and reserved after every event.
        """
        capacity = gpu.usable_bytes if budget_bytes is None else budget_bytes
        room = max(0, capacity - gpu.context_bytes)
        free = self.trace.replay(
            expandable_segments=expandable_segments, with_timeline=with_timeline
        )
        limited = free
        if free.reserved_bytes > room:
            limited = self.trace.replay(room, expandable_segments=expandable_segments)
        return self._foresight(gpu, capacity, free, limited)

    def _foresight(self, gpu: GpuProfile, capacity: int, free: Peaks, limited: Peaks) -> Foresight:
        shown = limited if limited.fits else free
        return Foresight(
            gpu=gpu.name,
            capacity_bytes=capacity,
            allocated_bytes=shown.allocated_bytes,
            reserved_bytes=shown.reserved_bytes,
            context_bytes=gpu.context_bytes,
            paged_bytes=self.paged_bytes,
            by_component=dict(sorted(shown.by_component.items(), key=lambda item: -item[1])),
            allocated_by_phase=_merge_phases(shown.allocated_by_phase),
            reserved_by_phase=_merge_phases(shown.reserved_by_phase),
            peak_phase=shown.peak_phase,
            alive=tuple(shown.alive[:50]),
            kernels=dict(self.trace.log.kernels),
            fits=limited.fits,
            fits_without_retry=limited.fits and limited.retries == 0,
            host_bytes=self._host_bytes(),
            disk_bytes=self._disk_bytes(),
            trained_parameters=self.trained_parameters,
            large_unquantized=self.large_unquantized,
            timeline=tuple(free.timeline),
        )

    def _host_bytes(self) -> int:
        # weights are memory-mapped; one tensor at a time is private, the page-outs come on top
        return _PROCESS_BYTES + 2 * self.largest_tensor_bytes + self.paged_bytes

    def _disk_bytes(self) -> dict[str, int]:
        adapter = self.trained_bytes
        return {
            "adapter": adapter,
            "saved state": adapter + self.optimizer_bytes,
            "merged checkpoint": 2 * self.base_parameters,
        }


_PROCESS_BYTES = 1100 * 2**20  # torch, transformers and bitsandbytes with CUDA, resident, measured


def _merge_phases(phases: dict[str, int]) -> dict[str, int]:
    names = ("load", "forward", "backward", "optimizer step", "evaluation")
    return {name: phases[name] for name in names if name in phases}


def simulate_run(
    config: Any, shape: RunShape, gpu: GpuProfile | None, *, model_class: Any = AutoModelForCausalLM
) -> SimulatedRun:
    """Run a configuration's step on weightless tensors, with this card's kernels.

    Args:
        config: The model's transformers configuration.
        shape: The run's settings.
        gpu: Whose compute capability decides the kernels; None for the CPU's own choices.
        model_class: Of the task.

    Raises:
        UserError: The model cannot have these settings, or branches on values.
    """
    model = build_weightless_base(config, model_class, shape.base)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(attention_for(gpu.card if gpu is not None else None))
    run = SimulatedRun(Trace.empty(), shape)
    program = _Program(model, shape, run)
    run.trace = simulate(program, gpu.card if gpu is not None else None, answers=ANSWERS)
    return run


class _Program:
    """Load, adapt, two steps, one evaluation: what the tracker watches."""

    def __init__(self, model: Any, shape: RunShape, run: SimulatedRun) -> None:
        self.model, self.shape, self.run = model, shape, run

    def __call__(self, tracker: AllocationTracker) -> None:
        """Run under the tracker."""
        model, shape = self.model, self.shape
        tracker.set_phase("load")
        self._load(tracker)
        with tracker.component("adapters"):
            inject_adapter(model, shape.adapter, dtype=shape.adapter_dtype)
        parameters = adapter_parameters(model)
        plan_activations(model, decoder_layers(model), _activations(shape))
        task = CausalLM.for_model(model, chunk_tokens=shape.loss_chunk_tokens)
        with tracker.component("optimizer states"):
            optimizer = AdapterAdamW(parameters, kind=shape.optimizer)
        self._account(tracker, parameters, optimizer)
        batch = task.prepare(full_batch(shape))
        model.train()
        tracker.mark(RESET_PEAK)
        for step in range(2):
            watch_step(
                tracker,
                model,
                [batch] * min(shape.accumulation, 2),
                task=task,
                optimizer=optimizer,
                device=torch.device("meta"),
                step=step,
            )
        tracker.set_phase("evaluation")
        model.eval()
        task.evaluate(model, {name: part.to("meta") for name, part in batch.items()})
        tracker.set_phase("end")

    def _load(self, tracker: AllocationTracker) -> None:
        with _disable_current_modes():
            audit = {item.name: item for item in audit_base(self.model).tensors}
        dense = {
            f"{name}.codes": module.out_features * module.in_features * 2
            for name, module in self.model.named_modules()
            if isinstance(module, NF4Linear)
        }
        tensors: dict[str, Tensor] = dict(self.model.named_parameters())
        tensors |= dict(self.model.named_buffers())
        for name, tensor in tensors.items():
            item = audit.get(name)
            role = item.role if item is not None else "other"
            component = _ROLE_COMPONENTS.get(role, "norms and other")
            if name in dense:  # the 16-bit weight is on the card while it is quantized
                with tracker.temporary(dense[name], "weight before quantization"):
                    tracker.adopt(tensor, "load", component)
            else:
                tracker.adopt(tensor, "load", component)
            if item is not None and item.kept_because:
                self.run.large_unquantized[name] = item.size_bytes
        run = self.run
        run.base_parameters = sum(
            2 * t.numel() if n.endswith(".codes") else t.numel()
            for n, t in tensors.items()
            if n.endswith(".codes") or isinstance(t, nn.Parameter)
        )
        sizes = [t.nbytes for t in tensors.values()] + list(dense.values())
        run.largest_tensor_bytes = max(sizes, default=0)

    def _account(
        self, tracker: AllocationTracker, parameters: dict[str, nn.Parameter],
        optimizer: AdapterAdamW,
    ) -> None:  # fmt: skip
        for _name, tensor, pageable in optimizer.state_tensors():
            if pageable:
                tracker.move_to_host(tensor)
        sizes = optimizer.optimizer_bytes()
        run = self.run
        run.paged_bytes, run.optimizer_bytes = sizes.pageable_bytes, sizes.total_bytes
        run.trained_parameters = sum(p.numel() for p in parameters.values())
        run.trained_bytes = sum(p.nbytes for p in parameters.values())
        tag_gradients(tracker, parameters.values())


def watch_step(
    tracker: AllocationTracker,
    model: Any,
    micro_batches: Sequence[Batch],
    *,
    task: Task,
    optimizer: AdapterAdamW,
    device: torch.device,
    step: int,
) -> None:
    """One training step with its phases marked: the same for weightless and for real tensors."""

    def before_update(_result: StepResult) -> bool:
        tracker.follow_engine(None)
        tracker.set_phase("optimizer step")
        return True

    tracker.follow_engine(("forward", "backward"))
    train_step(
        model,
        micro_batches,
        task=task,
        optimizer=optimizer,
        learning_rate=1e-4,
        device=device,
        step=step,
        check=before_update,
    )


def tag_gradients(tracker: AllocationTracker, parameters: Iterable[nn.Parameter]) -> None:
    """Book gradients under their own name as the engine hands them over."""

    def tag(parameter: Tensor) -> None:
        if parameter.grad is not None:
            tracker.tag(parameter.grad, "gradients")

    for parameter in parameters:
        if isinstance(parameter, nn.Parameter):
            parameter.register_post_accumulate_grad_hook(tag)


def _activations(shape: RunShape) -> Activation | Sequence[Activation]:
    return shape.activations


def full_batch(shape: RunShape) -> dict[str, Tensor]:
    """The largest micro-batch of a run, on the host: full length, every token trained."""
    size = (shape.micro_batch_size, shape.seq_len)
    batch = {
        "input_ids": torch.zeros(size, dtype=torch.int64),
        "labels": torch.zeros(size, dtype=torch.int64),
    }
    if shape.padded:
        batch["attention_mask"] = torch.ones(size, dtype=torch.int64)
        batch["attention_mask"][0, -1] = 0
    return batch


def foresee(
    config: Any,
    shape: RunShape,
    gpu: GpuProfile,
    *,
    budget_bytes: int | None = None,
    expandable_segments: bool = False,
    with_timeline: bool = False,
    model_class: Any = AutoModelForCausalLM,
) -> Foresight:
    """Say what one configuration will need on one card.

    Args:
        config: The model's transformers configuration.
        shape: The run's settings.
        gpu: The card.
        budget_bytes: What of the card is free for this process.
        expandable_segments: Of the allocator's configuration.
        with_timeline: Keep the course of allocated and reserved memory.
        model_class: Of the task.

    Raises:
        UserError: The model cannot have these settings, or branches on values.
    """
    return simulate_run(config, shape, gpu, model_class=model_class).on(
        gpu,
        budget_bytes=budget_bytes,
        expandable_segments=expandable_segments,
        with_timeline=with_timeline,
    )
