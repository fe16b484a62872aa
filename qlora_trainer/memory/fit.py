"""What fits this card: longest sequence, largest micro-batch, highest rank, and the way out.

Every answer is a configuration that was simulated and replayed at the card's capacity, and so is
the next larger one that no longer fits. Memory grows with each of these settings: a straight line
between a simulation that fits and one that does not says where to simulate next: a handful finds
the border. The line only chooses where to look; it is never the answer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from qlora_trainer.errors import UserError
from qlora_trainer.memory.border import last_that_fits
from qlora_trainer.memory.foresight import Foresight, RunShape, simulate_run
from qlora_trainer.memory.gpus import GpuProfile
from qlora_trainer.memory.way_out import Found, WayOut

_DEFAULT_LONGEST = 131_072  # where the model's configuration names no longest position
_LARGEST_BATCH = 1024
_HIGHEST_RANK = 1024


@dataclass(frozen=True)
class FitAnswer:
    """One border.

    Attributes:
        setting: Its name in the run file.
        value: The largest value that fits; 0 when none does.
        foresight: The prediction at that value (at the smallest one, when none fits).
        limit: Why it stops there: `card`, `model` or `setting`.
        next_value: The next larger value tried, which does not fit; None at a limit.
        overrides: Ready for `--set`.
    """

    setting: str
    value: int
    foresight: Foresight
    limit: str
    next_value: int | None
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Fitter:
    """A model, settings and a card; each method changes one setting and keeps the others.

    Attributes:
        config: The model's transformers configuration.
        shape: The run's settings.
        gpu: The card.
        budget_bytes: What of the card is free for this process.
        expandable_segments: Of the allocator's configuration.
        paged_on_card: See `SimulatedRun.on`.
        on_cpu: With the CPU's own kernels; `gpu` then stands for the host's memory.
    """

    config: Any
    shape: RunShape
    gpu: GpuProfile
    budget_bytes: int | None = None
    expandable_segments: bool = False
    paged_on_card: bool = False
    on_cpu: bool = False

    def foresee(self, shape: RunShape) -> Foresight:
        """Simulate one configuration."""
        return simulate_run(self.config, shape, None if self.on_cpu else self.gpu).on(
            self.gpu,
            budget_bytes=self.budget_bytes,
            expandable_segments=self.expandable_segments,
            paged_on_card=self.paged_on_card,
        )

    def longest_sequence(self, step_tokens: int = 64) -> FitAnswer:
        """The longest sequence, in multiples of `step_tokens`, never past the model's positions."""
        positions = _longest_position(self.config)
        return self._border(
            "data.max_seq_len",
            lambda units: replace(self.shape, seq_len=min(positions, units * step_tokens)),
            most=max(1, -(-positions // step_tokens)),
            value_of=lambda units: min(positions, units * step_tokens),
            limit="model",
        )

    def largest_micro_batch(self) -> FitAnswer:
        """The most sequences per forward pass."""
        return self._border(
            "train.micro_batch_size",
            lambda rows: replace(
                self.shape, micro_batch_size=rows, padded=rows > 1 and not self.shape.packed
            ),
            most=_LARGEST_BATCH,
            limit="setting",
        )

    def highest_rank(self) -> FitAnswer:
        """The highest adapter rank."""
        return self._border(
            "adapter.rank",
            lambda rank: replace(self.shape, adapter=replace(self.shape.adapter, rank=rank)),
            most=_HIGHEST_RANK,
            limit="setting",
        )

    def smallest_change(self) -> Found | None:
        """The mildest change with which the run fits: None where it fits already.

        Raises:
            UserError: Nothing tried makes it fit.
        """
        if self.foresee(self.shape).fits:
            return None
        found = self.way_out().find()
        if found is None:
            raise UserError(
                f"no change of settings makes this run fit {self.gpu.name}; take a smaller model "
                "or a larger card"
            )
        return found

    def longest_with_techniques(self, plain: FitAnswer) -> FitAnswer | None:
        """The longest sequence with what leaves the result alone, as far as that length needs it.

        Args:
            plain: The longest sequence without.

        Returns:
            None where it is no longer.
        """
        long = replace(self.shape, seq_len=min(_longest_position(self.config), 2 * plain.value))
        search = replace(self, shape=long).way_out()
        changes, together = search.all_lossless(streaming=False)
        found = replace(self, shape=together.apply(self.shape)).longest_sequence()
        if found.value <= plain.value:
            return None
        needed = search.reduced(together.with_length(found.value), changes)
        return replace(found, foresight=needed.foresight, overrides=needed.overrides)

    def way_out(self) -> WayOut:
        """A search for a smaller run."""
        return WayOut(
            self.shape,
            self.foresee,
            lambda shape: replace(self, shape=shape).longest_sequence().value,
            on_cpu=self.on_cpu,
        )

    def _border(
        self,
        setting: str,
        shape_of: Callable[[int], RunShape],
        *,
        most: int,
        value_of: Callable[[int], int] = lambda units: units,
        limit: str,
    ) -> FitAnswer:
        tried: dict[int, Foresight] = {}
        ahead = 0  # where the line last said to look

        def fits(index: int) -> bool:
            tried[index + 1] = self.foresee(shape_of(index + 1))
            return tried[index + 1].fits

        def guess(low: int, high: int) -> int:
            nonlocal ahead
            if low < 0:
                return 0
            if high == most:
                return most - 1
            if low == ahead > 0:
                ahead = 0
                return low + 1  # the line ends just below the border: look right above
            ahead = _between(low, high, tried[low + 1], tried[high + 1])
            return ahead

        good = 1 + last_that_fits(most, fits, guess)
        if not good:
            return FitAnswer(setting, 0, tried[1], "card", value_of(1), ())
        at_limit = good == most
        value = value_of(good)
        return FitAnswer(
            setting,
            value,
            tried[good],
            limit if at_limit else "card",
            None if at_limit else value_of(good + 1),
            (f"{setting}={value}",),
        )


def _between(good: int, bad: int, fitting: Foresight, failing: Foresight) -> int:
    """Where the straight line between two simulations meets the card."""
    low, high = fitting.total_bytes, failing.total_bytes
    share = 0.5
    if high > low:
        share = (fitting.capacity_bytes - low) / (high - low)
    return min(max(good + int((bad - good) * share), good + 1), bad - 1)


def _longest_position(config: Any) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions"):
        found = getattr(text, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return _DEFAULT_LONGEST
