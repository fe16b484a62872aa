"""Predictions written as a page and as pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.memory.foresight import Foresight
from qlora_trainer.memory.plots import draw_bars, draw_timeline
from qlora_trainer.memory.report import write_report
from qlora_trainer.memory.report_tables import Pair
from qlora_trainer.run.measure import Comparison


def write_pictures(
    page: Path,
    found: Sequence[tuple[tuple[str, ...], Foresight]],
    run: RunConfig,
    *,
    notes: Sequence[str] = (),
) -> list[Path]:
    """Write `page`, and beside it its bars and timeline as PNGs.

    Args:
        page: The HTML file.
        found: Settings changed, and the prediction, of each configuration; with timelines.
        run: The first one's settings; a finished run in its folder tells what was measured.
        notes: What to know beside the verdicts.

    Returns:
        What was written.

    Raises:
        UserError: It cannot be written.
    """
    configurations = {_label(changed) or _short(run): item for changed, item in found}
    first = next(iter(configurations.values()))
    title = f"{_short(run)} on {first.gpu}"
    measured = {} if len(found) > 1 else _measured(run, next(iter(configurations)), first)
    text = write_report(configurations, title=title, measured_bytes=measured, notes=notes)
    bars, timeline = (page.with_name(f"{page.stem}-{name}.png") for name in ("bars", "timeline"))
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
        draw_bars(configurations, bars, title=title, measured_bytes=measured)
        draw_timeline(first, timeline, title=f"one training step: {next(iter(configurations))}")
    except OSError as error:
        raise UserError(f"--report {page}: cannot be written: {error.strerror}") from None
    return [page, bars, timeline]


def write_comparison(page: Path, compared: Comparison, run: RunConfig) -> Path:
    """Write what was measured beside what was predicted as a page.

    Raises:
        UserError: It cannot be written.
    """
    pairs = [
        Pair(f"peak {name}", size, compared.measured[name])
        for name, size in compared.predicted.items()
    ]
    for predicted, measured in (
        (compared.predicted_by_component, compared.measured_by_component),
        (compared.predicted_by_phase, compared.measured_by_phase),
    ):
        both = predicted.keys() & measured.keys()
        shown = sorted((n for n in both if measured[n]), key=lambda n: -measured[n])
        pairs += [Pair(name, predicted[name], measured[name]) for name in shown]
    configurations = {} if compared.foresight is None else {_short(run): compared.foresight}
    text = write_report(
        configurations,
        title=f"{_short(run)}: two real steps on {compared.device}",
        pairs=pairs,
        notes=[f"allocated is {compared.what}"],
    )
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--report {page}: cannot be written: {error.strerror}") from None
    return page


def _label(changed: Sequence[str]) -> str:
    """`rank=8 max_seq_len=512`: the sections of the settings go without saying."""
    return " ".join(change[change.partition("=")[0].rfind(".") + 1 :] for change in changed)


def _short(run: RunConfig) -> str:
    """The model's name, without the way to it."""
    path = Path(run.model.source)
    return path.stem if path.suffix == ".json" else path.name or run.model.source


def _measured(run: RunConfig, name: str, first: Foresight) -> Mapping[str, int]:
    """What the run in the run's folder took, if it was on this card."""
    file = Path(run.output.folder).expanduser() / "memory.json"
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if told["device"] == first.gpu and told["measured"]["reserved_bytes"]:
            return {name: int(told["measured"]["reserved_bytes"])}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing was measured here: the page says nothing of it
    return {}
