"""Asking a trained model: `qlora generate`."""

import sys
from typing import Annotated

import typer

from qlora_trainer.cli.options import Examples, RunFolder, Template
from qlora_trainer.errors import UserError


def generate(
    run_folder: RunFolder,
    prompts: Annotated[list[str] | None, typer.Argument(help="prompts; none: read lines")] = None,
    adapter: Annotated[bool, typer.Option(help="answer with the adapter or the base alone")] = True,
    compare: Annotated[bool, typer.Option("--compare", help="answer with both")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.0,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    prompt_template: Template = None,
    examples: Examples = None,
) -> None:
    """Answer prompts with a trained adapter."""
    from qlora_trainer.cli.show import ConsoleReporter, err, show_answer

    if not run_folder.is_dir():
        raise UserError(f"{run_folder}: no such run folder")
    if not prompts and sys.stdin.isatty():
        err.print("Type prompts, one a line; Ctrl-D (Windows: Ctrl-Z, Enter) ends them.")
    given = prompts or [line.strip() for line in sys.stdin if line.strip()]
    if not given:
        raise UserError("no prompt given: name one, or write one per line on standard input")
    from qlora_trainer.run import ask
    from qlora_trainer.run.prompts import prompts_of

    with ConsoleReporter() as reporter:
        trained = ask.load_trained(run_folder, reporter=reporter, prompted=True)
    asked = prompts_of(trained, given, prompt_template, examples)
    sides = (True, False) if compare else (adapter,)
    for side in sides:
        answers = ask.generate(
            trained,
            asked,
            adapter=side,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            system=system,
            seed=seed,
        )
        for prompt, answer in zip(given, answers, strict=True):
            show_answer(prompt, answer, side if compare else None)
