"""Pictures are written by Pillow, harmed by hand, and go the whole way through `build_dataset`."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from qlora_trainer.data.dataset import EncodedDataset, build_dataset
from qlora_trainer.data.encode_pictures import PictureEncoder
from qlora_trainer.data.faults import FaultLog
from qlora_trainer.data.picture_records import find_labels
from qlora_trainer.data.pictures import augment_picture, open_picture
from qlora_trainer.data.read import DataSource, open_source
from qlora_trainer.errors import UserError

SIDE = 12
NAMES = ("cat", "dog")


def noise(seed: int, height: int = 20, width: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})


def encoder(**settings) -> PictureEncoder:
    return PictureEncoder(processor(), settings.pop("names", NAMES), **settings)


def build(source: DataSource, pictures: PictureEncoder, cache: Path) -> EncodedDataset:
    return build_dataset([source], pictures, max_seq_len=64, cache_dir=cache)


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "pets"
    for name in NAMES:
        (root / name).mkdir(parents=True)
    noise(1).save(root / "cat" / "1.png")
    noise(2, 30, 30).save(root / "cat" / "2.jpg")
    noise(3).save(root / "dog" / "1.jpeg")
    return root


def rows_of(path: Path, **source) -> list[dict]:
    faults = FaultLog()
    rows = [row.record for row in open_source(DataSource(str(path), **source)).rows(faults)]
    assert not faults.faults
    return rows


def test_a_folder_of_folders_says_its_labels(folder, tmp_path):
    assert [row["label"] for row in rows_of(folder)] == ["cat", "cat", "dog"]
    data = build(DataSource(str(folder)), encoder(), tmp_path / "cache")
    assert [encoder().reference(data, index) for index in range(3)] == ["cat", "cat", "dog"]
    assert data.where(2).endswith("pets/dog/1.jpeg")
    assert find_labels(iter(rows_of(folder))) == ["cat", "dog"]


def test_splits_are_the_folders_above_labels_and_train_may_be_a_label(tmp_path):
    for place in ("train/cat", "train/train", "val/cat"):
        (tmp_path / "set" / place).mkdir(parents=True)
        noise(1).save(tmp_path / "set" / place / "1.png")
    assert [row["label"] for row in rows_of(tmp_path / "set")] == ["cat", "train"]
    assert len(rows_of(tmp_path / "set", split="validation")) == 1
    assert [row["label"] for row in rows_of(tmp_path / "set" / "train")] == ["cat", "train"]
    with pytest.raises(UserError, match=r"no pictures in folders of their labels \(split 'test'\)"):
        open_source(DataSource(str(tmp_path / "set"), split="test"))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_name_pictures_relative_to_their_own_file(folder, tmp_path, kind):
    rows = [{"file": "cat/1.png", "class": 0}, {"file": str(folder / "dog/1.jpeg"), "class": "dog"}]
    if kind == "csv":
        rows[0]["class"] = "cat"
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([{**row, "class": "cat"} for row in rows]), path)
    elif kind == "csv":
        path.write_text("file,class\n" + "".join(f"{r['file']},{r['class']}\n" for r in rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    columns = {"image": "file", "label": "class"}
    data = build(DataSource(str(path), columns=columns), encoder(), tmp_path / "cache")
    assert [Path(data.file(index)).name for index in range(2)] == ["1.png", "1.jpeg"]
    assert encoder().reference(data, 0) == "cat"


def test_batches_are_what_the_models_own_processor_makes(folder, tmp_path):
    pictures = encoder()
    data = build(DataSource(str(folder)), pictures, tmp_path / "cache")
    batch = pictures.collate(data, [2, 0])
    files = [folder / "dog/1.jpeg", folder / "cat/1.png"]
    opened = [Image.open(file).convert("RGB") for file in files]
    own = processor()(opened, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], own)
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert batch["labels"].tolist() == [1, 0]


def test_the_size_can_be_set(folder, tmp_path):
    pictures = encoder(side=8)
    data = build(DataSource(str(folder)), pictures, tmp_path / "cache")
    assert pictures.collate(data, [0])["pixel_values"].shape == (1, 3, 8, 8)
    assert pictures.findings(data).facts == [("picture", "8 x 8 pixels, 3 channels")]


def test_augmentation_is_a_function_of_seed_epoch_and_row_and_only_for_training(folder, tmp_path):
    pictures = encoder(augment=True)
    data = build(DataSource(str(folder)), pictures, tmp_path / "cache")
    rows = [0, 1, 2]

    def pixels(seed, epoch):
        made = pictures.collate_augmented(data, rows, seed=seed, epoch=epoch)
        return made["pixel_values"]

    assert torch.equal(pixels(1, 0), pixels(1, 0))
    assert not torch.equal(pixels(1, 0), pixels(1, 1))
    assert not torch.equal(pixels(1, 0), pixels(2, 0))
    plain = pictures.collate(data, rows)["pixel_values"]
    assert torch.equal(encoder().collate(data, rows)["pixel_values"], plain)
    never = encoder(augment=False).collate_augmented(data, rows, seed=1, epoch=0)
    assert torch.equal(never["pixel_values"], plain)


def test_batches_draw_no_random_numbers_as_a_thread_beside_the_step_makes_them(folder, tmp_path):
    pictures = encoder(augment=True)
    data = build(DataSource(str(folder)), pictures, tmp_path / "cache")

    def states():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    before = states()
    pictures.collate_augmented(data, [0, 1, 2], seed=1, epoch=0)
    assert states() == before


def test_augmentation_flips_half_the_pictures_and_moves_them_by_at_most_an_eighth():
    picture = Image.fromarray(np.arange(32 * 32, dtype=np.float64).reshape(32, 32) // 4).convert(
        "RGB"
    )
    pixels = np.asarray(picture).astype(int)
    flipped = 0
    for key in range(200):
        made = np.asarray(augment_picture(picture, 7, 0, key)).astype(int)
        assert made.shape == pixels.shape
        middle = made[4:28, 4:28]  # further in than any border reaches
        places = [
            (flip, top, left)
            for flip in (0, 1)
            for top in range(9)
            for left in range(9)
            if np.array_equal(
                middle, (pixels[:, ::-1] if flip else pixels)[top : top + 24, left : left + 24]
            )
        ]
        assert places
        flipped += places[0][0]
    assert 70 < flipped < 130


def test_copies_are_known_by_their_bytes_wherever_they_lie(folder, tmp_path):
    noise(1).save(folder / "cat" / "copy.png")
    noise(1).save(folder / "dog" / "same.png")
    data = build(DataSource(str(folder)), encoder(), tmp_path / "cache")
    assert data.hashes[0] == data.hashes[2]  # cat/1.png and cat/copy.png
    assert len(np.unique(data.hashes)) == 4
    found = encoder().findings(data)
    assert found.labels == [("cat", 3), ("dog", 2)]
    assert "same picture has two labels: " in found.warnings[0]
    assert "dog/same.png is dog" in found.warnings[0]


def test_a_phones_picture_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    noise(1, 10, 30).save(tmp_path / "a.jpg", exif=exif)
    assert open_picture(tmp_path / "a.jpg").size == (10, 30)


def test_transparent_and_grey_pictures_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "1", "LA"):
        noise(1).convert(mode).save(tmp_path / "a.png")
        assert open_picture(tmp_path / "a.png").mode == "RGB"


def damaged(kind: str, path: Path) -> None:
    whole = path.read_bytes()
    if kind == "cut PNG":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "cut JPEG":
        noise(1, 90, 90).save(path, format="JPEG")
        path.write_bytes(path.read_bytes()[:900])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is no picture")
    elif kind == "web page":
        path.write_text("<!DOCTYPE html><html>404</html>")
    elif kind == "16 bit":
        Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(path)
    elif kind == "GIF":
        noise(1).save(path, format="GIF")
    elif kind == "changed bytes":
        path.write_bytes(whole[:60] + bytes(40) + whole[100:])
    elif kind == "gone":
        path.unlink()
    else:
        path.unlink()
        path.mkdir()


HARMS = {
    "cut PNG": "does not open: ",
    "cut JPEG": "does not open: .*truncated",
    "empty": "is an empty file",
    "text": r"is no PNG or JPEG \(it begins with 74 68 69 73\); save it again",
    "web page": "is a web page or SVG",
    "16 bit": "16 bits a channel.*save it with 8 bits",
    "GIF": "is no PNG or JPEG",
    "changed bytes": "does not open: ",
    "gone": "is not there; mend the path",
    "folder": "cannot be read",
}


@pytest.mark.parametrize("kind", HARMS)
def test_pictures_that_do_not_open_are_named_with_file_and_row(folder, tmp_path, kind):
    rows = [{"image": "dog/1.jpeg", "label": "dog"}, {"image": "cat/1.png", "label": "cat"}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    damaged(kind, folder / "cat" / "1.png")
    with pytest.raises(
        UserError, match=rf"(?s)1 fault.*rows\.jsonl:2: .*cat/1\.png.*{HARMS[kind]}"
    ):
        build(DataSource(str(folder / "rows.jsonl")), encoder(), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/rows.arrow"))


BAD = {
    "no label": ({"image": "cat/1.png"}, r":2: no `label`; add it"),
    "empty label": ({"image": "cat/1.png", "label": " "}, r":2: no `label`"),
    "unknown label": (
        {"image": "cat/1.png", "label": "bird"},
        r":2: the label 'bird' is not among the labels \(cat, dog\).*task_settings\.labels",
    ),
    "number out of range": ({"image": "cat/1.png", "label": 2}, r":2: the label '2' is not among"),
    "several labels": ({"image": "cat/1.png", "label": ["cat"]}, r":2: `label` is a list, not"),
    "yes or no": ({"image": "cat/1.png", "label": True}, r":2: `label` is true or false, not"),
    "no picture": ({"label": "cat"}, r":2: no `image`; add it"),
    "bytes": ({"image": {"bytes": "x"}, "label": "cat"}, r":2: `image` is an object, not the path"),
    "address": ({"image": "https://x.org/a.png", "label": "cat"}, r":2: `image` is an address"),
    "mistyped path": ({"image": "cats/1.png", "label": "cat"}, r":2: the picture .*is not there"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_refused_with_their_place_and_a_way_out(folder, tmp_path, case):
    row, message = BAD[case]
    rows = [{"image": "dog/1.jpeg", "label": "dog"}, row]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=rf"(?s)rows\.jsonl{message}"):
        build(DataSource(str(folder / "rows.jsonl")), encoder(), tmp_path / "cache")


def test_rows_without_the_needed_fields_are_told_how_to_name_them(folder, tmp_path):
    (folder / "rows.jsonl").write_text('{"file_name": "cat/1.png", "category": "cat"}')
    with pytest.raises(UserError, match=r"no `image` and no `label`.*columns: \{image: file_name"):
        build(DataSource(str(folder / "rows.jsonl")), encoder(), tmp_path / "cache")


def test_one_class_is_none(tmp_path):
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    noise(1).save(tmp_path / "pets" / "cat" / "1.png")
    with pytest.raises(UserError, match=r"data\.train: 1 label \(cat\) where at least two"):
        find_labels(iter(rows_of(tmp_path / "pets")))


def test_numbered_labels_are_ordered_as_numbers():
    assert find_labels({"label": n} for n in (10, 2, "1")) == ["1", "2", "10"]


def test_what_is_to_be_predicted_needs_no_label(folder, tmp_path):
    pictures = encoder(labelled=False)
    data = build(DataSource(str(folder)), pictures, tmp_path / "cache")
    assert "labels" not in pictures.collate(data, [0, 1])
    assert pictures.reference(data, 0) is None


def test_a_picture_lost_since_the_check_is_named(folder, tmp_path):
    pictures = encoder()
    data = build(DataSource(str(folder)), pictures, tmp_path / "cache")
    (folder / "dog" / "1.jpeg").unlink()
    with pytest.raises(UserError, match=r"dog/1\.jpeg.*when the data was checked"):
        pictures.collate(data, [2])


def test_a_picture_changed_since_the_check_is_named(folder, tmp_path):
    pictures = encoder()
    listed = folder / "list.jsonl"
    lines = [{"image": "cat/1.png", "label": "cat"}, {"image": "dog/1.jpeg", "label": "dog"}]
    listed.write_text("\n".join(map(json.dumps, lines)))
    data = build(DataSource(str(listed)), pictures, tmp_path / "cache")
    pictures.collate(data, [0, 1])
    noise(9).save(folder / "dog" / "1.jpeg")
    again = build(DataSource(str(listed)), pictures, tmp_path / "cache")  # found encoded
    for stored in (data, again):
        pictures.collate(stored, [0])
        with pytest.raises(UserError, match=r"list\.jsonl:2.*dog/1\.jpeg has changed since"):
            pictures.collate_augmented(stored, [0, 1], seed=0, epoch=0)
    shutil.rmtree(again.store.folder)  # the way out that is named
    pictures.collate(build(DataSource(str(listed)), pictures, tmp_path / "cache"), [0, 1])
