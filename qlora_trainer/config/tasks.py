"""What is learned: the names of the tasks, and the settings that only some of them know.

A setting says which tasks know it where it is declared; given under another task it is refused.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from qlora_trainer.config.kinds import Text, without_doubles
from qlora_trainer.config.section import Settings

TaskName = Literal[
    "causal-lm",
    "seq2seq-lm",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "image-classification",
]


def _for(*tasks: TaskName) -> Any:
    return {"tasks": list(tasks)}


def tasks_of(setting: str) -> tuple[str, ...]:
    """The tasks that know a setting of this section."""
    extra: Any = TaskSettings.model_fields[setting].json_schema_extra
    return tuple(extra["tasks"])


class TaskSettings(Settings):
    """Settings of single tasks."""

    labels: Annotated[list[Text], Field(min_length=1), AfterValidator(without_doubles)] | None = (
        Field(
            None,
            description="label names in order; null: found in the training data",
            json_schema_extra=_for(
                "sequence-classification", "token-classification", "image-classification"
            ),
        )
    )
    problem: Literal["auto", "single", "multi", "regression"] = Field(
        "auto",
        description="one label a row, any number of labels, or a number; auto: as the rows say",
        json_schema_extra=_for("sequence-classification"),
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="balanced: rare labels count more in the loss, as their share is smaller",
        json_schema_extra=_for(
            "sequence-classification", "token-classification", "image-classification"
        ),
    )
    tag_scheme: Literal["iob2", "iob1", "bioes"] = Field(
        "iob2",
        description="how tags of the data mark entities; iob1 and bioes are converted to iob2",
        json_schema_extra=_for("token-classification"),
    )
    stride: int = Field(
        128,
        ge=0,
        description="tokens that windows of a long text share",
        json_schema_extra=_for("token-classification", "question-answering"),
    )
    max_answer_len: int = Field(
        30,
        ge=1,
        description="longest answer that is looked for, in tokens",
        json_schema_extra=_for("question-answering"),
    )
    null_threshold: float = Field(
        0.0,
        description="no answer is said where it scores more than this above the best span",
        json_schema_extra=_for("question-answering"),
    )
    prefix: str = Field(
        "",
        description="put before every source text, such as 'translate English to German: '",
        json_schema_extra=_for("seq2seq-lm"),
    )
    max_target_len: int = Field(
        128,
        ge=2,
        description="longest target, in tokens",
        json_schema_extra=_for("seq2seq-lm"),
    )
    num_beams: int = Field(
        1,
        ge=1,
        le=64,
        description="beams of the search when texts are generated; 1 is greedy",
        json_schema_extra=_for("seq2seq-lm"),
    )
    augment: Literal["none", "light"] = Field(
        "none",
        description="light: flip and crop training pictures a little, otherwise in every epoch",
        json_schema_extra=_for("image-classification"),
    )
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = Field(
        None,
        description="pixels of a side; null: as the model's image processor says",
        json_schema_extra=_for("image-classification"),
    )
