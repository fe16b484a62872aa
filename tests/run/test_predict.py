"""Predictions replace no file that nobody gave up, and never the records they are of."""

import os
from pathlib import Path

import pytest

from qlora_trainer.errors import UserError
from qlora_trainer.run.evaluate import predict_file
from qlora_trainer.run.train import train
from tests.run.test_continued import Make, make
from tests.tasks.tiny_texts import labelled_rows, write_rows

__all__ = ["make"]  # the fixture


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_records_are_never_written_over(tmp_path: Path, link: object, overwrite: bool) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", labelled_rows(3))
    before, out = rows.read_bytes(), tmp_path / "sub" / ".." / "rows.jsonl"
    (tmp_path / "sub").mkdir()
    if callable(link):
        out = tmp_path / "link.jsonl"
        link(rows, out)
    with pytest.raises(UserError, match=r"--out .*: is the file of --data"):
        predict_file(tmp_path, str(rows), out, overwrite=overwrite)
    assert rows.read_bytes() == before


def test_a_file_is_replaced_only_when_told(make: Make, tmp_path: Path) -> None:
    run = make("asked", labelled_rows(12))
    rows, out = write_rows(tmp_path / "rows.jsonl", labelled_rows(3)), tmp_path / "said.jsonl"
    out.write_text("mine")
    with pytest.raises(UserError, match=r"said\.jsonl: is there already; .* --overwrite"):
        predict_file(run.output.folder, str(rows), out)  # before anything is loaded
    assert out.read_text() == "mine"
    folder = train(run).folder
    assert predict_file(folder, str(rows), out, overwrite=True) == 3
    assert len(out.read_text().splitlines()) == 3
