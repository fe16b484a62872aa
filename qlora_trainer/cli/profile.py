"""Foreseeing memory: `qlora profile`."""

from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.cli.options import DOES_NOT_FIT, TIGHT, Overrides
from qlora_trainer.errors import UserError


def profile(
    run_file: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="the run file; or name --model")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="folder, config.json or hub name, with default settings")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="card, such as rtx-3060-12gb; none: the one here")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="memory of the card that is free, such as '7.5 GiB'")
    ] = None,
    overrides: Overrides = None,
    axes: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="SETTING=V,V,...", help="foresee every combination"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Foresee a run's memory from config.json alone, for a card you need not have.

    Leaves with 0 where it fits, 3 where it is tight, 4 where it does not fit.
    """
    if (run_file is None) == (model is None):
        raise UserError("name a run file or --model, one of the two")
    from qlora_trainer.cli.show_memory import show_foresight, show_sweep
    from qlora_trainer.run import foresee

    card, budget_bytes = foresee.choose_gpu(gpu, budget)
    found = [
        (changed, foresee.foresee_run(config, card, budget_bytes=budget_bytes))
        for changed, config in foresee.sweep(run_file, model, overrides or (), axes or ())
    ]
    if axes:
        show_sweep(found, as_json=as_json)
    else:
        show_foresight(found[0][1], as_json=as_json)
    codes = {"fits": 0, "tight": TIGHT, "does not fit": DOES_NOT_FIT}
    raise typer.Exit(min(codes[foresight.verdict] for _, foresight in found))
