"""Arguments and exit codes that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not done, the same command goes on
TIGHT, DOES_NOT_FIT = 3, 4

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="the run file")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="a run folder")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.SETTING=VALUE", help="change a setting of the run file"),
]
Template = Annotated[
    str | None, typer.Option(help="text or file with {prompt}, put around each prompt")
]
Examples = Annotated[
    str | None, typer.Option(metavar="FILE", help="questions and answers shown before each prompt")
]
