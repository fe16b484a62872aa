"""Scoring a trained model and asking it about files: `qlora evaluate`, `qlora predict`."""

from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.cli.options import Examples, RunFolder, Template
from qlora_trainer.errors import UserError

Data = Annotated[str | None, typer.Option(metavar="FILE", help="rows as in training, with labels")]


def evaluate(
    run_folder: RunFolder,
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option(help="where to write; RUN_DIR/evaluation unless given")
    ] = None,
    adapter: Annotated[bool, typer.Option(help="score the adapter or the base alone")] = True,
    compare: Annotated[
        str | None,
        typer.Option(metavar="WAYS", help="score answers: zero-shot,few-shot,tuned or some of it"),
    ] = None,
    prompt_template: Template = None,
    examples: Examples = None,
    rows: Annotated[int | None, typer.Option(min=1, help="compare on the first N rows")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer compared")] = 64,
) -> None:
    """Score a trained adapter on a file, or on the run's held-out rows."""
    from qlora_trainer.cli.show import ConsoleReporter, show_compared, show_evaluation

    if compare is None:
        _refuse(
            {"--prompt-template": prompt_template, "--examples": examples, "--rows": rows},
            "goes with --compare",
        )
        from qlora_trainer.run.evaluate import evaluate_run

        with ConsoleReporter() as reporter:
            found = evaluate_run(run_folder, data, out=out, adapter=adapter, reporter=reporter)
        show_evaluation(found)
        return
    if data is None:
        raise UserError("--compare: name the questions with --data FILE")
    from qlora_trainer.run.compare import compare_ways

    with ConsoleReporter() as reporter:
        compared = compare_ways(
            run_folder,
            data,
            [way.strip() for way in compare.split(",") if way.strip()],
            prompt_template=prompt_template,
            examples=examples,
            rows=rows,
            max_new_tokens=max_new_tokens,
            out=out,
            reporter=reporter,
        )
    show_compared(compared)


def _refuse(options: dict[str, object], why: str) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(f"{', '.join(given)}: {why}")


def predict(
    run_folder: RunFolder,
    data: Annotated[str, typer.Option(metavar="FILE", help="rows as in training")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="predictions, a JSON object a line")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace that file")] = False,
    prompt_template: Template = None,
    examples: Examples = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="longest answer of a causal model; 256 unless given")
    ] = None,
) -> None:
    """Write what a trained adapter says of every row of a file."""
    from qlora_trainer.cli.show import ConsoleReporter
    from qlora_trainer.run.evaluate import predict_file

    with ConsoleReporter() as reporter:
        count = predict_file(
            run_folder,
            data,
            out,
            overwrite=overwrite,
            prompt_template=prompt_template,
            examples=examples,
            max_new_tokens=max_new_tokens,
            reporter=reporter,
        )
    typer.echo(f"wrote {count:,} predictions to {out}")
