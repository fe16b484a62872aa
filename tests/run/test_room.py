"""What a run has no room for is told, with the way out."""

from collections.abc import Callable

from qlora_trainer.base.load import BaseSpec
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.memory.foresight import SimulatedRun
from qlora_trainer.memory.gpus import read_gpu
from qlora_trainer.memory.program import Accounts, RunShape
from qlora_trainer.memory.simulate import Trace
from qlora_trainer.run.report import Reporter
from qlora_trainer.run.room import room_on_card, room_on_disk
from tests.run.conftest import Lines

Make = Callable[..., RunConfig]


def test_a_disk_too_small_for_the_states_is_told(make_run: Make) -> None:
    shape = RunShape(BaseSpec("nf4"), AdapterSpec(rank=4, alpha=8))
    small, large = (
        SimulatedRun(Trace.empty(), shape, Accounts(trained_bytes=size, optimizer_bytes=2 * size))
        for size in (10**6, 10**15)
    )
    assert room_on_disk(make_run(), small, Reporter()) == []
    assert "--set output.keep_last=1" in room_on_disk(make_run(), large, Reporter())[0]


def test_a_disk_too_small_for_the_merged_export_is_told_and_refuses_nothing(
    make_run: Make,
) -> None:
    shape = RunShape(BaseSpec("nf4"), AdapterSpec(rank=4, alpha=8))
    for parameters, said in ((10**6, False), (10**15, True)):
        told = Lines()
        accounts = Accounts(trained_bytes=1, optimizer_bytes=1, base_parameters=parameters)
        assert room_on_disk(make_run(), SimulatedRun(Trace.empty(), shape, accounts), told) == []
        assert ("no room" in told.lines[0]) == said


def test_a_card_s_host_memory_is_checked_with_the_rehearsal_unless_there_is_none() -> None:
    gpu = read_gpu("rtx-3060-12gb")
    shape = RunShape(BaseSpec("nf4"), AdapterSpec(rank=4, alpha=8))
    accounts = Accounts(trained_bytes=10**15, optimizer_bytes=10**15)
    simulated = SimulatedRun(Trace.empty(), shape, accounts)
    for rehearsed in (True, False):
        predicted, faults = room_on_card(
            simulated, None, shape, (gpu, gpu.usable_bytes), Lines(), rehearsed=rehearsed
        )
        assert [fault.partition(":")[0] for fault in faults] == ["host memory"] * rehearsed
        assert predicted["host_bytes_by_phase"]["rehearsal"] > 2 * 10**15
