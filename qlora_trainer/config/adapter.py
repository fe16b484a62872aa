"""The adapter's settings: which modules get one, how large it is, in which layers."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from qlora_trainer.config.kinds import Ending, Names, TargetModules, Text, without_doubles
from qlora_trainer.config.section import Settings
from qlora_trainer.errors import UserError

Rank = Annotated[int, Field(ge=1, le=1024)]
Alpha = Annotated[float, Field(gt=0)]


class LayerChoice(Settings):
    """Which decoder layers get adapters; exactly one key."""

    last: Annotated[int, Field(ge=1)] | None = Field(None, description="the last N layers")
    first: Annotated[int, Field(ge=1)] | None = Field(None, description="the first N layers")
    range: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[start, stop), counted from 0"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> "LayerChoice":
        given = [self.last, self.first, self.range]
        if sum(choice is not None for choice in given) != 1:
            raise ValueError("give exactly one of last, first, range")
        if self.range is not None and not 0 <= self.range[0] < self.range[1]:
            raise ValueError("range is [start, stop) with 0 <= start < stop")
        return self


def _layers_kind(value: object) -> str | None:
    if isinstance(value, (dict, LayerChoice)):
        return "choice"
    return "numbers" if isinstance(value, list) else "all" if value == "all" else None


Layers = Annotated[
    Annotated[Literal["all"], Tag("all")]
    | Annotated[
        list[Annotated[int, Field(ge=0)]],
        Field(min_length=1),
        AfterValidator(without_doubles),
        Tag("numbers"),
    ]
    | Annotated[LayerChoice, Tag("choice")],
    Discriminator(
        _layers_kind,
        custom_error_type="layers",
        custom_error_message="should be all, a list of layer numbers, {last: 8}, {first: 8} or "
        "{range: [8, 16]}",
    ),
]


class AdapterSettings(Settings):
    """The low-rank update that is trained."""

    rank: Rank = Field(16, description="rank of the update")
    alpha: Alpha = Field(32.0, description="scale of the update is alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead")
    target_modules: TargetModules = Field(
        "all-linear", description="'all-linear', a list of names, or one regular expression"
    )
    layers: Layers = Field(
        "all", description="all, a list of layer numbers, {last: 8}, {first: 8} or {range: [8, 16]}"
    )
    init_from: Text | None = Field(
        None, description="run folder or adapter folder to go on from, with new data"
    )
    modules_to_save: Names = Field([], description="modules trained in full and saved")
    rank_pattern: dict[Ending, Rank] = Field({}, description="rank by module name or expression")
    alpha_pattern: dict[Ending, Alpha] = Field({}, description="alpha by module name or expression")
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 with fp32 master values; fp32 where compute is not bf16"
    )

    def layer_numbers(self, count: int) -> tuple[int, ...] | None:
        """Numbers of the layers that get adapters, of a model with so many; None: all of them.

        Raises:
            UserError: The model has not all of these.
        """
        choice = self.layers
        if isinstance(choice, str):
            return None
        if isinstance(choice, list):
            numbers = choice
        elif choice.last is not None:
            numbers = list(range(count - choice.last, count))
        elif choice.first is not None:
            numbers = list(range(choice.first))
        else:
            assert choice.range is not None  # one of the three is given, `_exactly_one` sees to it
            numbers = list(range(*choice.range))
        if not numbers or min(numbers) < 0 or max(numbers) >= count:
            raise UserError(
                f"adapter.layers: the model has layers 0 to {count - 1}, not all of these"
            )
        return tuple(sorted(set(numbers)))
