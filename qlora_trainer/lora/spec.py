"""What a low-rank adapter is, as plain values: rank, alpha, where it sits, what is trained in full.

One frozen value says everything `inject_adapter` and `save_adapter` need. Patterns follow PEFT
(`rank_pattern`, `alpha_pattern`): a key is a regular expression for the end of a module path, and
the first key that matches wins.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora_trainer.errors import UserError

_MOST = 1e30  # a whole number of JSON may be too long for any float
ALL_LINEAR = "all-linear"


def match_pattern(patterns: Mapping[str, float], module_name: str) -> str | None:
    """Return the first key that PEFT would match with the module path, or None.

    >>> match_pattern({"q_proj": 8, "layers.0.mlp.up_proj": 4}, "model.layers.0.self_attn.q_proj")
    'q_proj'
    """
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module_name)), None)


def is_named(module_name: str, names: tuple[str, ...]) -> bool:
    """Tell whether a module path is one of the names or ends in one of them, as PEFT matches.

    >>> is_named("model.layers.0.self_attn.q_proj", ("q_proj",))
    True
    >>> is_named("model.layers.0.self_attn.qq_proj", ("q_proj",))
    False
    """
    return any(module_name == name or module_name.endswith(f".{name}") for name in names)


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter: sizes, places and the modules trained in full.

    Attributes:
        rank: Inner size of the low-rank product.
        alpha: Scale numerator; the product is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank)).
        dropout: Probability of dropping an input element of the low-rank path, in [0, 1).
        rslora: Scale by the square root of the rank (Kalajdzievski 2023, arXiv 2312.03732).
        target_modules: `all-linear`, names (exact, or the end of a path after a dot), or any other
            string: a regular expression that must match a module's whole path.
        layers: Only these decoder layers; None for all.
        exclude_modules: Names, or a regular expression, never adapted.
        modules_to_save: Names of modules trained in full and saved with the adapter.
        rank_pattern: Rank by module pattern.
        alpha_pattern: Alpha by module pattern.

    >>> AdapterSpec(rank=16, alpha=32).scaling("model.layers.0.self_attn.q_proj")
    2.0
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    layers: tuple[int, ...] | None = None
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise UserError.from_faults("the adapter cannot be made", faults)

    def _faults(self) -> list[str]:
        ranks = {"rank": self.rank, **{f"rank_pattern[{k!r}]": v for k, v in self._ranks()}}
        faults = [
            f"{name} = {value!r}: must be a whole number of at least 1"
            for name, value in ranks.items()
            if isinstance(value, bool) or not isinstance(value, int) or value < 1
        ]
        alphas = {"alpha": self.alpha}
        alphas |= {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}
        faults += [
            f"{name} = {value!r}: must be a finite number other than 0 (0 trains nothing)"
            for name, value in alphas.items()
            if isinstance(value, bool) or not 0 < abs(value) < _MOST
        ]
        if not 0 <= self.dropout < 1:
            faults.append(f"dropout = {self.dropout!r}: must be at least 0 and less than 1")
        expressions = [*self.rank_pattern, *self.alpha_pattern]
        for value in (self.target_modules, self.exclude_modules):
            expressions += [value] if isinstance(value, str) else []
        for expression in expressions:
            try:
                re.compile(expression)
            except (re.error, OverflowError, RecursionError) as error:
                faults.append(f"{expression!r} is not a regular expression: {error}")
        return faults

    def _ranks(self) -> list[tuple[str, int]]:
        return list(self.rank_pattern.items())

    def rank_of(self, module_name: str) -> int:
        """Rank of the adapter on one module."""
        key = match_pattern(self.rank_pattern, module_name)
        return self.rank if key is None else self.rank_pattern[key]

    def alpha_of(self, module_name: str) -> float:
        """Alpha of the adapter on one module."""
        key = match_pattern(self.alpha_pattern, module_name)
        return self.alpha if key is None else self.alpha_pattern[key]

    def scaling(self, module_name: str) -> float:
        """Factor of the low-rank product on one module."""
        rank = self.rank_of(module_name)
        return self.alpha_of(module_name) / (math.sqrt(rank) if self.rslora else rank)
