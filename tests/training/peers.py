"""One of several processes that talk to each other, started by `test_processes.py`.

`python -m tests.training.peers FOLDER`: does each job with a link of its own, which waits
`WAIT_SECONDS` for an answer, and writes what it saw to `FOLDER/RANK.json`. A process waits for what
another one does by looking for a file, not by the clock.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qlora_trainer.errors import UserError
from qlora_trainer.training.gradient_sum import GradientSum
from qlora_trainer.training.launch import join_processes
from qlora_trainer.training.processes import Processes

WAIT_SECONDS = 5.0
BUCKET_BYTES = 100  # of the parameters below some fit together, and one does not fit at all
CPU = torch.device("cpu")


def wait_for(file: Path) -> None:
    """Return when another process has made the file."""
    while not file.exists():
        time.sleep(0.05)


def heard(action: Callable[[], Any]) -> list[str]:
    """What an action says to have failed: the kind of error and its words."""
    try:
        action()
    except (UserError, torch.OutOfMemoryError) as error:
        return [type(error).__name__, str(error)]
    return []


def busy(processes: Processes, folder: Path) -> Any:
    """The first is at work for longer than an answer may take; the second waits for a value."""

    def work() -> None:
        if processes.is_main:
            with processes.busy():
                time.sleep(1.5 * WAIT_SECONDS)
        assert processes.gather(processes.rank) == [0, 1]

    return heard(work)


def fault_while_busy(processes: Processes, folder: Path, error: Exception, name: str) -> Any:
    """The second fails while the first is at work, which is let go on to its end."""
    done = folder / name

    def work() -> None:
        if not processes.is_main:
            try:
                with processes.together():
                    raise error
            finally:
                done.touch()
        with processes.busy():
            wait_for(done)
            done.with_suffix(".ended").touch()

    return [heard(work), done.with_suffix(".ended").exists()]


def silent(processes: Processes, folder: Path) -> Any:
    """The second lives and says nothing until the first has given it up."""
    given_up = folder / "given-up"
    if processes.is_main:
        said = heard(lambda: processes.gather(None))
        given_up.touch()
        return said
    wait_for(given_up)
    return []


def parameters() -> list[nn.Parameter]:
    """Of 40, 40, 400, 40, 20 and 8 bytes of gradient in fp32, one of them in bf16."""
    made = [nn.Parameter(torch.zeros(size)) for size in (10, 10, 100, 10, 5, 2)]
    made[3] = nn.Parameter(made[3].to(torch.bfloat16))
    return made


def own_gradients(rank: int) -> list[torch.Tensor | None]:
    """What a process has summed: the fifth only the second, the last nobody."""
    made = torch.Generator().manual_seed(rank)
    found: list[torch.Tensor | None] = [
        torch.randn(p.shape, generator=made).to(p.dtype) for p in parameters()
    ]
    if rank == 0:
        found[4] = None
    found[5] = None
    return found


def sums(processes: Processes, folder: Path) -> Any:
    """Gradients and a loss over several buckets."""
    held = parameters()
    for p, grad in zip(held, own_gradients(processes.rank), strict=True):
        p.grad = grad
    adder = GradientSum(held, processes, CPU, BUCKET_BYTES)
    loss = adder.over(torch.tensor(1.5 + processes.rank))
    return [float(loss), [None if p.grad is None else p.grad.tolist() for p in held]]


def main(folder: Path) -> None:
    made_up, short = UserError("no room"), torch.OutOfMemoryError("made up")
    jobs: dict[str, Callable[[Processes], Any]] = {
        "sums": lambda ours: sums(ours, folder),
        "busy": lambda ours: busy(ours, folder),
        "fault": lambda ours: fault_while_busy(ours, folder, made_up, "fault"),
        "memory": lambda ours: fault_while_busy(ours, folder, short, "memory"),
        "silent": lambda ours: silent(ours, folder),
    }
    with join_processes("cpu") as processes:
        seen = {}
        for name, job in jobs.items():
            processes.gather(None)  # of a link that waits long: they begin together
            link = dist.new_group(backend="gloo", timeout=timedelta(seconds=WAIT_SECONDS))
            seen[name] = job(replace(processes, hosts=link, wait_seconds=WAIT_SECONDS))
        (folder / f"{processes.rank}.json").write_text(json.dumps(seen))
        # The link that was given up is still at work; as the interpreter ends that may abort it.
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
