"""Dynamic loss scaling for fp16: keep small gradients above fp16's smallest number.

The loss is multiplied by a power of two before the backward; where a gradient overflows, the scale
is halved and *the same step is tried again*: neither schedule, data nor adapters move, so the run
still makes exactly the steps it promised (Micikevicius et al. 2018, section 3.2, drops the batch
instead). The scale is a host number, saved with the state.
"""

from dataclasses import dataclass

from qlora_trainer.errors import UserError

_SMALLEST = 2.0**-14


@dataclass
class LossScaler:
    """The scale and how long it has held.

    Attributes:
        scale: What the loss is multiplied by.
        growth_interval: Applied steps without overflow after which the scale doubles.
        good_steps: Applied steps since the scale last changed.
        overflows: Steps tried again, over the whole run.
    """

    scale: float = 2.0**16
    growth_interval: int = 1000
    good_steps: int = 0
    overflows: int = 0

    def overflowed(self) -> None:
        """Halve the scale.

        Raises:
            UserError: The gradients overflow whatever the scale; fp16 cannot hold this model.
        """
        self.scale, self.good_steps, self.overflows = self.scale / 2, 0, self.overflows + 1
        if self.scale < _SMALLEST:
            raise UserError(
                "model.compute_dtype: fp16: gradients overflow at every loss scale down to "
                f"{_SMALLEST:g}; this model cannot be trained in fp16, use bf16 or fp32"
            )

    def applied(self) -> None:
        """Count a step that was applied; double the scale when it has held long enough."""
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.scale, self.good_steps = min(self.scale * 2, 2.0**24), 0

    def state(self) -> dict[str, float]:
        """What resuming needs."""
        return {
            "scale": self.scale,
            "good_steps": self.good_steps,
            "overflows": self.overflows,
        }

    def load(self, state: dict[str, float]) -> None:
        """Take up a saved state."""
        self.scale = float(state["scale"])
        self.good_steps = int(state["good_steps"])
        self.overflows = int(state["overflows"])
