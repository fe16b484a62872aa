"""The command line: each command parses, calls one function of `run`, prints.

Rooms that need torch are imported inside the commands, so `qlora --help`, `qlora init` and a
fault in a run file answer at once.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.errors import UserError

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not done, the same command goes on

TIGHT, DOES_NOT_FIT = 3, 4

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune models in 4 bit on one GPU: foreseen before, exact throughout, proven after.",
)


class ExportFormat(StrEnum):
    """What `qlora export` writes."""

    merged = "merged"
    adapter = "adapter"
    gguf = "gguf"


class ExportDtype(StrEnum):
    """Precision of a merged checkpoint."""

    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


class Onto(StrEnum):
    """Weights an adapter is merged onto."""

    original = "original"
    dequantized = "dequantized"
    best = "best"


class GgufType(StrEnum):
    """Types of GGUF files."""

    f16 = "f16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="the run file")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="a run folder")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.SETTING=VALUE", help="change a setting of the run file"),
]


def main() -> None:
    """Run the command line; a user's fault is one readable message and exit code 2."""
    try:
        app()
    except UserError as error:
        from qlora_trainer.cli.show import show_error

        show_error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has left
        sys.stderr.close()
        sys.exit(141)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="file to write")] = Path(
        "run.yaml"
    ),
    model: Annotated[str, typer.Option(help="local folder or hub name")] = "path/to/model",
    data: Annotated[str, typer.Option(help="training data")] = "path/to/train.jsonl",
) -> None:
    """Write a commented run file with every setting and its default."""
    from qlora_trainer.config.document import commented_run_file

    if path.exists():
        raise UserError(f"{path}: exists already; name another file or remove it first")
    text = commented_run_file({("model", "source"): model, ("data", "train"): data})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    typer.echo(f"wrote {path}; next: qlora check {path}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of run files."""
    from qlora_trainer.config.document import json_schema

    typer.echo(json_schema())


@app.command()
def check(run_file: RunFile, overrides: Overrides = None) -> None:
    """Check a run file and its data: what is trained, what is cut, what is wrong."""
    from qlora_trainer.cli.show import ConsoleReporter
    from qlora_trainer.config.read import read_run_file

    config = read_run_file(run_file, overrides or ())
    from qlora_trainer.run.check import check as check_data

    with ConsoleReporter() as reporter:
        reporter.gate(check_data(config, reporter=reporter))


@app.command()
def audit(run_file: RunFile, overrides: Overrides = None) -> None:
    """Load the base and print its bytes by role and dtype, and what stayed unquantized and why."""
    from qlora_trainer.cli.show import ConsoleReporter
    from qlora_trainer.config.read import read_run_file

    config = read_run_file(run_file, overrides or ())
    from qlora_trainer.run.check import audit as audit_base

    with ConsoleReporter() as reporter:
        reporter.audit(audit_base(config, reporter=reporter))


@app.command()
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="discard what the run folder holds and start anew")
    ] = False,
) -> None:
    """Train an adapter; an unfinished run in the same folder is resumed exactly."""
    from qlora_trainer.cli.show import ConsoleReporter
    from qlora_trainer.config.read import read_run_file

    config = read_run_file(run_file, overrides or ())
    from qlora_trainer.run.train import train as train_adapter

    with ConsoleReporter() as reporter:
        result = train_adapter(config, restart=restart, reporter=reporter)
        reporter.show_result(result)
    if not result.outcome.complete:
        raise typer.Exit(STOPPED)  # so that what follows in a script does not take it for done


@app.command()
def generate(
    run_folder: RunFolder,
    prompts: Annotated[list[str] | None, typer.Argument(help="prompts; none: read lines")] = None,
    adapter: Annotated[bool, typer.Option(help="answer with the adapter or the base alone")] = True,
    compare: Annotated[bool, typer.Option("--compare", help="answer with both")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.0,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
) -> None:
    """Answer prompts with a trained adapter."""
    from qlora_trainer.cli.show import show_answer

    if not run_folder.is_dir():
        raise UserError(f"{run_folder}: no such run folder")
    given = prompts or [line.strip() for line in sys.stdin if line.strip()]
    if not given:
        raise UserError("no prompt given: name one, or write one per line on standard input")
    from qlora_trainer.run import ask

    trained = ask.load_trained(run_folder)
    sides = (True, False) if compare else (adapter,)
    for side in sides:
        answers = ask.generate(
            trained,
            given,
            adapter=side,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            system=system,
            seed=seed,
        )
        for prompt, answer in zip(given, answers, strict=True):
            show_answer(prompt, answer, side if compare else None)


@app.command()
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


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="run or PEFT adapter folder")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    format: Annotated[ExportFormat, typer.Option(help="what to write")] = ExportFormat.merged,
    dtype: Annotated[ExportDtype, typer.Option(help="of the merged weights")] = ExportDtype.fp16,
    onto: Annotated[Onto, typer.Option(help="weights to merge onto; best tries both")] = Onto.best,
    gguf_type: Annotated[GgufType, typer.Option(help="of a GGUF file")] = GgufType.f16,
    base: Annotated[str | None, typer.Option(help="base of a bare adapter folder")] = None,
    proof: Annotated[bool, typer.Option(help="compare the export in a fresh process")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a folder")] = False,
) -> None:
    """Export a merged checkpoint, the adapter or a GGUF file, proven against base + adapter."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    from qlora_trainer.cli.show import ConsoleReporter
    from qlora_trainer.cli.show_export import show_export
    from qlora_trainer.run.export import export_run

    with ConsoleReporter() as reporter:
        exported = export_run(
            folder,
            out,
            format=format.value,
            dtype=dtype.value,
            onto=onto.value,
            gguf_type=gguf_type.value,
            base=base,
            prove=proof,
            overwrite=overwrite,
            reporter=reporter,
        )
    show_export(exported)


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(help="where runs are written")] = Path("."),
) -> None:
    """Look at driver, CUDA, bitsandbytes, dtypes, RAM and disk, and say what to do."""
    from qlora_trainer.cli.show import show_findings
    from qlora_trainer.run.check import doctor as diagnose

    if show_findings(diagnose(folder)):
        raise typer.Exit(1)
