"""The program that is foreseen: load, adapt, resume, two training steps, one evaluation, a save.

It calls the very functions the trainer calls, on weightless tensors, and tells the tracker which
phase it is in and what belongs to which component.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qlora_trainer.base.host_embedding import HostEmbedding
from qlora_trainer.base.host_head import HostHead
from qlora_trainer.base.layer_shards import WeightlessShards
from qlora_trainer.base.layer_stream import HostStore, stream_of
from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.base.spec import BaseSpec
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter, with_heads
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.memory.attention import answers_for
from qlora_trainer.memory.loading import watch_load
from qlora_trainer.memory.log import RESET_PEAK
from qlora_trainer.memory.saving import watch_resume, watch_save
from qlora_trainer.memory.tracker import AllocationTracker
from qlora_trainer.memory.transfers import WatchedTransfers
from qlora_trainer.memory.watched_step import tag_gradients, watch_step
from qlora_trainer.tasks.catalogue import task_kind
from qlora_trainer.tasks.kind import TaskInputs
from qlora_trainer.tasks.linear_cross_entropy import PLAIN, Regularized
from qlora_trainer.tasks.task import Batch, to_device
from qlora_trainer.training.activations import Activation, plan_activations
from qlora_trainer.training.optimizer import AdapterAdamW, OptimizerKind
from qlora_trainer.training.processes import Processes
from qlora_trainer.training.techniques import Techniques, apply_techniques


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
        regularized: Label smoothing and z-loss.
        chunked_loss: As in the run file.
        padded: Batches carry an attention mask.
        packed: Rows hold several examples.
        mask_free: Packed rows go without a mask where the model's attention can.
        examples: Of a packed row, at most.
        longest_held_out: Tokens of an evaluated row where those trained are packed; None: as many
            as `seq_len`, 0: none is evaluated.
        held_out_rows: Sequences per forward pass of an evaluation; None: as of training.
        task: What is learned.
        task_settings: As in the run file.
        techniques: What replaces modules of the model.
        keep_last: Saved states kept, as in the run file.
        processes: How many share the window; what is foreseen is the main one's memory.
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
    regularized: Regularized = PLAIN
    chunked_loss: bool = True
    padded: bool = False
    packed: bool = False
    mask_free: bool = True
    examples: int = 2
    longest_held_out: int | None = None
    held_out_rows: int | None = None
    task: str = "causal-lm"
    task_settings: Mapping[str, Any] = field(default_factory=dict)
    techniques: Techniques = field(default_factory=Techniques)
    keep_last: int = 2
    processes: int = 1

    @property
    def own_accumulation(self) -> int:
        """Forward passes of the main process per optimizer step."""
        return len(Processes(count=self.processes).share(self.accumulation))


@dataclass
class Accounts:
    """What is known of a run beside its trace.

    Attributes:
        paged_bytes: Optimizer states in managed memory.
        trained_parameters: How many numbers are trained.
        trained_bytes: What they take.
        optimizer_bytes: All states.
        base_parameters: Numbers of the base, unpacked.
        largest_tensor_bytes: The largest tensor on its way to the card.
        large_unquantized: Path -> bytes of large weights outside NF4.
        notes: What the user should know of the model's attention.
        pinned_bytes: Host memory that offloaded layer inputs take at most.
        waiting_bytes: Host memory, pinned as well, that streamed layers and a head there take.
        part_bytes: Of sharded layers, what the process holds.
        moved_bytes: Over PCIe, both ways, by one forward and backward: layer inputs, streamed
            layers, a head, embeddings looked up on the host. Not the batch, and not what the
            driver pages of optimizer states, which depends on what else is on the card.
        gathered_bytes: From the other processes, of sharded layers, likewise.
        host_table_bytes: Token embeddings left in host memory.
        looked_up_bytes: Rows of them there, and token ids, on their way to or from the card.
        saving_bytes: Most copies on the host at one time while a state is saved.
        resuming_bytes: A saved state read back, before it is on the card.
    """

    paged_bytes: int = 0
    trained_parameters: int = 0
    trained_bytes: int = 0
    optimizer_bytes: int = 0
    base_parameters: int = 0
    largest_tensor_bytes: int = 0
    large_unquantized: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pinned_bytes: int = 0
    waiting_bytes: int = 0
    part_bytes: int = 0
    moved_bytes: int = 0
    gathered_bytes: int = 0
    host_table_bytes: int = 0
    looked_up_bytes: int = 0
    saving_bytes: int = 0
    resuming_bytes: int = 0


class Program:
    """Load, adapt, resume, two steps, one evaluation, a save: what the tracker watches.

    Micro-batches are given on the host and not yet prepared; without `held_out` the one that is
    trained is evaluated.
    """

    def __init__(
        self,
        model: Any,
        shape: RunShape,
        accounts: Accounts,
        batch: Batch,
        *,
        held_out: Batch | None = None,
        on_cpu: bool = False,
    ) -> None:
        self.model, self.shape, self.accounts = model, shape, accounts
        self.batch, self.held_out = batch, held_out
        self.on_cpu = on_cpu

    def __call__(self, tracker: AllocationTracker) -> None:
        """Run under the tracker."""
        model, shape, accounts = self.model, self.shape, self.accounts
        stream = stream_of(model)
        tracker.set_phase("load")
        loaded = watch_load(tracker, model)
        accounts.base_parameters = loaded.parameters
        accounts.largest_tensor_bytes = loaded.largest_tensor_bytes
        accounts.large_unquantized = loaded.large_unquantized
        accounts.host_table_bytes = loaded.host_table_bytes
        accounts.waiting_bytes = loaded.waiting_bytes
        accounts.part_bytes = loaded.part_bytes
        with tracker.component("adapters"):
            inject_adapter(model, _with_heads(model, shape), dtype=shape.adapter_dtype)
        parameters = adapter_parameters(model)
        apply_techniques(model, shape.techniques)
        transfers = WatchedTransfers(tracker)
        weights = WatchedTransfers(tracker, "streamed layers")
        heads, rows = (WatchedTransfers(tracker, "embeddings and heads") for _ in range(2))
        for module in model.modules():
            if isinstance(module, HostHead):
                module.transfers = heads
            elif isinstance(module, HostEmbedding) and not self.on_cpu:
                module.transfers = rows
            elif isinstance(module, NF4Linear):
                module.on_cpu = self.on_cpu
        shards = None
        if stream is not None and isinstance(stream.store, HostStore):
            stream.store.transfers = weights
        elif stream is not None and isinstance(stream.store, WeightlessShards):
            shards = stream.store
            shards.watch = functools.partial(tracker.tag, component="gathered layers")
        layers = decoder_layers(model)
        plan_activations(model, layers, shape.activations, transfers=transfers)
        task = task_kind(shape.task).make_task(
            TaskInputs(
                model,
                shape.task_settings,
                chunk_tokens=shape.loss_chunk_tokens,
                regularized=shape.regularized,
                chunked_loss=shape.chunked_loss,
                on_cpu=self.on_cpu,
            )
        )
        with tracker.component("optimizer states"):
            optimizer = AdapterAdamW(parameters, kind=shape.optimizer)
        self._account(tracker, parameters, optimizer)
        tracker.set_phase("resume")
        accounts.resuming_bytes = watch_resume(tracker, optimizer)
        tracker.set_phase("load")  # what a run that begins anew comes from
        batch = task.prepare(self.batch)
        tracker.answers |= answers_for(batch)
        model.train()
        tracker.mark(RESET_PEAK)
        for step in range(2):
            processes = Processes(count=shape.processes)
            most = min(shape.own_accumulation, 2) if step else 1
            window = [batch] * (most * shape.processes)
            watch_step(
                tracker,
                model,
                window,
                task=task,
                optimizer=optimizer,
                device=torch.device("meta"),
                step=step,
                processes=processes,
            )
            accounts.pinned_bytes, accounts.looked_up_bytes = transfers.most_bytes, rows.most_bytes
            copies = (transfers, weights, heads, rows)
            accounts.moved_bytes = sum(each.taken() for each in copies) // most
            if shards is not None:
                accounts.gathered_bytes, shards.received_bytes = shards.received_bytes // most, 0
        tracker.set_phase("evaluation")
        model.eval()
        if self.held_out is not None:
            batch = task.prepare(self.held_out)
            tracker.answers |= answers_for(batch)
        task.evaluate(model, to_device(batch, torch.device("meta")))
        tracker.set_phase("save")
        accounts.saving_bytes = watch_save(tracker, optimizer)
        tracker.set_phase("end")

    def _account(
        self, tracker: AllocationTracker, parameters: dict[str, nn.Parameter],
        optimizer: AdapterAdamW,
    ) -> None:  # fmt: skip
        for _name, tensor, pageable in optimizer.state_tensors():
            if pageable:
                tracker.move_to_host(tensor)
        sizes = optimizer.optimizer_bytes()
        accounts = self.accounts
        accounts.paged_bytes, accounts.optimizer_bytes = sizes.pageable_bytes, sizes.total_bytes
        accounts.trained_parameters = sum(p.numel() for p in parameters.values())
        accounts.trained_bytes = sum(p.nbytes for p in parameters.values())
        tag_gradients(tracker, parameters.values())


def _with_heads(model: Any, shape: RunShape) -> AdapterSpec:
    return with_heads(shape.adapter, model) if task_kind(shape.task).new_head else shape.adapter
