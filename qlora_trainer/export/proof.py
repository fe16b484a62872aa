"""What the proof asks: rows, precisions, limits.

`reference` runs base + adapter as training ran it and leaves its logits in a file; `fresh` starts a
new process in which plain transformers opens the export and compares (`plain`). One model is in
memory at a time, or where it does not fit (`holding`), one layer at a time (`turns`).

Two precisions. `native`: base + adapter in training's compute dtype, the export in the dtype it was
written in; what a user will see. `fp32`: both sides compute in float32, so that what differs is
the weights alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from qlora_trainer.errors import UserError
from qlora_trainer.export.choices import By

Row = Mapping[str, Tensor]
Precision = Literal["native", "fp32"]
NOT_COUNTED = -100
_MOST_REFERENCE_BYTES = 2**30


@dataclass(frozen=True)
class Limits:
    """How far an export may be from base + adapter before it is refused.

    Attributes:
        mean_kl: Mean Kullback-Leibler divergence in nats, where the export has the very weights
            training saw: merged onto dequantized weights, or trained in 16 bit.
        mean_kl_original: The same for weights merged onto the original ones, which differ from
            what training saw by the whole quantization error.
    """

    mean_kl: float = 0.02
    mean_kl_original: float = 0.5

    def of(self, onto: str, *, quantized: bool) -> float:
        """The limit for one way of merging."""
        return self.mean_kl_original if onto == "original" and quantized else self.mean_kl


@dataclass(frozen=True)
class ProofRequest:
    """What is compared, and how.

    Attributes:
        rows: Inputs without a batch dimension; `labels` choose positions and give the losses.
        texts: What the rows were made from, where the tokenizer shall be checked with them.
        rows_from: "held-out rows", "built-in text" or what else they are, for the report.
        precisions: The first one decides.
        limits: Above which the export is refused.
        max_positions: Compared at most, over all rows.
        device: Where both models run.
        by: Hold the whole "model" or one "layer" at a time; "auto" by the memory that is free.
        token_ids: Of `texts`, by the tokenizer that was trained with.
        say: Told in words what the proof is doing.
    """

    rows: Sequence[Row]
    texts: Sequence[str] = ()
    rows_from: str = "held-out rows"
    precisions: tuple[Precision, ...] = ("native",)
    limits: Limits = Limits()
    max_positions: int = 2048
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    by: By = "auto"
    token_ids: Sequence[Sequence[int]] = ()
    say: Callable[[str], object] = lambda _: None


def reference_bytes(request: ProofRequest | None, widest: int) -> int:
    """Disk the logits of base + adapter may take; `widest` is the most columns they can have."""
    if request is None:
        return 0
    return min(_MOST_REFERENCE_BYTES, 4 * request.max_positions * widest)


def chosen_rows(request: ProofRequest, widest: int) -> list[Row]:
    """The rows that are compared: as many from the first as positions and disk allow.

    Args:
        request: All rows.
        widest: Most columns the logits can have.

    Raises:
        UserError: There is nothing to compare: no row, or no position that counts.
    """
    limit = max(1, min(request.max_positions, _MOST_REFERENCE_BYTES // (4 * max(1, widest))))
    chosen: list[Row] = []
    left = limit
    for row in request.rows:
        cut = _shortened(row, limit)
        count = _positions(cut)
        if count == 0:
            continue
        if chosen and count > left:
            break
        chosen.append(cut)
        left -= count
    if not chosen:
        raise UserError(
            f"the proof has nothing to compare: none of {len(request.rows)} rows has a position "
            "that counts; give other rows, or export without the proof (--no-proof)"
        )
    return chosen


def _positions(row: Row) -> int:
    """Positions a row may give, at most."""
    labels = row.get("labels")
    if labels is not None:
        return int((labels != NOT_COUNTED).sum())
    return max((len(value) for value in row.values() if value.dim() == 1), default=1)


def _shortened(row: Row, most: int) -> Row:
    """A row of tokens without what is beyond the positions of all rows together."""
    return {name: value[:most] if value.dim() == 1 else value for name, value in row.items()}


def check_limits(figures: Mapping[str, float], onto: str, limit: float) -> str | None:
    """What is wrong with an export whose figures these are, or None."""
    if not all(math.isfinite(value) for value in figures.values()):
        return f"merged onto {onto}: its logits are not finite"
    if figures["mean_kl"] > limit:
        return (
            f"merged onto {onto}: mean KL divergence from base + adapter is "
            f"{figures['mean_kl']:.4g} nats, the limit is {limit:g} (top-1 agreement "
            f"{figures['top1_agreement']:.1%}, largest logit difference "
            f"{figures['max_logit_difference']:.3g})"
        )
    return None
