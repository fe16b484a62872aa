"""Two real processes over gloo make the run that one makes.

Sums are added in another order, so numbers agree to fp32's rounding, as six steps of AdamW make
of it: losses to a share of 1e-5, the adapter's tensors to 1e-3 of their norm.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_trainer import UserError, train
from qlora_trainer.config.read import check_values
from qlora_trainer.run.shares import idle_notes, require_passes
from qlora_trainer.training.log import read_metrics
from qlora_trainer.training.loop import run_training
from qlora_trainer.training.plan import TrainingPlan
from qlora_trainer.training.processes import Processes
from tests.conftest import REPOSITORY
from tests.run.several import StopAfter
from tests.training.tiny import adapted_llama, make_run, trained_values

pytestmark = pytest.mark.slow
STEPS = 6
Settings = dict[str, dict[str, Any]]


def start(command: list[str], count: int = 2) -> list[subprocess.Popen[str]]:
    """As a launcher would, with nothing that watches over them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", *command], cwd=REPOSITORY, text=True, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and standard error of each."""
    said = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Settings]:
    place = tmp_path_factory.mktemp("processes")
    rows = [
        {"prompt": f"{n} plus {n} is", "completion": f" {2 * n}" + "." * (n % 7)} for n in range(60)
    ]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def make(name: str, **sections: dict[str, Any]) -> Settings:
        made: Settings = {
            "model": {"source": str(tiny_model), "device": "cpu", "compute_dtype": "fp32"},
            "adapter": {"rank": 4, "dropout": 0.1},
            "data": {"train": str(place / "rows.jsonl"), "eval_fraction": 0.2, "max_seq_len": 64,
                     "cache_folder": str(place / "cache")},
            "train": {"max_steps": STEPS, "micro_batch_size": 2, "gradient_accumulation_steps": 4,
                      "learning_rate": 2e-3},
            "evaluation": {"every_steps": 2, "micro_batch_size": 2},
            "output": {"folder": str(place / name), "save_every_steps": 1},
        }  # fmt: skip
        for section, values in sections.items():
            made[section] = {**made[section], **values}
        return made

    return make


PACKED = {
    "data": {"packing": True},
    "train": {"gradient_accumulation_steps": 3, "micro_batch_size": 1},
}


@pytest.fixture(scope="module")
def seen(
    settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What both processes saw of all jobs; the run `grown` was begun by one process."""
    begun = train(check_values(settings("grown")), reporter=StopAfter(2))
    assert begun.outcome.step == 2
    jobs = {
        "runs": {
            "plain": {"settings": settings("plain")},
            "packed": {"settings": settings("packed", **changed(settings, PACKED))},
            "grown": {"settings": settings("grown")},
            "shrunk": {"settings": settings("shrunk"), "stop_after": 3},
        }
    }
    file = tmp_path_factory.mktemp("jobs") / "jobs.json"
    file.write_text(json.dumps(jobs))
    for code, said in ends(start(["tests.run.several", str(file)])):
        assert code == 0, said
    return [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(2)]


def changed(settings: Callable[..., Settings], sections: Settings) -> Settings:
    """Whole sections, with these values changed."""
    base = settings("unused")
    return {name: {**base[name], **values} for name, values in sections.items()}


@pytest.fixture(scope="module")
def alone(settings: Callable[..., Settings]) -> Path:
    return train(check_values(settings("alone"))).folder


def assert_same_run(one: Path, other: Path) -> None:
    expected, found = (read_metrics(folder / "metrics.jsonl") for folder in (one, other))
    told = ("kind", "step", "trained_tokens", "tokens", "eval_tokens", "epoch", "learning_rate")
    assert [[line.get(key) for key in told] for line in expected] == [
        [line.get(key) for key in told] for line in found
    ]
    assert expected[0]["eval_loss"] == found[0]["eval_loss"]  # nothing has moved: the same bits
    for key in ("loss", "eval_loss", "gradient_norm"):
        curves = [[line[key] for line in lines if key in line] for lines in (expected, found)]
        assert curves[1] == pytest.approx(curves[0], rel=1e-5 if "loss" in key else 1e-3)
    ours, theirs = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other)
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        difference = (value.float() - theirs[name].float()).norm() / value.float().norm()
        assert difference < 1e-3, name


def test_two_processes_make_the_run_of_one(
    seen: list[dict[str, Any]], alone: Path, settings: Callable[..., Settings]
) -> None:
    assert_same_run(alone, Path(settings("plain")["output"]["folder"]))


def test_packed_rows_are_dealt_out_unevenly_without_loss(
    seen: list[dict[str, Any]], settings: Callable[..., Settings]
) -> None:
    one = train(check_values(settings("packed-alone", **changed(settings, PACKED)))).folder
    other = Path(settings("packed")["output"]["folder"])
    assert_same_run(one, other)


def test_a_run_goes_on_with_more_processes_or_fewer(
    seen: list[dict[str, Any]], alone: Path, settings: Callable[..., Settings]
) -> None:
    assert_same_run(alone, Path(settings("grown")["output"]["folder"]))
    assert [process["shrunk"]["complete"] for process in seen] == [False, False]
    assert [process["shrunk"]["step"] for process in seen] == [3, 3]
    resumed = train(check_values(settings("shrunk")))
    assert resumed.outcome.complete
    assert_same_run(alone, resumed.folder)
    environment = json.loads((resumed.folder / "environment.json").read_text())
    assert (environment["processes"], environment["resumed"][0]["processes"]) == (2, 1)


def test_the_main_process_alone_writes(seen: list[dict[str, Any]]) -> None:
    runs = ("plain", "packed", "grown", "shrunk")
    assert [[process[run]["wrote"] for run in runs] for process in seen] == [
        [True] * 4,
        [False] * 4,
    ]


def test_a_fault_in_one_is_told_by_the_main_process(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["fault"] == {"kind": "UserError", "said": "process 1: no such column"}
    assert seen[1]["fault"]["kind"] == "ToldElsewhereError"
    assert [process["facts"] for process in seen] == [[0, 2, [0, 2, 4]], [1, 2, [1, 3]]]


def test_memory_short_in_one_makes_micro_batches_smaller_in_all(
    seen: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert [process["memory"]["parts"] for process in seen] == [2, 2]
    assert seen[0]["memory"]["values"] == seen[1]["memory"]["values"]
    model = adapted_llama()
    run = make_run(tmp_path, model, total_steps=3, accumulation=3)
    run_training(run, TrainingPlan(3, 1e-2, seed=5))
    for name, value in trained_values(model).items():
        found = torch.tensor(seen[0]["memory"]["values"][name])
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-6)


def test_the_other_process_killed_ends_a_run_that_then_goes_on(
    settings: Callable[..., Settings], alone: Path, tmp_path: Path
) -> None:
    made = settings("killed")
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(made))  # YAML, too
    folder = Path(made["output"]["folder"])
    pair = start(["qlora_trainer", "train", str(file)])
    while not list(folder.glob("states/step-*")) and pair[0].poll() is None:
        time.sleep(0.01)
    pair[1].send_signal(signal.SIGKILL)
    (code, said), _ = ends(pair)
    assert code == 2, said
    assert "another process of this run is gone" in " ".join(said.split())
    assert "Traceback" not in said
    assert train(check_values(made)).outcome.complete
    assert_same_run(alone, folder)


def test_processes_without_work_are_refused(settings: Callable[..., Settings]) -> None:
    run = check_values(settings("unused"))
    assert list(idle_notes(run, Processes(count=2))) == []
    assert "2 of them wait" in next(idle_notes(run, Processes(count=3)))
    with pytest.raises(UserError, match="gradient_accumulation_steps = 4: is dealt out over 5"):
        require_passes(run, 5)
