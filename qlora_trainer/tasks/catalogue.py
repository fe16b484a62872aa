"""Every task this product trains, by its name in the run file."""

from qlora_trainer.errors import UserError
from qlora_trainer.tasks import (
    causal_lm,
    image_classification,
    question_answering,
    seq2seq_lm,
    sequence_classification,
    token_classification,
)
from qlora_trainer.tasks.kind import TaskKind

TASKS: dict[str, TaskKind] = {
    kind.name: kind
    for kind in (
        causal_lm.KIND,
        seq2seq_lm.KIND,
        sequence_classification.KIND,
        token_classification.KIND,
        question_answering.KIND,
        image_classification.KIND,
    )
}  # fmt: skip


def task_kind(name: str) -> TaskKind:
    """Find a task.

    Raises:
        UserError: There is none of this name.
    """
    if name not in TASKS:
        raise UserError(f"task = {name!r}: is not there yet; there are {', '.join(TASKS)}")
    return TASKS[name]
