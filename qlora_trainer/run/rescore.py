"""What was saved, scored again by a process that knows nothing but the run folder.

A head that was not saved, labels in another order, an adapter that loads differently: all show
here. On a CPU the figures must be the same to the last bit. On a GPU, or where the run was resumed
elsewhere or with another batch size, sums are rounded otherwise: a few rows on the border may
flip, and what follows of that is allowed and said, with the rows predicted otherwise now.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.errors import UserError
from qlora_trainer.training.folder import BEST_PREDICTIONS

CUDA_TOLERANCE = 0.005  # of a mean such as the loss: rounding of other kernels
_FLIPPED_ROWS = 3
_LEAST_TOLERANCE = 1e-4  # of a figure's range, however many rows there are
_MOST_OF_A_MEAN = 0.05  # no row on the border moves a mean by its whole share
_MEANS = ("loss", "mean_absolute_error")
# Of what a task tells of a row, the one that is its prediction; shares and runners-up are not.
_DECISIONS = ("label", "labels", "value", "tags", "answer", "prediction")
_SHOWN_ROWS = 5
_SHOWN_CHARACTERS = 60


class CannotRescoreError(UserError):
    """The fresh process came to no figures, which says nothing of the adapter."""


@dataclass(frozen=True)
class Rescored:
    """What a fresh process finds.

    Attributes:
        metrics: By name.
        changed: A line for each held-out row of which another thing is predicted now.
    """

    metrics: dict[str, float]
    changed: list[str]


def rescore_in_fresh_process(folder: Path) -> Rescored:
    """A run's adapter scored on its held-out rows by a process of its own.

    Raises:
        CannotRescoreError: It cannot be loaded or scored there.
    """
    with tempfile.TemporaryDirectory(prefix="qlora-rescore-") as place:
        result = Path(place, "metrics.json")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", __name__, str(folder.absolute()), str(result),
             str(torch.get_num_threads())],
            capture_output=True, text=True, check=False,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        if done.returncode != 0 or not result.is_file():
            last = "\n  ".join(done.stderr.strip().splitlines()[-4:])
            raise CannotRescoreError(
                f"{folder}: the saved adapter could not be scored in a fresh process (exit code "
                f"{done.returncode}). Its last words:\n  {last}"
            )
        return Rescored(**json.loads(result.read_text(encoding="utf-8")))


def changed_rows(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], places: Sequence[str]
) -> list[str]:
    """A line for each row whose prediction is another one, however its shares have moved.

    Args:
        before: What was told of each row when the adapter was trained.
        after: What is told once it is saved and loaded again.
        places: File and line of each row.

    >>> changed_rows([{"label": "good", "score": 0.51}], [{"label": "bad"}], ["rows.jsonl:7"])
    ["rows.jsonl:7: 'good' -> 'bad'"]
    """
    lines = []
    for then, now, place in zip(before, after, places, strict=True):
        for name in _DECISIONS:
            if name in then and not _same(then[name], now[name]):
                lines.append(f"{place}: {_short(then[name])} -> {_short(now[name])}")
    return lines


def _same(then: Any, now: Any) -> bool:
    if isinstance(then, float):  # a regression decides nothing: its number is a figure like others
        return math.isclose(then, now, rel_tol=CUDA_TOLERANCE, abs_tol=CUDA_TOLERANCE)
    return bool(then == now)


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def require_same_metrics(
    trained: Mapping[str, float],
    saved: Mapping[str, float],
    device: torch.device,
    changed: Sequence[str] = (),
    *,
    alike: bool = True,
) -> float:
    """See that the saved adapter scores as the trained one did.

    Args:
        trained: Metrics while it was trained.
        saved: Metrics once saved and loaded again.
        device: Where both were measured.
        changed: From `changed_rows`; told where a figure is refused.
        alike: Both with the same device, threads, evaluation batch size and versions.

    Returns:
        The largest difference; 0 where all was alike on a CPU.

    Raises:
        UserError: A figure differs (on a GPU, or not alike: by more than a few rows make).
    """
    exact = device.type == "cpu" and alike
    differences = {
        name: abs(value - saved.get(name, float("inf"))) for name, value in trained.items()
    }
    wrong = [
        f"{name}: {trained[name]!r} when it was trained, {saved.get(name)!r} saved and loaded again"
        for name, difference in differences.items()
        if not difference <= (0.0 if exact else _allowed(name, trained))
    ]
    if wrong:
        raise UserError.from_faults(
            "the saved adapter is not the model that was trained; do not use it, and report this",
            [*wrong, *(f"another prediction: {line}" for line in changed)],
        )
    return max(differences.values(), default=0.0)


def _allowed(name: str, trained: Mapping[str, float]) -> float:
    """How far a figure may be moved by rounding, which flips at most a few rows."""
    if name == "rows":
        return 0.0
    share = max(_LEAST_TOLERANCE, _FLIPPED_ROWS / max(1.0, trained.get("rows", 1.0)))
    if name in _MEANS:
        share = max(CUDA_TOLERANCE, min(share, _MOST_OF_A_MEAN))
        return share * max(1.0, abs(trained[name]))
    # The tasks that count exact matches, answers and texts, count in percent.
    scale = 100.0 if "exact_match" in trained else 1.0
    return share * scale * (1 + 1e-9)  # a difference of that many rows is rounded itself


def prove_saved(
    folder: Path, trained: Mapping[str, float], device: torch.device, *, alike: bool = True
) -> str:
    """Score a finished run again in a fresh process; -> what to say of it.

    Where that process cannot score it (no memory for it, say), that is what is said.

    Args:
        folder: The run folder, with its adapter.
        trained: Metrics of that adapter while it was trained.
        device: Where both run.
        alike: Whether the run computed and evaluated the same way from beginning to end.

    Raises:
        UserError: What was saved is not what was trained.
    """
    try:
        found = rescore_in_fresh_process(folder)
    except CannotRescoreError as error:
        return f"not proven: {error}\nSee with: qlora evaluate {folder}"
    difference = require_same_metrics(trained, found.metrics, device, found.changed, alike=alike)
    said = _proof(difference, found.changed)
    return f"saved adapter and head, scored again by a fresh process: {said}"


def _proof(difference: float, changed: Sequence[str]) -> str:
    said = "the same figures" if not difference else f"the same figures within {difference:.2g}"
    if not changed:
        return said
    rows = f"{len(changed)} row{'s' * (len(changed) != 1)}"
    shown = "; ".join(changed[:_SHOWN_ROWS])
    more = f"; and {len(changed) - _SHOWN_ROWS} more" if len(changed) > _SHOWN_ROWS else ""
    return f"{said}, another prediction for {rows}: {shown}{more}"


def _main(folder: str, result: str, threads: str) -> None:
    from qlora_trainer.run.ask import load_trained
    from qlora_trainer.run.evaluate import evaluate_trained

    torch.set_num_threads(int(threads))
    trained = load_trained(folder)
    evaluation = evaluate_trained(trained)
    file = Path(folder, BEST_PREDICTIONS)
    # A run that an older version ended has none; its figures are compared all the same.
    before: list[Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    now = evaluation.predictions
    moved = before != now and len(before) == len(now)
    changed = _changed(trained, before, now) if moved else []
    found = {"metrics": evaluation.metrics, "changed": changed}
    Path(result).write_text(json.dumps(found), encoding="utf-8")


def _changed(trained: Any, before: Sequence[Any], now: Sequence[Any]) -> list[str]:
    """Held-out rows, and parts of long ones, whose predictions are told otherwise."""
    from qlora_trainer.run.evaluate import run_data
    from qlora_trainer.run.report import Reporter
    from qlora_trainer.training import setup

    data = run_data(trained, None, Reporter())
    rows, encoder = data.held_out, data.encoder
    task: Any = setup.make_task(trained.run, trained.model, trained.source, None, encoder=encoder)
    references = setup.references(trained.run, data)
    assert rows is not None
    assert references is not None

    def told(predictions: Sequence[Any]) -> list[Any]:
        # One by one: windows of a long record are not joined, so each has its row's place.
        return [task.tell([p], [references(index)])[0] for index, p in enumerate(predictions)]

    places = [rows.where(index) for index in range(len(rows))]
    return changed_rows(told(before), told(now), places)


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except UserError as fault:
        sys.exit(str(fault))
