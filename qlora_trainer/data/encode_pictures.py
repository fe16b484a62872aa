"""Pictures with labels: rows keep the file's path and the label; pixels are read for each batch.

    image              {"image": path, "label"}   JSONL, CSV or Parquet; a relative path starts at
                                                  the folder of the file that names it
    folder of folders  DIR/cat/1.png, DIR/dog/2.jpg: the innermost folder is the label

Every picture is decoded once when rows are encoded, so that one that does not open is refused with
its file and row before anything heavy starts, and the hash of its bytes tells copies. Sizes and
colours are the business of the model's own image processor.

    B rows, C channels, H height, W width
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from qlora_trainer.data.dataset import EncodedDataset
from qlora_trainer.data.each import for_each
from qlora_trainer.data.encode import Example
from qlora_trainer.data.faults import RowError
from qlora_trainer.data.identity import identity_hash
from qlora_trainer.data.labels import label_settings
from qlora_trainer.data.picture_records import label_name, picture_path, recognise_pictures
from qlora_trainer.data.pictures import augment_picture, open_picture
from qlora_trainer.data.rows import Findings
from qlora_trainer.errors import UserError

_DIGEST_BYTES = 16


class PictureEncoder:
    """Turns records that name a picture into examples.

    Args:
        processor: The model's image processor (numpy and Pillow, no torchvision).
        label_names: In the order of the model's outputs.
        augment: Training pictures are flipped and cropped a little.
        side: Pixels of a side the processor shall make; None leaves it as it is.
        labelled: Records have labels.
    """

    columns: Mapping[str, str] = MappingProxyType({"label": "int32", "digest": "uint8"})

    def __init__(
        self,
        processor: Any,
        label_names: Sequence[str],
        *,
        augment: bool = False,
        side: int | None = None,
        labelled: bool = True,
    ) -> None:
        self.processor, self.augment, self.labelled = processor, augment, labelled
        self.label_names = tuple(label_names)
        self._ids = {name: number for number, name in enumerate(self.label_names)}
        self._sizes = {} if side is None else _sizes(processor, side)

    @property
    def identity(self) -> str:
        """A hash of what decides an example; pixels are made later and are no part of it."""
        return identity_hash({"labels": self.label_names, "labelled": self.labelled})

    def recognise(self, records: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
        """See that there are pictures and labels."""
        return recognise_pictures(records, columns, labelled=self.labelled)

    def encode_rows(
        self, records: Sequence[Mapping[str, Any]], format: str
    ) -> list[list[Example] | RowError]:
        """Open every picture once; what does not open or has no known label is refused."""
        return for_each(records, lambda record: [self._example(record)])

    def _example(self, record: Mapping[str, Any]) -> Example:
        path = picture_path(record)
        label = self._ids[label_name(record, self._ids)] if self.labelled else -1
        open_picture(path)
        digest = _digest(path)
        return Example(
            [], columns={"label": [label], "digest": list(digest)}, file=str(path.absolute())
        )

    def collate(self, dataset: EncodedDataset, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Pixels as they are, without augmentation.

        Returns:
            `pixel_values` (B, C, H, W) fp32, and with labels `labels` (B,) int64.

        Raises:
            UserError: A picture is no longer what it was when the rows were encoded.
        """
        return self._collate(dataset, rows, None)

    def collate_augmented(
        self, dataset: EncodedDataset, rows: Sequence[int], *, seed: int, epoch: int
    ) -> dict[str, torch.Tensor]:
        """As `collate`, for training: each epoch sees every picture a little differently."""
        return self._collate(dataset, rows, (seed, epoch) if self.augment else None)

    def _collate(
        self, dataset: EncodedDataset, rows: Sequence[int], keys: tuple[int, int] | None
    ) -> dict[str, torch.Tensor]:
        pictures = []
        for index in rows:
            path = Path(dataset.file(index))
            try:
                picture = open_picture(path)
            except RowError as error:
                raise UserError(
                    f"{error.at(dataset.where(index))} (it could be opened when the data was "
                    "checked)"
                ) from error
            if _digest(path) != dataset.column(index, "digest").tobytes():
                raise UserError(
                    f"{dataset.where(index)}: the picture {path} has changed since the data was "
                    "encoded; put it back, or delete the encoded rows, so that they are made anew: "
                    f"{dataset.store.folder}"
                )
            pictures.append(
                picture if keys is None else augment_picture(picture, *keys, int(index))
            )
        pixels = self.processor(pictures, return_tensors="pt", **self._sizes)["pixel_values"]
        batch: dict[str, torch.Tensor] = {"pixel_values": pixels}  # (B, C, H, W)
        if self.labelled:
            labels = [int(dataset.column(index, "label")[0]) for index in rows]
            batch["labels"] = torch.tensor(labels, dtype=torch.int64)
        return batch

    def findings(self, dataset: EncodedDataset) -> Findings:
        """How many pictures each label has, and pictures that carry two labels."""
        found = Findings()
        pixels = self.collate(dataset, [0])["pixel_values"].shape
        found.facts.append(("picture", f"{pixels[3]} x {pixels[2]} pixels, {pixels[1]} channels"))
        if not self.labelled:
            return found
        labels = [int(dataset.column(index, "label")[0]) for index in range(len(dataset))]
        counts = np.bincount(labels, minlength=len(self.label_names))
        for number in np.argsort(-counts, kind="stable"):
            found.labels.append((self.label_names[number], int(counts[number])))
        empty = [name for name, count in found.labels if not count]
        if empty:
            found.warnings.append(f"labels without a picture: {', '.join(empty[:10])}")
        first: dict[bytes, int] = {}
        for index in range(len(dataset)):
            digest = dataset.column(index, "digest").tobytes()
            other = first.setdefault(digest, index)
            if labels[other] != labels[index]:
                found.warnings.append(
                    f"the same picture has two labels: {dataset.where(other)} is "
                    f"{self.label_names[labels[other]]}, {dataset.where(index)} is "
                    f"{self.label_names[labels[index]]}"
                )
                break
        return found

    def pieces(self, dataset: EncodedDataset, index: int) -> list[tuple[str, bool]]:
        """The picture's file and its label."""
        pieces = [(dataset.file(index), False)]
        if self.labelled:
            pieces += [(" -> ", False), (str(self.reference(dataset, index)), True)]
        return pieces

    def reference(self, dataset: EncodedDataset, index: int) -> Any:
        """The label's name; without labels nothing."""
        label = int(dataset.column(index, "label")[0])
        return self.label_names[label] if label >= 0 else None

    def model_settings(self) -> dict[str, Any]:
        """The labels, for the model's head and its configuration."""
        return label_settings(self.label_names)


def _digest(path: Path) -> bytes:
    """What tells a picture's file from any other."""
    return hashlib.sha256(path.read_bytes()).digest()[:_DIGEST_BYTES]


def _sizes(processor: Any, side: int) -> dict[str, Any]:
    """Arguments that make a processor give squares of this side, whatever it is set to."""
    square = {"height": side, "width": side}
    crops = bool(getattr(processor, "do_center_crop", False))
    shortest = crops and "shortest_edge" in (getattr(processor, "size", None) or {})
    sizes: dict[str, Any] = {"size": {"shortest_edge": side} if shortest else square}
    if crops:
        sizes["crop_size"] = square
    return sizes
