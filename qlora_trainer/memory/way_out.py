"""The smallest change that makes a run fit a card: searched among `memory/changes.py`, simulated.

All lossless changes together say whether losing anything is needed. Then changes are added one by
one, mildest first, until the run fits, and every one that turns out not to be needed is taken back,
dearest first: what is left fits, and without any of it the run does not. Only where no change
suffices are sequences cut, and at last ranks. Each configuration asked about is simulated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from qlora_trainer.errors import UserError
from qlora_trainer.memory.changes import Change, Option, lossless_changes, lossy_changes
from qlora_trainer.memory.foresight import Foresight
from qlora_trainer.memory.program import RunShape

_SHORTEST = 256  # tokens a way out may leave; below it nothing is worth training
_LOWEST_RANK = 4


@dataclass(frozen=True)
class Plan:
    """Changes chosen together.

    Attributes:
        options: In the order in which they are applied.
    """

    options: tuple[Option, ...] = ()

    @property
    def overrides(self) -> tuple[str, ...]:
        """Ready for `--set`; of one setting changed twice, the last."""
        merged: dict[str, str] = {}
        for option in self.options:
            merged |= option.overrides
        return tuple(f"{name}={value}" for name, value in merged.items())

    @property
    def what(self) -> str:
        """In words."""
        return ", ".join(option.what for option in self.options)

    def with_length(self, tokens: int) -> "Plan":
        """And sequences of so many tokens."""
        return Plan((*self.options, _length(tokens)))

    def apply(self, shape: RunShape) -> RunShape:
        """The run with all of them."""
        for option in self.options:
            shape = option.apply(shape)
        return shape


@dataclass(frozen=True)
class Found:
    """A plan and what was foreseen with it."""

    plan: Plan
    foresight: Foresight

    @property
    def overrides(self) -> tuple[str, ...]:
        """Ready for `--set`."""
        return self.plan.overrides

    @property
    def what(self) -> str:
        """In words."""
        return self.plan.what


@dataclass
class WayOut:
    """A search for one run.

    Attributes:
        shape: The run.
        foresee: Simulates one configuration.
        longest: The most tokens that fit with other settings, 0 where none do.
        on_cpu: See `lossless_changes`.
    """

    shape: RunShape
    foresee: Callable[[RunShape], Foresight]
    longest: Callable[[RunShape], int]
    on_cpu: bool = False
    _tried: dict[tuple[str, ...], Foresight] = field(default_factory=dict)

    def simulate(self, plan: Plan) -> Foresight:
        """The run with a plan; each is simulated once."""
        if plan.overrides not in self._tried:
            self._tried[plan.overrides] = self.foresee(plan.apply(self.shape))
        return self._tried[plan.overrides]

    def all_lossless(self, *, streaming: bool) -> tuple[list[Change], Plan]:
        """The lossless changes this model can have, and the smallest run they make together."""
        possible = lossless_changes(self.shape, on_cpu=self.on_cpu, streaming=streaming)
        together = _smallest(possible)
        try:
            self.simulate(together)
        except UserError:  # one of them this model cannot have, such as tied embeddings on the host
            possible = [change for change in possible if self._possible(Plan((change[-1],)))]
            together = _smallest(possible)
        return possible, together

    def find(self) -> Found | None:
        """The mildest plan that fits; None where nothing tried does."""
        lossless, together = self.all_lossless(streaming=not self.on_cpu)
        if self.simulate(together).fits:
            found = self._first(Plan(), lossless)
            return None if found is None else self.reduced(found, lossless)
        lossy = lossy_changes(self.shape, on_cpu=self.on_cpu)
        found = self._first(together, lossy)
        if found is None:
            found = self._shorter(self._all(together, lossy))
        return None if found is None else self.reduced(found, [*lossless, *lossy])

    def _first(self, start: Plan, changes: Sequence[Change]) -> Plan | None:
        """Changes added one by one until the run fits."""
        plan = start
        for change in changes:
            widest = plan
            for option in change:
                wider = Plan((*plan.options, option))
                if self._possible(wider):
                    if self.simulate(wider).fits:
                        return wider
                    widest = wider
            plan = widest
        return None

    def _all(self, start: Plan, changes: Sequence[Change]) -> Plan:
        plan = start
        for change in changes:
            wider = (Plan((*plan.options, option)) for option in reversed(change))
            plan = next((each for each in wider if self._possible(each)), plan)
        return plan

    def _possible(self, plan: Plan) -> bool:
        try:
            self.simulate(plan)
        except UserError:
            return False
        return True

    def reduced(self, found: Plan, changes: Sequence[Change]) -> Found:
        """A plan without what is not needed; of what is, the mildest option that still does."""
        for change in reversed(changes):
            place = next((i for i, o in enumerate(found.options) if o in change), None)
            if place is None:
                continue
            before, after = found.options[:place], found.options[place + 1 :]
            milder = change[: change.index(found.options[place])]
            for kept in ((), *((option,) for option in milder)):
                plan = Plan((*before, *kept, *after))
                if self._possible(plan) and self.simulate(plan).fits:
                    found = plan
                    break
        return Found(found, self.simulate(found))

    def _shorter(self, plan: Plan) -> Plan | None:
        """Cut to the longest sequences that fit; then lower ranks."""
        shape = plan.apply(self.shape)
        tokens = min(shape.seq_len, _SHORTEST)
        if shape.seq_len > tokens:
            tokens = min(max(self.longest(shape), tokens), shape.seq_len)
            plan = plan.with_length(tokens)
            if self.simulate(plan).fits:
                return plan
        rank = shape.adapter.rank
        while rank > _LOWEST_RANK:
            rank //= 2
            lower = Plan((*plan.options, _rank(rank)))
            if self.simulate(lower).fits:
                return lower
        return None


def _smallest(changes: Sequence[Change]) -> Plan:
    return Plan(tuple(change[-1] for change in changes))


def _length(tokens: int) -> Option:
    return Option(
        {"data.max_seq_len": str(tokens)},
        f"sequences of at most {tokens} tokens",
        lambda run: replace(run, seq_len=tokens),
    )


def _rank(rank: int) -> Option:
    return Option(
        {"adapter.rank": str(rank)},
        f"rank {rank}",
        lambda run: replace(run, adapter=replace(run.adapter, rank=rank)),
    )
