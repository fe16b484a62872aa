"""Saving and resuming foreseen: nothing more on the card, on the host what the files hold."""

from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_trainer.memory.artefacts import disk_peak_bytes, host_bytes_by_phase
from qlora_trainer.memory.foresight import simulate_run
from qlora_trainer.memory.gpus import read_gpu
from qlora_trainer.memory.program import Accounts
from qlora_trainer.memory.saving import watch_resume, watch_save
from qlora_trainer.memory.tracker import AllocationTracker
from qlora_trainer.training.optimizer import AdapterAdamW, OptimizerKind
from qlora_trainer.training.state import save_state
from tests.memory.models import run_shape, tiny_config


def optimizer_on(device: str, kind: OptimizerKind) -> AdapterAdamW:
    shapes = {"a": (16, 400), "b": (70, 3), "c": (9,)}
    dtypes = {"a": torch.bfloat16, "b": torch.float32, "c": torch.bfloat16}
    made = {
        name: nn.Parameter(torch.zeros(shape, dtype=dtypes[name], device=device))
        for name, shape in shapes.items()
    }
    return AdapterAdamW(made, kind=kind)


def content_bytes(file: Path) -> int:
    """Of a safetensors file, without its header."""
    content = file.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_the_host_holds_what_the_files_do_and_the_card_nothing_more(
    kind: OptimizerKind, tmp_path: Path
) -> None:
    saved = save_state(tmp_path, 1, optimizer=optimizer_on("cpu", kind), trainer={}, keep_last=1)
    files = [content_bytes(file) for file in sorted(saved.glob("*.safetensors"))]
    tracker = AllocationTracker("meta")
    optimizer = optimizer_on("meta", kind)
    with tracker:
        for _, tensor, _ in optimizer.state_tensors():
            tracker.adopt(tensor)
        for parameter in optimizer.parameters.values():
            tracker.adopt(parameter)
        before = len(tracker.log.events)
        assert watch_save(tracker, optimizer) == max(files)  # one file after the other
        assert watch_resume(tracker, optimizer) == sum(files)  # both are read first
    assert tracker.log.events[before:] == []
    assert torch.ops.aten._to_copy.default not in tracker.rules
    tracker.close()


def test_a_run_saves_with_less_on_the_card_than_it_steps_and_more_on_the_host():
    run = simulate_run(tiny_config("llama"), run_shape(), read_gpu("rtx-3060-12gb"))
    found = run.on(read_gpu("rtx-3060-12gb"))
    card, host = found.allocated_by_phase, found.host_bytes_by_phase
    assert 0 == card["merge"] < card["resume"] <= card["save"] < card["backward"]
    assert not any(a.phase in ("save", "resume") for a in run.trace.log.allocations)
    assert host["save"] - host["backward"] == run.accounts.saving_bytes > 0
    assert host["resume"] >= run.accounts.trained_bytes + run.accounts.optimizer_bytes
    assert found.host_peak_bytes == max(found.host_bytes, *host.values())


def test_every_phase_names_what_it_holds_on_the_host() -> None:
    accounts = Accounts(
        paged_bytes=1, trained_bytes=10, optimizer_bytes=100, largest_tensor_bytes=1000,
        pinned_bytes=10**4, host_table_bytes=10**5, saving_bytes=10**6, resuming_bytes=10**7,
        looked_up_bytes=10**8,
    )  # fmt: skip
    host = host_bytes_by_phase(accounts)
    process = host["load"] - 10**5 - 2000
    assert {phase: size - process for phase, size in host.items()} == {
        "load": 102_000, "rehearsal": 100_110_111, "forward": 100_110_001, "backward": 110_001,
        "optimizer step": 110_001, "evaluation": 100_110_001, "save": 1_110_001,
        "resume": 10_100_001, "merge": 300_003_000,
    }  # fmt: skip


def test_the_disk_holds_one_state_and_one_adapter_more_while_they_are_written() -> None:
    accounts = Accounts(trained_bytes=10, optimizer_bytes=100, base_parameters=1000)
    assert disk_peak_bytes(accounts, 2) == {
        "adapters": 30, "saved states": 330, "merged export": 2000,
    }  # fmt: skip
