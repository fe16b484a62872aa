"""Many configurations foreseen, in worker processes where that is quicker.

A simulation is Python on one core. Workers begin anew (spawn) and each imports everything, several
seconds, so a few configurations are simulated here; nothing is shared, so threads and CUDA contexts
of this process do not matter.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from qlora_trainer.base.machine import host_memory_bytes
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.memory.foresight import Foresight
from qlora_trainer.run.budget import Budget
from qlora_trainer.run.foresee import foresee_run

_WORKER_BYTES = 700 * 2**20  # measured: 560 MiB at most, of 70B
_WORTH_WORKERS = 8  # configurations; below, the imports take longer than is won
_MOST_WORKERS = 8


def foresee_all(
    asked: Sequence[tuple[RunConfig, Budget]], *, with_timeline: bool = False
) -> Iterator[Foresight]:
    """What each run will need, in their order, as it becomes known.

    Args:
        asked: Runs, and what each may have of a card.
        with_timeline: Keep the course of memory, of the first one.

    Raises:
        UserError: A model is not there or cannot have its settings.
    """
    timelines = [with_timeline and number == 0 for number in range(len(asked))]
    count = _workers(len(asked))
    if count < 2:
        yield from map(_foresee, asked, timelines)
        return
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(_foresee, asked, timelines)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # nobody waits for the others any more
            raise


def _foresee(asked: tuple[RunConfig, Budget], with_timeline: bool) -> Foresight:
    run, allowed = asked
    return foresee_run(
        run,
        allowed.gpu,
        budget_bytes=allowed.budget_bytes,
        expandable_segments=allowed.expandable_segments,
        paged_on_card=allowed.paged_on_card,
        with_timeline=with_timeline,
        processes=allowed.processes,
    )


def _workers(configurations: int) -> int:
    """As many as there are cores and room for; 1 where they are not worth their start."""
    if configurations < _WORTH_WORKERS:
        return 1
    room = host_memory_bytes()[1] // _WORKER_BYTES
    return max(1, min(os.cpu_count() or 1, room, configurations // 4, _MOST_WORKERS))
