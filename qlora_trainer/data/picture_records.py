"""Records that name a picture and say its label.

{"image": path, "label"}
label: a name, or a number that counts the label names from 0
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_trainer.data.faults import RowError, json_kind
from qlora_trainer.data.formats import rename
from qlora_trainer.errors import UserError

_WAY_OUT = "name the columns, for example `columns: {image: file_name, label: category}`"


def recognise_pictures(
    records: Iterable[Mapping[str, Any]], columns: Mapping[str, str], *, labelled: bool
) -> str:
    """The name of the only format, if there are pictures and labels.

    Raises:
        UserError: A field is nowhere.
    """
    found: dict[str, None] = {}
    for record in records:
        found.update(dict.fromkeys(rename(record, columns)))
    needed = ("image", "label") if labelled else ("image",)
    if missing := [name for name in needed if name not in found]:
        raise UserError(
            f"no {' and no '.join(f'`{name}`' for name in missing)}: the rows have "
            f"{', '.join(found) or 'no fields'}, needed are {' and '.join(needed)}; "
            f"{_WAY_OUT}"
        )
    return "pictures"


def find_labels(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The label names of the training records, in order; faulty records are told elsewhere.

    Raises:
        UserError: There are not at least two.
    """
    names = set()
    for record in records:
        try:
            names.add(label_name(record, None))
        except RowError:
            continue
    if len(names) < 2:
        raise UserError(
            f"data.train: {len(names)} label{'' if len(names) == 1 else 's'} "
            f"({', '.join(names) or 'none'}) where at least two are needed; put the pictures of "
            "each class into a folder of its own, or give every row a `label`"
        )
    numbers = all(name.isdecimal() for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


def label_name(record: Mapping[str, Any], known: Mapping[str, int] | None) -> str:
    """A record's label as a name of `known`; a number counts labels from 0 if it is no name.

    Raises:
        RowError: It is missing, or unknown.
    """
    label = record.get("label")
    if label is None or (isinstance(label, str) and not label.strip()):
        raise RowError("no `label`", f"add it, drop the row, or {_WAY_OUT}", "no label")
    if isinstance(label, bool) or not isinstance(label, str | int):
        problem = f"`label` is {json_kind(label)}, not a name or a number"
        raise RowError(problem, "give one label a picture", "wrong type")
    name = str(label).strip()
    if known is None or name in known:
        return name
    if isinstance(label, int) and 0 <= label < len(known):
        return list(known)[label]
    names = ", ".join(list(known)[:10]) + (", ..." if len(known) > 10 else "")
    raise RowError(
        f"the label {name!r} is not among the labels ({names})",
        "mend it, drop the row, or add it to task_settings.labels",
        "unknown label",
    )


def picture_path(record: Mapping[str, Any]) -> Path:
    """The file a record names.

    Raises:
        RowError: It names none.
    """
    value = record.get("image")
    if value is None or value == "":
        raise RowError("no `image`", f"add it, drop the row, or {_WAY_OUT}", "no image")
    if not isinstance(value, str):
        raise RowError(
            f"`image` is {json_kind(value)}, not the path of a file",
            "save the pictures as PNG or JPEG files and name them",
            "wrong type",
        )
    if value.startswith(("http://", "https://")):
        raise RowError(f"`image` is an address ({value})", "download it, name the file", "address")
    return Path(value).expanduser()
