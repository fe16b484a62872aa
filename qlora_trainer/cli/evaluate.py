"""Scoring a trained model and asking it about files: `qlora evaluate`, `qlora predict`."""

from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.cli.options import RunFolder

Data = Annotated[str | None, typer.Option(metavar="FILE", help="rows as in training, with labels")]


def evaluate(
    run_folder: RunFolder,
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option(help="where to write; RUN_DIR/evaluation unless given")
    ] = None,
    adapter: Annotated[bool, typer.Option(help="score the adapter or the base alone")] = True,
) -> None:
    """Score a trained adapter on a file, or on the run's held-out rows."""
    from qlora_trainer.cli.show import ConsoleReporter, show_evaluation
    from qlora_trainer.run.evaluate import evaluate_run

    with ConsoleReporter() as reporter:
        found = evaluate_run(run_folder, data, out=out, adapter=adapter, reporter=reporter)
    show_evaluation(found)


def predict(
    run_folder: RunFolder,
    data: Annotated[str, typer.Option(metavar="FILE", help="rows as in training")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="predictions, a JSON object a line")],
) -> None:
    """Write what a trained adapter says of every row of a file."""
    from qlora_trainer.cli.show import ConsoleReporter
    from qlora_trainer.run.evaluate import predict_file

    with ConsoleReporter() as reporter:
        count = predict_file(run_folder, data, out, reporter=reporter)
    typer.echo(f"wrote {count:,} predictions to {out}")
