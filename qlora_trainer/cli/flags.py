"""A flag for every setting that can matter to memory, made from the settings' declarations.

`--rank 8` says what `--set adapter.rank=8` says, and goes through the same checks. A setting
declared tomorrow has a flag tomorrow, unless it is listed here as having no say in memory.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from qlora_trainer.config.settings import RunConfig

_NO_SAY = {
    "model.source", "model.revision", "model.chat_template", "model.chat_template_kwargs",
    "adapter.alpha", "adapter.rslora",
    "adapter.alpha_pattern", "data.train", "data.eval", "data.eval_fraction", "data.over_length",
    "data.group_by_length", "data.mega_batch_mult", "data.loss_on", "data.cache_folder",
    "train.epochs", "train.max_steps",
    "train.learning_rate", "train.schedule", "train.warmup_ratio", "train.warmup_steps",
    "train.weight_decay", "train.max_grad_norm", "train.beta1", "train.beta2", "train.epsilon",
    "train.seed", "evaluation.every_steps", "evaluation.max_rows",
    "evaluation.early_stopping_patience", "memory.must_fit", "memory.rehearse",
}  # fmt: skip
_TOO_SHORT = {"dtype"}  # of what? these carry their section's name


def setting_flags() -> dict[str, tuple[str, FieldInfo]]:
    """Flag (without dashes) -> the setting's full name and declaration."""
    flags: dict[str, tuple[str, FieldInfo]] = {}
    for section, field in RunConfig.model_fields.items():
        inner = field.annotation
        if section == "output":
            continue
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            flags[section] = (section, field)
            continue
        for name, setting in inner.model_fields.items():
            if f"{section}.{name}" in _NO_SAY:
                continue
            flag = f"{section}_{name}" if name in _TOO_SHORT or name in flags else name
            flags[flag] = (f"{section}.{name}", setting)
    return flags


def with_setting_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for each setting; they reach it as the first of its `overrides`."""
    flags = setting_flags()

    @functools.wraps(command)
    def told(*, overrides: Sequence[str] | None = None, **given: Any) -> None:
        chosen = {flag: given.pop(flag, None) for flag in flags}
        changes = [
            f"{flags[flag][0]}={_as_yaml(value, flags[flag][1])}"
            for flag, value in chosen.items()
            if value is not None
        ]
        command(overrides=[*changes, *(overrides or ())], **given)

    own = inspect.signature(command, eval_str=True)
    made = [
        inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=_option(flag, name, field),
                          annotation=bool | None if _is_switch(field) else str | None)
        for flag, (name, field) in flags.items()
    ]  # fmt: skip
    kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.parameters.values()]
    told.__signature__ = own.replace(parameters=[*kept, *made])  # type: ignore[attr-defined]
    told.__annotations__ = {p.name: p.annotation for p in (*kept, *made)} | {"return": None}
    return told


class SweepingCommand(TyperCommand):
    """Several axes may follow one `--sweep`: `--sweep a.b=1,2 c.d=3,4`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `--sweep` before each axis that goes without."""
        spread: list[str] = []
        in_sweep = False
        for argument in args:
            if in_sweep and "=" in argument and not argument.startswith("-"):
                if spread[-1] != "--sweep":
                    spread.append("--sweep")
            else:
                in_sweep = argument == "--sweep" or argument.startswith("--sweep=")
            spread.append(argument)
        return super().parse_args(ctx, spread)


def _option(flag: str, name: str, field: FieldInfo) -> Any:
    dashed = flag.replace("_", "-")
    return typer.Option(
        None,
        f"--{dashed}/--no-{dashed}" if _is_switch(field) else f"--{dashed}",
        metavar=None if _is_switch(field) else _metavar(field.annotation),
        help=field.description,
        rich_help_panel=f"Settings: {name.split('.')[0]}",
        show_default=False,
    )


def _is_switch(field: FieldInfo) -> bool:
    return field.annotation is bool


def _metavar(kind: Any) -> str:
    kinds = _branches(kind)
    choices = [str(value) for k in kinds if get_origin(k) is Literal for value in get_args(k)]
    if choices and len(kinds) == 1:
        return "|".join(choices)
    return "NUMBER" if int in kinds or float in kinds else "VALUE"


def _branches(kind: Any) -> list[Any]:
    """The kinds a setting may be of, without notes on them and without None."""
    origin = get_origin(kind)
    if origin is Literal or origin in (list, dict) or isinstance(kind, type):
        return [] if kind is type(None) else [kind]
    inner = get_args(kind) if origin is not None else ()
    if hasattr(kind, "__metadata__"):
        inner = (get_args(kind)[0],)
    return [branch for part in inner for branch in _branches(part)]


def _as_yaml(value: Any, field: FieldInfo) -> str:
    """`q_proj,v_proj` for a setting that takes a list is that list."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    kinds = _branches(field.annotation)
    lists = any(get_origin(kind) is list for kind in kinds)
    only_lists = all(get_origin(kind) is list for kind in kinds)
    if lists and text[:1] not in "[{" and ("," in text or only_lists):
        return f"[{text}]"
    return text
