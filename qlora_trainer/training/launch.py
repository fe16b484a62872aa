"""Meeting the processes that `torchrun`, `accelerate launch` or an MPI launcher has started.

accelerate reads what the launcher says (numbers, address) and gives each process its card.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from qlora_trainer.errors import UserError
from qlora_trainer.training.processes import ALONE, WAIT_SECONDS, Processes

_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@contextmanager
def join_processes(device: str, wait_seconds: float = WAIT_SECONDS) -> Iterator[Processes]:
    """Meet the other processes that a launcher has started; within, they are one run.

    Args:
        device: As in the run file: `auto`, `cpu` or a card.
        wait_seconds: How long an answer may take.

    Raises:
        UserError: There are more processes than cards, or the others cannot be met.
    """
    if max(int(os.environ.get(name) or 1) for name in _COUNTS) == 1:
        yield ALONE
        return
    from accelerate import PartialState

    timeout = timedelta(seconds=wait_seconds)
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if not on_cpu:
        _check_cards(device)
    try:
        state = PartialState(cpu=on_cpu, timeout=timeout)
        hosts = dist.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the processes of this run cannot meet at {where} ({str(error).splitlines()[0]}); "
            "every machine must reach that address, and be given the same number of processes"
        ) from error
    local_count = int(os.environ.get("LOCAL_WORLD_SIZE") or state.num_processes)
    yield Processes(
        state.process_index, state.num_processes, state.local_process_index, local_count, hosts,
        wait_seconds,
    )  # fmt: skip
    # Not after a failure, when the link may be broken. torch's own group lasts as long as the
    # process: met again at the same address, one could find the other still leaving it.
    dist.destroy_process_group(hosts)


def _check_cards(device: str) -> None:
    here, cards = int(os.environ.get("LOCAL_WORLD_SIZE") or 1), torch.cuda.device_count()
    if here > 1 and device not in ("auto", "cuda"):
        raise UserError(
            f"model.device = {device!r}: {here} processes on this machine need a card each; take "
            "'auto'"
        )
    if here > cards:
        raise UserError(
            f"{here} processes on this machine, which has {cards} GPUs; start as many as it has"
        )
