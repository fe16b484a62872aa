"""Records of texts with what is said about them: one label, any number of labels, or a number.

    {"text", "label"}                 {"text", "text_pair", "label"}
    label: a name, a class number (counting the label names from 0), a list of either, a number

Which of the three problems it is, the run file says, or all training records together do: lists
make it `multi`, fractions `regression`, everything else `single`. A row that does not fit raises
`RowError`.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora_trainer.data.faults import RowError, json_kind
from qlora_trainer.data.formats import rename
from qlora_trainer.data.messages import check_text
from qlora_trainer.errors import UserError

Problem = Literal["single", "multi", "regression"]
_HIGHEST_CLASS = 100_000  # beyond, it is an identity or a measurement
_NUMBER = re.compile("[0-9]{1,9}")
_MOST_LABELS = 1000  # more than these are no classes but texts or numbers
_WAY_OUT = "name the columns, for example `columns: {text: review, label: stars}`"


@dataclass(frozen=True)
class LabelledText:
    """One record, checked; `label` as in the record, None where nothing is asked of it."""

    text: str
    pair: str | None
    label: Any


def recognise_labelled_texts(
    records: Iterable[Mapping[str, Any]], columns: Mapping[str, str], *, labelled: bool
) -> str:
    """Name the format of the first records: `text` or `text-pair`.

    Raises:
        UserError: The fields that are needed are not there.
    """
    found: dict[str, None] = {}
    for record in records:
        found.update(dict.fromkeys(rename(record, columns)))
    needed = ("text", "label") if labelled else ("text",)
    missing = [name for name in needed if name not in found]
    if missing:
        raise UserError(
            f"the rows have {', '.join(found) or 'no fields'}; needed are {', '.join(needed)} "
            f"(and text_pair for pairs), {', '.join(missing)} not found. {_WAY_OUT}"
        )
    return "text-pair" if "text_pair" in found else "text"


def check_record(record: Mapping[str, Any], *, labelled: bool) -> LabelledText:
    """The texts and the label of a record.

    Raises:
        RowError: A text is missing, empty or no text, or there is no label.
    """
    texts: list[str | None] = []
    for name in ("text", "text_pair"):
        value = record.get(name)
        if value is None and name == "text_pair":
            texts.append(None)
            continue
        if value is None:
            have = ", ".join(record) or "nothing"
            remedy = f"add it, drop the row, or {_WAY_OUT}"
            raise RowError(f"missing `text` (the row has {have})", remedy, "missing text")
        text = check_text(value, name)
        if not text.strip():
            raise RowError(f"`{name}` is empty", "write a text or drop the row", f"empty {name}")
        texts.append(text)
    label = record.get("label")
    if labelled and label is None:
        remedy = f"label the row, drop it, or {_WAY_OUT}"
        raise RowError("missing `label`", remedy, "missing label")
    assert texts[0] is not None
    return LabelledText(texts[0], texts[1], label if labelled else None)


def find_problem(records: Iterable[Mapping[str, Any]]) -> tuple[Problem, list[str]]:
    """The problem that all training labels together make, and the label names they need.

    Names are in order of the alphabet, class numbers in their own.

    Raises:
        UserError: There is no label at all, or there are too many to be classes.
    """
    lists, numbers, seen = False, False, dict[str | int, None]()
    for record in records:
        label = record.get("label")
        lists = lists or isinstance(label, list)
        numbers = numbers or isinstance(label, float)
        if len(seen) <= _MOST_LABELS:
            items = label if isinstance(label, list) else [label]
            seen.update(dict.fromkeys(map(_key, filter(_is_name, items))))
    if numbers and not lists:
        return "regression", []
    if not seen:
        raise UserError(
            f"data.train: no row says a label, so there is nothing to learn; {_WAY_OUT}"
        )
    if len(seen) > _MOST_LABELS:
        raise UserError(
            f"data.train: more than {_MOST_LABELS} different labels; for numbers set "
            "task_settings.problem: regression, for classes list them in task_settings.labels"
        )
    if all(isinstance(item, int) for item in seen):
        highest = max(int(item) for item in seen)
        if highest >= _HIGHEST_CLASS:
            raise UserError(
                f"data.train: class number {highest}: classes are counted from 0, so a head would "
                "have that many; for numbers set task_settings.problem: regression, for classes "
                "list them in task_settings.labels"
            )
        names = [str(number) for number in range(highest + 1)]
    else:
        names = sorted(map(str, seen))
    return ("multi" if lists else "single"), names


def _is_name(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and bool(value.strip()))


def _key(value: str | int) -> str | int:
    return int(value) if isinstance(value, int) else value  # true and 1 are one class


def label_values(label: Any, problem: Problem, names: Sequence[str]) -> list[float]:
    """What is learned of a label: [class], (K,) of 0 and 1, or [number].

    Raises:
        RowError: It is no label of this problem.
    """
    if problem == "regression":
        return [_number(label)]
    if problem == "single":
        return [float(_class(label, names))]
    if not isinstance(label, list):
        remedy = 'write a list such as ["a", "b"] or []; task_settings.problem: single for one'
        raise RowError(f"`label` is {json_kind(label)}, not a list", remedy, "no list")
    values = [0.0] * len(names)
    for item in label:
        place = _class(item, names)
        if values[place]:
            raise RowError(f"label {item!r} stands twice", "name it once", "doubled label")
        values[place] = 1.0
    return values


def _number(label: Any) -> float:
    try:
        value = float(label) if isinstance(label, (int, float, str)) else math.nan
    except (ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value) or isinstance(label, bool):
        remedy = "write a number, or set task_settings.problem: single for classes"
        raise RowError(f"label {label!r} is not a finite number", remedy, "not a number")
    return value


def _class(label: Any, names: Sequence[str]) -> int:
    if isinstance(label, list):
        remedy = "name one label, or set task_settings.problem: multi"
        raise RowError("`label` is a list", remedy, "label is a list")
    if isinstance(label, int):
        if 0 <= label < len(names):
            return int(label)
        remedy = f"classes are 0 to {len(names) - 1}: {_shown(names)}"
        raise RowError(f"class {label} is none of {len(names)}", remedy, "unknown class")
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, str) and _NUMBER.fullmatch(label) and int(label) < len(names):
        return int(label)  # from a table of text, such as CSV
    if not isinstance(label, str):
        remedy = "write its name or class number; for numbers set task_settings.problem: regression"
        raise RowError(f"`label` is {json_kind(label)}", remedy, "no label")
    remedy = f"mend it, drop the row, or add it to task_settings.labels: {_shown(names)}"
    raise RowError(f"label {label!r} is not among the labels", remedy, "unknown label")


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
