"""Proof that the adapters learn: gradients after a step, movement at the end.

A finite, falling loss proves nothing about each adapter: gradient checkpointing, an unused branch
or a library's shortcut in evaluation mode can cut one off silently. The factor that starts at zero
is the witness: its gradient is not zero as soon as its module ran and the loss depends on it.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from qlora_trainer.errors import UserError
from qlora_trainer.lora.inject import (
    adapted_layers,
    reset_reached,
    unreached_layers,
    zero_initialised_factor,
)


class LearningChecks:
    """Watches the adapted layers of one model.

    Args:
        model: With adapters.
        say: Told once which adapters were never reached.
    """

    def __init__(self, model: nn.Module, say: Callable[[str], None]) -> None:
        self._model = model
        self._say = say
        self._witnesses = {
            name: zero_initialised_factor(layer)[1] for name, layer in adapted_layers(model).items()
        }
        self._named: set[str] = set()

    def begin(self) -> None:
        """Forget which modules have run; call before a step that is to be looked at."""
        reset_reached(self._model)

    def require_gradients(self) -> None:
        """After the backward: every witness whose module ran must have a gradient that is not zero.

        Raises:
            UserError: Names the layers without one.
        """
        unreached = set(unreached_layers(self._model))
        ran = {name: p for name, p in self._witnesses.items() if name not in unreached}
        silent = [name for name, p in ran.items() if p.grad is None]
        largest = _largest({name: p.grad for name, p in ran.items() if p.grad is not None})
        silent += [name for name, value in largest.items() if value == 0.0]
        if silent:
            raise UserError.from_faults(
                "these adapters ran but got no gradient, so they would not learn; nothing was "
                "updated. This is a fault of the model's code or of ours: please report it. "
                "Leave them out with adapter.target_modules, or try train.activations: keep",
                silent,
            )
        # One without a module that ran here may have learned from another process' rows.
        idle = {name for name in unreached if self._witnesses[name].grad is None}
        new = sorted(idle - self._named)
        if new:
            self._named.update(new)
            shown = ", ".join(new[:5]) + (f", ... ({len(new)} in all)" if len(new) > 5 else "")
            self._say(f"adapters whose module did not run, so they learn nothing: {shown}")

    def require_movement(self, steps: Mapping[str, int]) -> None:
        """At the end: every witness that was updated must have left zero.

        Args:
            steps: Updates by parameter name, as the optimizer counted them.

        Raises:
            UserError: Names the layers that did not move.
        """
        by_identity = {id(p): name for name, p in self._model.named_parameters()}
        updated = {
            name: p
            for name, p in self._witnesses.items()
            if steps.get(by_identity.get(id(p), ""), 0) > 0
        }
        still = [name for name, value in _largest(updated).items() if value == 0.0]
        if still:
            raise UserError.from_faults(
                "these adapters were updated but did not move; is train.learning_rate 0?", still
            )


def _largest(tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Largest magnitude of each tensor, with one wait for the device."""
    if not tensors:
        return {}
    norms = torch.stack([tensor.detach().abs().max().float() for tensor in tensors.values()])
    return dict(zip(tensors, norms.tolist(), strict=True))
