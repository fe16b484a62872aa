"""The command line: each command parses, calls one function of `run`, prints.

Rooms that need torch are imported inside the commands, so `qlora --help`, `qlora init` and a
fault in a run file answer at once.
"""

import mmap
import sys
from pathlib import Path
from typing import Annotated

import typer

from qlora_trainer.cli import ask, evaluate, export, profile
from qlora_trainer.cli.flags import SweepingCommand
from qlora_trainer.cli.options import STOPPED, Overrides, RunFile
from qlora_trainer.config.tasks import TaskName
from qlora_trainer.errors import ToldElsewhereError, UserError

# How torch, oneDNN and Python say it as a RuntimeError; the last two for other reasons, too.
_NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "std::bad_alloc")
_PERHAPS_NO_MEMORY = ("could not create a primitive", "can't start new thread")
_OF_THE_CARD = ("OutOfMemoryError", "AcceleratorError")
_PROBED_BYTES = 2**26
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune models in 4 bit on one GPU: foreseen before, exact throughout, proven after.",
)


def main() -> None:
    """Run the command line; a user's fault is one readable message and exit code 2."""
    try:
        app()
    except ToldElsewhereError:
        sys.exit(2)
    except UserError as error:
        from qlora_trainer.cli.show import show_error

        show_error(str(error))
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        said = _said_of_memory(error)
        if said is None:
            raise
        from qlora_trainer.cli.show import show_error

        show_error(said)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has left
        sys.stderr.close()
        sys.exit(141)


def _said_of_memory(error: MemoryError | RuntimeError) -> str | None:
    """What to tell where the card or the system has refused memory; None where neither has."""
    # Both are torch's, which may not even be imported yet.
    if type(error).__name__ in _OF_THE_CARD and "out of memory" in str(error):
        first = str(error).splitlines()[0].split(". ")[0]
        return (
            f"the card gives this process no more memory ({first}); what was saved stands. Close "
            "what else uses the card (`nvidia-smi`), ask `qlora profile` what fits it, or set "
            "model.stream_layers: true; then run the same command again"
        )
    if _is_no_memory(error):
        return (
            "the system gives this process no more memory; what was saved stands. Close other "
            "programs, raise the limit (ulimit -v), or lower train.micro_batch_size or "
            "data.max_seq_len; then run the same command again"
        )
    return None


def _is_no_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether the system has refused memory."""
    said = str(error)
    if isinstance(error, MemoryError) or any(words in said for words in _NO_MEMORY):
        return True
    if not any(words in said for words in _PERHAPS_NO_MEMORY):
        return False
    try:
        mmap.mmap(-1, _PROBED_BYTES).close()
    except (OSError, MemoryError):
        return True
    return False


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="file to write")] = Path(
        "run.yaml"
    ),
    model: Annotated[str, typer.Option(help="local folder or hub name")] = "path/to/model",
    data: Annotated[str, typer.Option(help="training data")] = "path/to/train.jsonl",
    task: Annotated[TaskName, typer.Option(help="what is learned")] = "causal-lm",
) -> None:
    """Write a commented run file with every setting and its default."""
    from qlora_trainer.config.document import commented_run_file

    if path.exists():
        raise UserError(f"{path}: exists already; name another file or remove it first")
    chosen = {("model", "source"): model, ("data", "train"): data}
    text = commented_run_file(chosen, task=task)
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
    """Check a run file and its data: what is trained, what is cut, what servers cannot do."""
    from qlora_trainer.cli.show import ConsoleReporter
    from qlora_trainer.config.read import read_run_file

    config = read_run_file(run_file, overrides or ())
    from qlora_trainer.cli.show_export import show_serving
    from qlora_trainer.run.check import check as check_data
    from qlora_trainer.run.check import serving

    with ConsoleReporter() as reporter:
        reporter.gate(check_data(config, reporter=reporter))
    show_serving(serving(config))


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
        if result.is_main:
            reporter.show_result(result)
    if not result.outcome.complete:
        raise typer.Exit(STOPPED)  # so that what follows in a script does not take it for done


app.command()(ask.generate)
app.command()(evaluate.evaluate)
app.command()(evaluate.predict)
app.command(cls=SweepingCommand)(profile.profile)
app.command()(export.export)
app.command()(export.merge_adapters)


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(help="where runs are written")] = Path("."),
) -> None:
    """Look at driver, CUDA, bitsandbytes, dtypes, RAM and disk, and say what to do."""
    from qlora_trainer.cli.show import show_findings
    from qlora_trainer.run.check import doctor as diagnose

    if show_findings(diagnose(folder)):
        raise typer.Exit(1)
