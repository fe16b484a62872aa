"""Pictures are foreseen as large as the model's own processor makes them."""

import json
from pathlib import Path

import pytest
import transformers
from PIL import Image

from qlora_trainer.base.picture_size import PROCESSOR_FILE, processed_size

PROCESSORS = {
    "squares": transformers.ViTImageProcessorPil(size={"height": 24, "width": 24}),
    "rectangles": transformers.ViTImageProcessorPil(size={"height": 24, "width": 40}),
    "cropped": transformers.BitImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 28}
    ),
    "shortest edge": transformers.ConvNextImageProcessorPil(size={"shortest_edge": 48}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_size_is_that_of_the_pictures_a_processor_makes(name: str, tmp_path: Path) -> None:
    PROCESSORS[name].save_pretrained(tmp_path)
    made = PROCESSORS[name](Image.new("RGB", (90, 70)), return_tensors="pt")["pixel_values"]
    assert processed_size(tmp_path) == tuple(made.shape[-2:])


def test_a_crop_that_is_not_made_does_not_count(tmp_path: Path) -> None:
    said = {"size": 40, "crop_size": 32, "do_center_crop": False}
    (tmp_path / PROCESSOR_FILE).write_text(json.dumps(said))
    assert processed_size(tmp_path) == (40, 40)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"size": {"longest_edge": 9}}'])
def test_nothing_is_said_where_nothing_is_known(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / PROCESSOR_FILE).write_text(text)
    assert processed_size(tmp_path) is None
    assert processed_size(tmp_path / PROCESSOR_FILE) is None  # a file, or nothing at all
