"""Work on records one by one, where what is wrong with one stays in its place among the results."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from qlora_trainer.data.faults import RowError

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")


def for_each(items: Iterable[A], make: Callable[[A], B]) -> list[B | RowError]:
    """What `make` gives for each item, or the `RowError` it raised."""
    results: list[B | RowError] = []
    for item in items:
        try:
            results.append(make(item))
        except RowError as error:
            results.append(error)
    return results


def encode_each(
    items: Sequence[A | RowError],
    tokenize: Callable[[list[A]], Iterable[B]],
    make: Callable[[A, B], C],
) -> list[C | RowError]:
    """Tokenize all right items in one call, and make examples of each and its tokens.

    Args:
        items: Checked, as `for_each` gives them.
        tokenize: The tokens of many items, in their order.
        make: The examples of one; may raise `RowError`.
    """
    tokens = iter(tokenize([item for item in items if not isinstance(item, RowError)]))

    def examples(item: A | RowError) -> C:
        if isinstance(item, RowError):
            raise item
        return make(item, next(tokens))

    return for_each(items, examples)
