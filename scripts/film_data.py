"""Human-rated film snippets as a chat task: is this review positive or negative?

The source is the movie part of the data published with VADER (Hutto and Gilbert, ICWSM 2014), MIT:
10,605 snippets of film reviews, each rated by twenty people from -4 to 4. We keep those with a
clear rating, at least 0.5 away from zero; the sign is the label. A snippet's place in the order,
and so its split, is the hash of its text: nothing random, and no snippet in both splits however
it is spaced or capitalised. Standard library only.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWERS = ("negative", "positive")
SYSTEM = "You judge film reviews."
QUESTION = "Is this review positive or negative? Answer with one word.\n\nReview: {text}"
CLEAR_RATING = 0.5


@dataclass(frozen=True)
class Snippet:
    """One rated sentence or two; `rating` is the mean of twenty people, -4 to 4."""

    text: str
    rating: float

    @property
    def answer(self) -> str:
        """The label as the word the model must say."""
        return ANSWERS[self.rating > 0]

    @property
    def key(self) -> str:
        """Two spellings of one snippet share it."""
        return " ".join(self.text.lower().split())


def read_snippets(sdist: Path) -> list[Snippet]:
    """Read the rated snippets out of the source package of vaderSentiment 3.3.2."""
    with tarfile.open(sdist) as outer:
        inner = outer.extractfile(_only(outer, "/hutto_ICWSM_2014.tar.gz"))
        assert inner is not None  # a regular file, as `_only` looked up
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            table = archive.extractfile(_only(archive, "/movieReviewSnippets_GroundTruth.txt"))
            assert table is not None
            text = table.read().decode("utf-8", "replace")
    snippets = []
    for line in text.splitlines():
        _, rating, snippet = line.split("\t", 2)
        snippets.append(Snippet(snippet.strip(), float(rating)))
    return snippets


def split_snippets(
    snippets: Iterable[Snippet], *, held_out_per_answer: int
) -> tuple[list[Snippet], list[Snippet]]:
    """Keep the clear ones, drop repetitions, split; both splits are balanced and shuffled by hash.

    Returns:
        The training snippets and the held-out ones, `held_out_per_answer` of each answer.
    """
    clear: dict[str, Snippet] = {}
    for snippet in snippets:
        readable = "\ufffd" not in snippet.text
        if abs(snippet.rating) >= CLEAR_RATING and snippet.text and readable:
            clear.setdefault(snippet.key, snippet)
    ordered = sorted(clear.values(), key=lambda snippet: _hash(snippet.key))
    train: list[Snippet] = []
    held_out: list[Snippet] = []
    groups = [[s for s in ordered if s.answer == answer] for answer in ANSWERS]
    kept = min(len(group) for group in groups)
    for group in groups:
        held_out += group[:held_out_per_answer]
        train += group[held_out_per_answer:kept]
    return (
        sorted(train, key=lambda snippet: _hash(snippet.key)),
        sorted(held_out, key=lambda snippet: _hash(snippet.key)),
    )


def question_messages(text: str) -> list[dict[str, str]]:
    """The chat up to the model's turn."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": QUESTION.format(text=text)},
    ]


def as_record(snippet: Snippet) -> dict[str, Any]:
    """One row of the JSONL file."""
    answer = {"role": "assistant", "content": snippet.answer}
    return {"messages": [*question_messages(snippet.text), answer]}


def _only(archive: tarfile.TarFile, ending: str) -> tarfile.TarInfo:
    """The one member with this ending; macOS's `._` shadow files are none."""
    (member,) = (
        member
        for member in archive.getmembers()
        if member.isfile()
        and member.name.endswith(ending)
        and not member.name.rsplit("/", 1)[-1].startswith("._")
    )
    return member


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8")).hexdigest()
