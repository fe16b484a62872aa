"""Rows as words with their tags: what a row may look like, checked, its tags in IOB2."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_trainer.data.faults import RowError, json_kind
from qlora_trainer.data.formats import rename
from qlora_trainer.data.messages import check_text
from qlora_trainer.data.tags import to_iob2
from qlora_trainer.errors import UserError

FORMAT = "tagged-words"
_WAY_OUT = "name the columns, for example `columns: {tokens: words, tags: ner_tags}`"


@dataclass(frozen=True)
class TaggedWords:
    """Words and their IOB2 tags; no tags where none are asked for."""

    words: list[str]
    tags: list[str]


def recognise_tagged_words(
    records: Iterable[Mapping[str, Any]], columns: Mapping[str, str], *, labelled: bool = True
) -> str:
    """The name of the only format, if its fields are there.

    Raises:
        UserError: They are not.
    """
    found: dict[str, None] = {}
    for record in records:
        found.update(dict.fromkeys(rename(record, columns)))
    if "tokens" in found and ("tags" in found or not labelled):
        return FORMAT
    if list(found) == ["text"]:
        raise UserError(
            "a .txt file is read as plain text, a line a row; a column file (a word and its tag a "
            "line, a blank line between sentences) is read as such under the name .conll"
        )
    needed = "`tokens` and `tags`" if labelled else "`tokens`"
    have = ", ".join(found) or "no fields"
    raise UserError(f"no {needed} in the rows, which have {have}; {_WAY_OUT}")


def to_tagged_words(
    record: Mapping[str, Any],
    *,
    scheme: str = "iob2",
    names: Sequence[str] | None = None,
    labelled: bool = True,
) -> TaggedWords:
    """Check a record and bring its tags to IOB2.

    Args:
        record: Under our field names.
        scheme: One of `tags.SCHEMES`.
        names: What tags that are numbers stand for.
        labelled: Tags must be there; without, none are looked at.

    Raises:
        RowError: A field is missing or of the wrong type, a word is empty, or a tag is none.
    """
    missing = [name for name in ("tokens", "tags")[: 1 + labelled] if record.get(name) is None]
    if missing:
        raise RowError(
            f"missing {', '.join(f'`{name}`' for name in missing)} (the row has "
            f"{', '.join(record) or 'nothing'})",
            f"add it, drop the row, or {_WAY_OUT}",
            "missing " + ",".join(missing),
        )
    words = _as_list(record["tokens"], "tokens")
    if not words:
        raise RowError("`tokens` is empty: a sentence without words", "drop the row", "no words")
    for place, word in enumerate(words, 1):
        if not isinstance(word, str):
            problem = f"word {place} is {json_kind(word)}, not a string"
            raise RowError(problem, "write every word as a string", "word kind")
        check_text(word, f"tokens[{place - 1}]")
        if not word.strip():
            remedy = "drop the word and its tag"
            raise RowError(f"word {place} of {len(words)} is empty", remedy, "empty word")
    if not labelled:
        return TaggedWords(words, [])
    tags = _as_list(record["tags"], "tags")
    if len(tags) != len(words):
        raise RowError(
            f"{len(words)} words but {len(tags)} tags",
            "give every word one tag (`O` outside entities)",
            "lengths differ",
        )
    named = [_named(tag, place, names) for place, tag in enumerate(tags, 1)]
    return TaggedWords(words, to_iob2(named, words, scheme))


def _as_list(value: Any, name: str) -> list[Any]:
    """A list; a string (a CSV cell) is a JSON list or words apart by spaces."""
    if isinstance(value, str):
        if value.lstrip().startswith("[") and value.rstrip().endswith("]") and len(value) > 2:
            try:
                parsed = json.loads(value)
            except (ValueError, RecursionError):
                return value.split()
            return parsed if isinstance(parsed, list) else value.split()
        return value.split()
    if isinstance(value, list):
        return value
    raise RowError(
        f"`{name}` is {json_kind(value)}, not a list",
        'write a list, such as ["Paris", "."], or words apart by spaces',
        f"{name} kind",
    )


def _named(tag: Any, place: int, names: Sequence[str] | None) -> str:
    if isinstance(tag, int) and not isinstance(tag, bool):
        if names is None:
            raise RowError(
                f"the tag of word {place} is the number {tag}, and nothing says what it stands for",
                "write tags as text, or list their names in order in task_settings.labels",
                "number as tag",
            )
        if not 0 <= tag < len(names):
            raise RowError(
                f"the tag of word {place} is {tag}, but task_settings.labels has {len(names)} "
                "names (0 is the first)",
                "mend the tag or the list",
                "tag number",
            )
        return names[tag]
    if not isinstance(tag, str):
        problem = f"the tag of word {place} is {json_kind(tag)}, not a string"
        raise RowError(problem, "write B-TYPE, I-TYPE or O", "tag kind")
    return tag.strip()
