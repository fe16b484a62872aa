"""A real training process with both trackers: what they hold is what `metrics.jsonl` holds."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.training.log import read_metrics
from qlora_trainer.training.trackers import require_trackers

pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
pytest.importorskip("wandb", reason="the wandb extra is not installed")

Scalars = dict[str, list[tuple[int, float]]]
NOWHERE = "http://127.0.0.1:9"  # the discard port: whoever tries to send anything fails


def wandb_records(file: Path) -> Iterator[bytes]:
    """Records of a `.wandb` file: LevelDB's log format behind a header of 7 bytes."""
    content, record = file.read_bytes(), b""
    place = 7
    while place < len(content):
        left = 32768 - place % 32768  # of this block
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_scalars(file: Path) -> Scalars:
    from wandb.proto.wandb_internal_pb2 import Record

    found: Scalars = {}
    for content in wandb_records(file):
        record = Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") != "history":
            continue
        for item in record.history.item:
            key = item.key or "/".join(item.nested_key)
            step = record.history.step.num
            found.setdefault(key, []).append((step, json.loads(item.value_json)))
    return found


def tensorboard_scalars(folder: Path) -> Scalars:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: Scalars = {}
    for file in folder.rglob("events.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for key in events.Tags()["scalars"]:
            found.setdefault(key, []).extend((e.step, e.value) for e in events.Scalars(key))
    return found


def test_trackers_hold_what_was_logged_and_write_nowhere_else(
    make_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    trackers = {"trackers": ["tensorboard", "wandb"]}
    run = make_run(output=trackers, evaluation={"every_steps": 2})
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "XDG"))}
    subprocess.run(
        [sys.executable, "-m", "qlora_trainer", "train", str(run_file)],
        cwd=here,
        env=kept | {
            "HOME": str(home),
            "MPLCONFIGDIR": str(tmp_path / "matplotlib"),
            "WANDB_MODE": "offline",
            "HTTP_PROXY": NOWHERE,
            "HTTPS_PROXY": NOWHERE,
        },
        check=True,
        capture_output=True,
        timeout=300,
    )  # fmt: skip
    folder = Path(run.output.folder)
    expected: Scalars = {}
    for record in read_metrics(folder / "metrics.jsonl"):
        for key, value in record.items():
            if key not in ("kind", "step"):
                expected.setdefault(key, []).append((record["step"], value))
    assert [step for step, _ in expected["loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in expected["eval_loss"]] == [0, 2, 4]
    (logged,) = (folder / "trackers").rglob("*.wandb")
    wandb, tensorboard = wandb_scalars(logged), tensorboard_scalars(folder / "trackers")
    assert {key: wandb.get(key) for key in expected} == expected
    for key, values in expected.items():
        assert [step for step, _ in tensorboard[key]] == [step for step, _ in values]
        fp32 = [value for _, value in tensorboard[key]]
        assert fp32 == pytest.approx([value for _, value in values], rel=1e-6)
    strays = [path for place in (home, here) for path in place.rglob("*") if path.is_file()]
    assert strays == []


def test_wandb_without_an_account_is_refused_before_anything_heavy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"No API key.*wandb login.*WANDB_MODE=offline"):
        require_trackers(["wandb"])
