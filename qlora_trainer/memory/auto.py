"""As little recomputed and offloaded as the budget asks for, found by simulation.

The plans of a model of L layers stand in one order, each a little faster and a little larger than
the one before:

    the first L - 1 offloaded, ..., the first one offloaded, all recomputed,
    the last one kept, ..., all kept

What is kept is kept at the end, where the backward begins: its memory is free again before the
layers below are recomputed. The largest plan that fits is found by halving; every plan tried is
simulated and replayed at the budget, none is guessed.
"""

from dataclasses import replace
from typing import Any

from transformers import AutoModelForCausalLM

from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.load import build_weightless_base
from qlora_trainer.memory.border import last_that_fits
from qlora_trainer.memory.foresight import RunShape, simulate_run
from qlora_trainer.memory.gpus import GpuProfile
from qlora_trainer.training.activations import Activation

Plan = tuple[Activation, ...]


def plans(layers: int) -> list[Plan]:
    """All plans for so many layers, least memory first.

    >>> [" ".join(plan) for plan in plans(2)]
    ['offload recompute', 'recompute recompute', 'recompute keep', 'keep keep']
    """
    offload: Plan = ("offload",)
    recompute: Plan = ("recompute",)
    keep: Plan = ("keep",)
    offloading = [offload * n + recompute * (layers - n) for n in range(layers - 1, 0, -1)]
    return offloading + [recompute * (layers - n) + keep * n for n in range(layers + 1)]


def choose_activations(
    config: Any,
    shape: RunShape,
    gpu: GpuProfile | None,
    budget_bytes: int | None,
    *,
    expandable_segments: bool = False,
    paged_on_card: bool = False,
    model_class: Any = AutoModelForCausalLM,
) -> Plan:
    """The fastest plan that fits without the allocator giving memory back.

    Args:
        config: The model's transformers configuration.
        shape: The run's settings; its own plan is not looked at.
        gpu: The card; None for a CPU.
        budget_bytes: What is free for the run; of a card, None takes its usable memory.
        expandable_segments: Of the allocator's configuration.
        paged_on_card: Managed memory counts on the card.
        model_class: Of the task.

    Returns:
        One choice per layer; the smallest plan where none fits (whoever starts the run refuses it).

    Raises:
        UserError: The model cannot have these settings, or branches on values.
    """
    count = len(decoder_layers(build_weightless_base(config, model_class, shape.base)))
    if count == 0:
        return ()
    smallest, *larger = plans(count)
    # Weights that come and go have gone when a kept layer's backward comes.
    if shape.base.stream_layers or shape.base.layer_parts > 1:
        larger = [plan for plan in larger if "keep" not in plan]

    def fits(index: int) -> bool:
        changed = replace(shape, activations=larger[index])
        run = simulate_run(config, changed, gpu, model_class=model_class)
        if gpu is None:
            return budget_bytes is None or run.trace.live().peak_bytes <= budget_bytes
        found = run.on(
            gpu,
            budget_bytes=budget_bytes,
            expandable_segments=expandable_segments,
            paged_on_card=paged_on_card,
        )
        return found.fits_without_retry

    def guess(low: int, high: int) -> int:
        everything_may_be_kept = high == len(larger)
        return high - 1 if everything_may_be_kept else (low + high) // 2

    last = last_that_fits(len(larger), fits, guess)
    return larger[last] if last >= 0 else smallest
