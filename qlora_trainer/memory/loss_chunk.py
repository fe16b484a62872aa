"""The loss's chunk from the memory left: as many tokens' logits at one time as there is room for.

Fewer, larger chunks read the head less often: a product of C tokens does about C operations for
each byte of a 16-bit head, and cards do 100 to 300 in the time of reading one, so below some
hundred tokens they wait for memory. From 2,048 on nothing is left to win. (This is arithmetic; no
GPU has measured it here.) On a CPU the least stays.

It comes after the layers' plan (`memory/auto.py`), with what that leaves, and only where that was
asked for: who names a plan gets the least memory it needs. Every chunk tried is simulated. Other
chunks add in another order and give other bits, so `run/train.py` records the one taken, and a run
that goes on keeps it.
"""

from dataclasses import replace
from typing import Any

from qlora_trainer.memory.foresight import Foresight, SimulatedRun, simulate_run
from qlora_trainer.memory.gpus import GpuProfile
from qlora_trainer.tasks.linear_cross_entropy import default_chunk_tokens

MOST_TOKENS = 2048
# Of one logit: fp32, and in evaluation once more. Says only where to look first.
_LOGIT_BYTES = 8


def with_loss_chunk(
    config: Any,
    run: SimulatedRun,
    gpu: GpuProfile,
    *,
    budget_bytes: int | None = None,
    expandable_segments: bool = False,
    paged_on_card: bool = False,
    model_class: Any = None,
) -> SimulatedRun:
    """The run with the largest chunk that fits without the allocator giving memory back.

    Args:
        config: The model's transformers configuration.
        run: Simulated with the least chunk, `default_chunk_tokens`.
        gpu: The card.
        budget_bytes: What of it is free for this process; None takes its usable memory.
        expandable_segments: Of the allocator's configuration.
        paged_on_card: Managed memory counts on the card.
        model_class: Of the task.

    Returns:
        It, simulated with a power of two of at most `MOST_TOKENS`; the run as it is where there is
        no room, the settings name a chunk, or its loss makes no logits in chunks.

    Raises:
        UserError: The model cannot have these settings, or branches on values.
    """
    shape = run.shape
    if shape.loss_chunk_tokens is not None or not _makes_chunks(run):
        return run

    def on(simulated: SimulatedRun) -> Foresight:
        return simulated.on(
            gpu,
            budget_bytes=budget_bytes,
            expandable_segments=expandable_segments,
            paged_on_card=paged_on_card,
        )

    vocabulary = config.get_text_config().vocab_size
    least, found = default_chunk_tokens(vocabulary), on(run)
    of_loss = max(found.allocated_by_phase.get(phase, 0) for phase in ("forward", "evaluation"))
    free_bytes = found.capacity_bytes - found.total_bytes + found.reserved_bytes - of_loss
    room = least + free_bytes // (_LOGIT_BYTES * vocabulary)
    most = min(room, MOST_TOKENS, shape.micro_batch_size * shape.seq_len)
    tokens = 1 << max(most, 1).bit_length() - 1
    while tokens > least:
        larger = simulate_run(
            config, replace(shape, loss_chunk_tokens=tokens), gpu, model_class=model_class
        )
        if on(larger).fits_without_retry:
            return larger
        tokens //= 2
    return run


def _makes_chunks(run: SimulatedRun) -> bool:
    return any(a.component == "logits and loss" for a in run.trace.log.allocations)
