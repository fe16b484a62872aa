"""Labels as a model's configuration knows them."""

from collections.abc import Sequence
from typing import Any


def label_settings(names: Sequence[str]) -> dict[str, Any]:
    """What a configuration says of labels, given in the order of the head's outputs."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
