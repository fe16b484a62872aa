"""Two real processes over gloo make the run that one makes.

Sums are added in another order, so numbers agree to fp32's rounding, as six steps of AdamW make
of it: losses to a share of 1e-5, the adapter's tensors to 1e-3 of their norm.
"""

import json
import signal
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
from tests.run.several import StopAfter
from tests.together import run_together
from tests.training.tiny import adapted_llama, make_run, trained_values

pytestmark = pytest.mark.slow
STEPS = 6
Settings = dict[str, dict[str, Any]]


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


SHARED = {"shard_layers": True}
PACKED = {
    "data": {"packing": True},
    "train": {"gradient_accumulation_steps": 3, "micro_batch_size": 1},
}


@pytest.fixture(scope="module")
def seen(
    settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What both processes saw of all jobs; those named `grown` were begun by one process."""
    for name in ("grown", "shared-grown"):
        begun = train(check_values(settings(name)), reporter=StopAfter(2))
        assert begun.outcome.step == 2
    jobs = {
        "runs": {
            "plain": {"settings": settings("plain")},
            "packed": {"settings": settings("packed", **changed(settings, PACKED))},
            "grown": {"settings": settings("grown")},
            "shrunk": {"settings": settings("shrunk"), "stop_after": 3},
            "shared": {"settings": settings("shared", model=SHARED)},
            "shared-grown": {"settings": settings("shared-grown", model=SHARED)},
            "shared-shrunk": {"settings": settings("shared-shrunk", model=SHARED), "stop_after": 3},
            "terminated": {
                "settings": settings("terminated"), "other_gets": {"name": "SIGTERM", "step": 3},
            },
            "unlike": {
                "settings": settings("unlike"), "other_has": {"train": {"learning_rate": 1e-3}},
            },
        }
    }  # fmt: skip
    file = tmp_path_factory.mktemp("jobs") / "jobs.json"
    file.write_text(json.dumps(jobs))
    ended = run_together([["tests.run.several", str(file)]] * 2, file.parent)
    assert [code for code, _ in ended] == [0, 0], "\n".join(said for _, said in ended)
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


def goes_on_after(step: int, made: Settings) -> Path:
    """Go on alone, from the state of this step, to the end; -> the run's folder."""
    told = StopAfter()
    resumed = train(check_values(made), reporter=told)
    assert told.resumed_after == step
    assert resumed.outcome.complete
    return resumed.folder


def processes_of(folder: Path) -> tuple[int, list[int]]:
    """How many began a run, and how many each of its resumptions had."""
    environment = json.loads((folder / "environment.json").read_text())
    return environment["processes"], [again["processes"] for again in environment["resumed"]]


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
    grown = Path(settings("grown")["output"]["folder"])
    assert_same_run(alone, grown)
    assert seen[0]["grown"]["resumed_after"] == 2
    assert processes_of(grown) == (1, [2])
    assert [process["shrunk"]["complete"] for process in seen] == [False, False]
    assert [process["shrunk"]["step"] for process in seen] == [3, 3]
    shrunk = goes_on_after(3, settings("shrunk"))
    assert_same_run(alone, shrunk)
    assert processes_of(shrunk) == (2, [1])


def test_sharing_the_layers_changes_no_bit(
    seen: list[dict[str, Any]], settings: Callable[..., Settings]
) -> None:
    folders = [Path(settings(name)["output"]["folder"]) for name in ("plain", "shared")]
    whole, shared = (load_file(f / "adapter" / "adapter_model.safetensors") for f in folders)
    assert whole.keys() == shared.keys()
    assert all(torch.equal(whole[name], shared[name]) for name in whole)
    curves = [
        [(line.get("loss"), line.get("eval_loss")) for line in read_metrics(f / "metrics.jsonl")]
        for f in folders
    ]
    assert curves[0] == curves[1]


def test_a_run_with_shared_layers_goes_on_alone_and_one_begun_alone_with_them(
    seen: list[dict[str, Any]], alone: Path, settings: Callable[..., Settings]
) -> None:
    assert seen[1]["shared-grown"]["complete"]
    assert seen[0]["shared-grown"]["resumed_after"] == 2
    assert_same_run(alone, Path(settings("shared-grown")["output"]["folder"]))
    assert [process["shared-shrunk"]["step"] for process in seen] == [3, 3]
    assert_same_run(alone, goes_on_after(3, settings("shared-shrunk")))


def test_memory_foreseen_with_shared_layers_is_what_the_first_step_takes(
    seen: list[dict[str, Any]], settings: Callable[..., Settings]
) -> None:
    folder = Path(settings("shared")["output"]["folder"])
    memory = json.loads((folder / "memory.json").read_text())
    assert abs(memory["compared"]["error"]) < 0.01
    parts = memory["predicted"]["by_component"]
    assert parts["layer parts"] > 0
    assert parts["gathered layers"] > 0


def test_the_main_process_alone_writes(seen: list[dict[str, Any]]) -> None:
    runs = ("plain", "packed", "grown", "shrunk", "shared", "terminated")
    assert [[process[run]["wrote"] for run in runs] for process in seen] == [
        [True] * 6,
        [False] * 6,
    ]


def test_a_signal_to_the_other_process_stops_both_and_saves(
    seen: list[dict[str, Any]], alone: Path, settings: Callable[..., Settings]
) -> None:
    for process in seen:
        assert (process["terminated"]["step"], process["terminated"]["complete"]) == (3, False)
        assert process["terminated"]["reason"].startswith("stopped by SIGTERM")
    assert_same_run(alone, goes_on_after(3, settings("terminated")))


def test_processes_with_unlike_settings_are_refused_and_told_which(
    seen: list[dict[str, Any]],
) -> None:
    assert seen[0]["unlike"]["kind"] == "UserError"
    assert "train.learning_rate is 0.001, in process 0 0.002" in seen[0]["unlike"]["said"]
    assert seen[0]["unlike"]["said"].count("process 1: ") == 1
    assert seen[1]["unlike"]["kind"] == "ToldElsewhereError"


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
    run, jobs = tmp_path / "run.yaml", tmp_path / "jobs.json"
    run.write_text(json.dumps(made))  # YAML, too
    killed = {"settings": made, "other_gets": {"name": "SIGKILL", "step": 3}}
    jobs.write_text(json.dumps({"runs": {"killed": killed}}))
    (code, said), (other, _) = run_together(
        [["qlora_trainer", "train", str(run)], ["tests.run.several", str(jobs)]], tmp_path
    )
    assert other == -signal.SIGKILL
    assert code == 2, said
    assert "another process of this run is gone" in " ".join(said.split())
    assert "Traceback" not in said
    assert_same_run(alone, goes_on_after(2, made))


def test_processes_without_work_are_refused(settings: Callable[..., Settings]) -> None:
    run = check_values(settings("unused"))
    assert list(idle_notes(run, Processes(count=2))) == []
    assert "2 of them wait" in next(idle_notes(run, Processes(count=3)))
    with pytest.raises(UserError, match="gradient_accumulation_steps = 4: is dealt out over 5"):
        require_passes(run, 5)


def test_one_process_has_nobody_to_share_layers_with(settings: Callable[..., Settings]) -> None:
    run = check_values(settings("unused", model=SHARED))
    with pytest.raises(UserError, match=r"model.shard_layers = true: one process has nobody"):
        train(run)
