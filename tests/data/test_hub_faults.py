"""What goes wrong with a data set of the hub is told by its reason."""

import errno
import json

import datasets
import httpx2
import pytest
from datasets.exceptions import (
    DatasetGenerationCastError,
    DatasetGenerationError,
    DatasetNotFoundError,
)
from huggingface_hub.errors import HfHubHTTPError

from qlora_trainer.data.hub_faults import explain_data_error
from qlora_trainer.data.read import DataSource, open_source
from qlora_trainer.errors import UserError


def answer(status):
    response = httpx2.Response(status, request=httpx2.Request("GET", "https://hub/api"))
    return HfHubHTTPError(f"{status} of the hub", response=response)


def generating(cause):
    error = DatasetGenerationError("An error occurred while generating the dataset")
    error.__cause__ = cause
    return error


LOST = RuntimeError("Task error: File reconstruction error: CAS Client Error: request")
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DatasetNotFoundError("it doesn't exist"), "no such data set could be fetched"),
        (ConnectionError("Couldn't reach it"), "go online"),
        (LOST, "cannot be fetched (RuntimeError: Task error"),
        (generating(LOST), "check the network"),
        (httpx2.ReadTimeout("timed out"), "check the network"),
        (answer(429), "429 of the hub); check the network"),
        (answer(403), "the hub refuses access (403)"),
        (FULL, "the disk is full"),
        (generating(FULL), "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError("Not enough disk space. Needed: 4 GiB"), "the disk is full"),
        (generating(TypeError("Couldn't cast\nstring to int")), "(TypeError: Couldn't cast string"),
        (generating(DatasetGenerationCastError("1 new\ncolumns")), "CastError: 1 new columns"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be read (PermissionError"),
        (ValueError("Config name is missing"), "set `name` and `split`"),
        (RuntimeError("Dataset scripts are no longer supported"), "set `name` and `split`"),
    ],
)
def test_the_reason_is_told_in_one_line(monkeypatch, error, told):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)  # the library's, which asks the hub
    with pytest.raises(UserError) as raised:
        open_source(DataSource("owner_name"))
    assert str(raised.value).startswith("data source owner_name: ")
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_of_different_columns_are_named(tmp_path):
    for name, row in (("a", {"text": "x"}), ("b", {"text": "x", "label": 1})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    with pytest.raises(DatasetGenerationError) as raised:
        datasets.load_dataset(
            "json", data_files=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")],
            cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
    told = explain_data_error(raised.value)
    assert told.startswith("its files cannot be made into a table")
    assert "label: int64" in told
    assert "column names don't match" in told
