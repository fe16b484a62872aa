"""Foreseeing memory: `qlora profile`."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_trainer.cli.flags import with_setting_flags
from qlora_trainer.cli.options import DOES_NOT_FIT, TIGHT, Overrides
from qlora_trainer.errors import UserError

_CODES = {"fits": 0, "tight": TIGHT, "does not fit": DOES_NOT_FIT}


@with_setting_flags
def profile(
    run_file: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="the run file; or name --model")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="folder, config.json or hub name, with default settings")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="card, such as rtx-3060-12gb; none: the run's own, here")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="memory of the card that is free, such as '7.5 GiB'")
    ] = None,
    overrides: Overrides = None,
    axes: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="SETTING=V,V,...", help="every combination; any number"),
    ] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option(
            "--fit",
            metavar="seq|batch|rank|change|models",
            help="longest sequence, largest micro-batch, highest rank, smallest change that fits, "
            "models that fit; may be given several times",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="OUT.html", help="write a page, and its pictures as PNG")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="processes that make the run together, a card each")
    ] = 1,
    measure: Annotated[
        bool, typer.Option("--measure", help="run two real steps here and compare; needs weights")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Foresee a run's memory from config.json alone, for a card you need not have.

    Leaves with 0 where it fits, 3 where it is tight, 4 where it does not fit; of several, the best.
    """
    if (run_file is None) == (model is None):
        raise UserError("name a run file or --model, one of the two")
    if sum(map(bool, (axes, questions, measure))) > 1:
        raise UserError("--sweep, --fit and --measure are three questions; ask one at a time")
    if report is not None and questions:
        raise UserError("--report draws configurations; give it without --fit")
    if report is not None and report.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--report {report}: name a file ending in .html")
    with _quick_imports(compiler=measure):
        from qlora_trainer.run import foresee
    from qlora_trainer.run.shares import require_passes, require_several

    runs = list(foresee.sweep(run_file, model, overrides or (), axes or ()))
    for _, config in runs:
        require_passes(config, processes)
        require_several(config, 1 if measure else processes, "ask with --processes 2 or more")
    if measure:
        _measure(runs[0][1], report, as_json=as_json)
        return
    from qlora_trainer.run.budget import choose_card

    devices = {config.model.device for _, config in runs}
    if gpu is None and len(devices) > 1:
        raise UserError("--sweep model.device: a table is of one card; name it with --gpu")
    card = choose_card(gpu, budget, processes, device=runs[0][1].model.device)
    if questions:
        verdicts = _fit(runs[0][1], card, questions, as_json=as_json)
    else:
        verdicts = _foresee(runs, card, report, swept=bool(axes), as_json=as_json)
    raise typer.Exit(min((_CODES[verdict] for verdict in verdicts), default=DOES_NOT_FIT))


@contextmanager
def _quick_imports(*, compiler: bool) -> Iterator[None]:
    """Import in two thirds of the time, where nothing heavy has been imported yet.

    The garbage collector would go through all that is new again and again, and find nothing: what
    is imported stays. And bitsandbytes hands two functions to torch's compiler on import, which
    loads all of it; weightless tensors are not computed with, so foresight never calls them.
    """
    if "torch" in sys.modules:
        yield
        return
    if not compiler:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _foresee(
    runs: list[tuple[tuple[str, ...], Any]],
    card: Any,
    report: Path | None,
    *,
    swept: bool,
    as_json: bool,
) -> list[str]:
    from qlora_trainer.cli.show import ConsoleReporter
    from qlora_trainer.cli.show_memory import show_foresight, show_notes, show_sweep
    from qlora_trainer.run.budget import budget_of
    from qlora_trainer.run.foresee_all import foresee_all

    budgets = [budget_of(card, config) for _, config in runs]
    asked = [(config, allowed) for (_, config), allowed in zip(runs, budgets, strict=True)]
    found: list[tuple[tuple[str, ...], Any]] = []
    with ConsoleReporter() as told:
        told.progress("simulating", 0, len(runs))
        for foresight in foresee_all(asked, with_timeline=report is not None):
            found.append((runs[len(found)][0], foresight))
            told.progress("simulating", len(found), len(runs))
    known = (*budgets, *(foresight for _, foresight in found))
    notes = dict.fromkeys(note for each in known for note in each.notes)
    if swept:
        show_sweep(found, as_json=as_json, notes=list(notes))
    else:
        show_foresight(found[0][1], as_json=as_json, notes=list(notes))
    if report is not None:
        from qlora_trainer.run.picture import write_pictures

        written = write_pictures(report, found, runs[0][1], notes=list(notes))
        if not as_json:
            show_notes([f"wrote {path}" for path in written])
    return [foresight.verdict for _, foresight in found]


def _fit(run: Any, card: Any, questions: list[str], *, as_json: bool) -> list[str]:
    from qlora_trainer.cli.show import ConsoleReporter
    from qlora_trainer.cli.show_memory import show_answers
    from qlora_trainer.run.budget import budget_of
    from qlora_trainer.run.fit import solve

    budget = budget_of(card, run)
    with ConsoleReporter() as told:
        answers = solve(run, budget, questions, reporter=told)
    show_answers(answers, budget, as_json=as_json)
    return [a.foresight.verdict for a in answers if a.foresight is not None]


def _measure(run: Any, report: Path | None, *, as_json: bool) -> None:
    from qlora_trainer.cli.show import ConsoleReporter
    from qlora_trainer.cli.show_memory import show_comparison, show_notes
    from qlora_trainer.run.measure import measure_run

    with ConsoleReporter() as told:
        compared = measure_run(run, reporter=told)
    show_comparison(compared, as_json=as_json)
    if report is not None:
        from qlora_trainer.run.picture import write_comparison

        written = write_comparison(report, compared, run)
        if not as_json:
            show_notes([f"wrote {written}"])
