"""Tags of words: schemes brought to IOB2, labels, and the entities that tags mark.

IOB2 (also called BIO) is what is trained and scored: `B-TYPE` begins an entity, `I-TYPE` goes on
with it, `O` is outside. Two other schemes say the same with other letters and are converted when
the run file names them: IOB1 (Ramshaw and Marcus, 1995: `B-` only where two entities of one type
touch) and BIOES (also BILOU: `E-`/`L-` ends an entity, `S-`/`U-` is one word). The scheme is never
guessed: an `I-` without its `B-` is right in IOB1 and a fault in IOB2.
"""

from collections.abc import Iterable, Sequence

from qlora_trainer.data.faults import RowError
from qlora_trainer.errors import UserError

OUTSIDE = "O"
SCHEMES = ("iob2", "iob1", "bioes")


def split_tag(tag: str) -> tuple[str, str]:
    """Prefix and entity type; `O` has none.

    >>> split_tag("B-geo-loc")
    ('B', 'geo-loc')
    """
    prefix, _, kind = tag.partition("-")
    return prefix, kind


_LETTERS = {"iob2": "BI", "iob1": "BI", "bioes": "BIESLU"}
_ENDS = "ESLU"


def to_iob2(tags: Sequence[str], words: Sequence[str], scheme: str) -> list[str]:
    """Tags of one sentence in IOB2.

    Args:
        tags: In the given scheme.
        words: Told in errors.
        scheme: One of `SCHEMES`.

    Raises:
        RowError: A tag is no tag of the scheme, or does not follow from the one before.

    >>> to_iob2(["I-LOC", "O", "I-PER", "B-PER"], "abcd", "iob1")
    ['B-LOC', 'O', 'B-PER', 'B-PER']
    """
    converted: list[str] = []
    open_type: str | None = None  # of an entity that the next word may go on with
    for place, tag in enumerate(tags):
        said = f"tag {tag!r} of word {place + 1} ({words[place]!r})"
        prefix, kind = split_tag(tag)
        if tag == OUTSIDE:
            must_end = scheme == "bioes" and open_type is not None
        elif prefix in _LETTERS[scheme] and len(prefix) == 1 and kind:
            must_end = scheme == "bioes" and open_type is not None and prefix in "BSU"
        else:
            raise _no_tag(said, prefix, kind, scheme)
        if must_end:
            remedy = "end it with E- (or L-), or name another task_settings.tag_scheme"
            raise RowError(f"{said} leaves the entity before it without an end", remedy, "no end")
        begins = tag != OUTSIDE and prefix in "BSU"
        if tag != OUTSIDE and not begins and open_type != kind:
            if scheme != "iob1":
                raise _no_beginning(said, kind, scheme)
            begins = True
        converted.append(OUTSIDE if tag == OUTSIDE else f"{'B' if begins else 'I'}-{kind}")
        open_type = None if tag == OUTSIDE or (scheme == "bioes" and prefix in _ENDS) else kind
    if scheme == "bioes" and open_type is not None:
        problem = f"the last entity ({open_type}) has no end"
        raise RowError(problem, "end it with E- (or L-), or S- if it is one word", "no end")
    return converted


def _no_tag(said: str, prefix: str, kind: str, scheme: str) -> RowError:
    if kind and len(prefix) == 1 and prefix in _ENDS:
        remedy = "set task_settings.tag_scheme: bioes, which is converted"
        return RowError(f"{said} is of the BIOES scheme", remedy, "BIOES")
    letters = ", ".join(f"{letter}-TYPE" for letter in _LETTERS[scheme])
    remedy = f"tags are O, {letters} (task_settings.tag_scheme = {scheme}); mend the tag"
    return RowError(f"{said} is of no known scheme", remedy, "unknown tag")


def _no_beginning(said: str, kind: str, scheme: str) -> RowError:
    remedy = f"begin the entity with B-{kind}"
    if scheme == "iob2":
        remedy += ", or, if all the data is written so, set task_settings.tag_scheme: iob1"
    return RowError(
        f"{said} goes on with an entity that no B-{kind} began", remedy, "I- without B-"
    )


def label_names(tags: Iterable[str]) -> list[str]:
    """Every label that these tags need: O, then B and I of each type by name.

    An entity of two words may first be met in evaluation, so a type always has both.

    >>> label_names(["O", "B-PER", "I-PER", "B-LOC"])
    ['O', 'B-LOC', 'I-LOC', 'B-PER', 'I-PER']
    """
    kinds = sorted({split_tag(tag)[1] for tag in tags if tag != OUTSIDE})
    return [OUTSIDE, *(f"{letter}-{kind}" for kind in kinds for letter in "BI")]


def entity_spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Entities of a sentence as (type, first word, end), as strict IOB2 has them.

    An `I-` that goes on with nothing (as a model may predict) belongs to no entity.

    >>> entity_spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "B-LOC"])
    [('PER', 0, 2), ('LOC', 4, 5), ('LOC', 5, 6)]
    """
    spans: list[tuple[str, int, int]] = []
    begun: tuple[str, int] | None = None
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, kind = split_tag(tag)
        if begun is not None and (prefix != "I" or kind != begun[0]):
            spans.append((begun[0], begun[1], place))
            begun = None
        if prefix == "B":
            begun = (kind, place)
    return spans


def check_labels(labels: Sequence[str]) -> list[str]:
    """Tags in order; entity types are given their tags.

    Raises:
        UserError: A name is no tag though `O` is among them, or a type has no `B-`.
    """
    if OUTSIDE not in labels:
        return label_names(f"B-{kind}" for kind in labels)
    wrong = [
        name for name in labels if name != OUTSIDE and not (name[:2] in ("B-", "I-") and name[2:])
    ]
    if not wrong:
        wrong = [name for name in labels if name[:2] == "I-" and f"B-{name[2:]}" not in labels]
    if wrong:
        raise UserError(
            f"task_settings.labels: {', '.join(wrong)}: list tags (O, and B-TYPE and I-TYPE of "
            "every type), or just the entity types"
        )
    return list(labels)


def entity_types(labels: Sequence[str]) -> list[str]:
    """The types these labels tell apart, in their order."""
    return list(dict.fromkeys(split_tag(name)[1] for name in labels if name != OUTSIDE))
