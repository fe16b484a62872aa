"""What the data room asks of a task: to make examples of records, and batches of examples.

One encoder stands for one task on one model. It is a pure function of what its `identity` hashes,
so encoded rows can be found again; faults come back per record, so that all can be told at once.

B rows of a batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from qlora_trainer.data.encode import Example
from qlora_trainer.data.faults import RowError

if TYPE_CHECKING:  # a data set is made with an encoder, an encoder reads data sets
    from qlora_trainer.data.dataset import EncodedDataset


@dataclass(frozen=True)
class Findings:
    """A task's part of the gate's report.

    Attributes:
        labels: Each label and its rows, most frequent first.
        facts: Name and value of what else there is to see.
        warnings: What a person should look at, one sentence each.
    """

    labels: list[tuple[str, int]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class RecordEncoder(Protocol):
    """Makes examples of records; all that building a data set asks."""

    @property
    def columns(self) -> Mapping[str, str]:
        """Arrays stored beside a row's tokens: name -> numpy dtype (int32, float32, uint8)."""
        ...

    @property
    def identity(self) -> str:
        """A hash of all that decides what a record becomes."""
        ...

    def recognise(self, records: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
        """Name the format of the first records.

        Args:
            records: As they are in the source.
            columns: Our field name -> the column that holds it.

        Raises:
            UserError: The fields that are needed are not there.
        """
        ...

    def encode_rows(
        self, records: Sequence[Mapping[str, Any]], format: str
    ) -> list[list[Example] | RowError]:
        """For each record (under our field names) its examples, or what is wrong with it."""
        ...


class RowEncoder(RecordEncoder, Protocol):
    """All that a run asks of a task's data."""

    def collate(self, dataset: "EncodedDataset", rows: Sequence[int]) -> dict[str, Tensor]:
        """One micro-batch on the host; dimension 0 of every tensor is the row."""
        ...

    def findings(self, dataset: "EncodedDataset") -> Findings:
        """What to see in these examples."""
        ...

    def pieces(self, dataset: "EncodedDataset", index: int) -> list[tuple[str, bool]]:
        """An example as pieces of text, each with whether it is learned."""
        ...

    def reference(self, dataset: "EncodedDataset", index: int) -> Any:
        """What a prediction for an example is scored against and told with."""
        ...

    def model_settings(self) -> dict[str, Any]:
        """What the model's configuration must say: `num_labels`, `id2label` ..."""
        ...


@runtime_checkable
class Augmenting(Protocol):
    """An encoder that shows a training row a little otherwise in every epoch."""

    def collate_augmented(
        self, dataset: "EncodedDataset", rows: Sequence[int], *, seed: int, epoch: int
    ) -> dict[str, Tensor]:
        """As `RowEncoder.collate`; a pure function of its arguments, so that resuming is exact."""
        ...
