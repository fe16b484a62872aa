"""The command line: faults are readable and leave with code 2, results are where they are said."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from qlora_trainer.cli.app import _said_of_memory, main
from qlora_trainer.cli.show import ConsoleReporter
from qlora_trainer.config.tasks import TaskName
from qlora_trainer.export import choices, gguf_file, merged
from qlora_trainer.export.gguf_export import FURTHER_KL
from qlora_trainer.run.train import TrainResult
from qlora_trainer.training.plan import TrainingOutcome


def qlora(*arguments: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "qlora_trainer", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "QLORA_CACHE": str(cwd / "cache")},
        input=stdin,
        capture_output=True,
        text=True,
    )


def test_help_names_every_command(tmp_path: Path) -> None:
    shown = qlora("--help", cwd=tmp_path).stdout
    for command in ("init", "schema", "check", "audit", "train", "generate", "doctor"):
        assert command in shown


def test_init_writes_a_file_and_never_over_one(tmp_path: Path) -> None:
    first = qlora("init", cwd=tmp_path)
    assert first.returncode == 0
    assert "qlora check run.yaml" in first.stdout
    (tmp_path / "run.yaml").write_text("mine")
    again = qlora("init", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert (tmp_path / "run.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0"), "the card"),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might"), "the card"),
        (MemoryError(), "the system"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: tried 9 bytes"), "the system"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), None),
    ],
)
def test_memory_that_is_refused_is_no_defect_of_ours(
    error: RuntimeError | MemoryError, told: str | None
) -> None:
    found = _said_of_memory(error)
    assert found is None if told is None else found is not None and found.startswith(told)


def test_schema_is_json(tmp_path: Path) -> None:
    assert "properties" in json.loads(qlora("schema", cwd=tmp_path).stdout)


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard error of the command line, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["qlora", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
    return int(str(left.value.code)), capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {source: nowhere/at-all}\ndata: {train: x.jsonl}\n", "nowhere/at-all"),
        ("model: {source: m}\ndata: {trian: x.jsonl}\n", "did you mean train"),
        ("model: [", "not valid YAML"),
    ],
)
def test_a_users_fault_is_one_message_and_code_2(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(text)
    folder = tmp_path / "run"
    for command in ("check", "train", "audit"):
        code, shown = said([command, str(run_file), "--set", f"output.folder={folder}"], capsys)
        assert code == 2
        assert message in shown
        assert "Traceback" not in shown
    assert not (folder / "adapter").exists()


def test_a_typo_in_the_command_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = said(["trian", "run.yaml"], capsys)
    assert code == 2
    assert "No such command" in shown


def test_generate_needs_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such run folder" in said(["generate", str(tmp_path / "x"), "hello"], capsys)[1]
    assert "no finished run" in said(["generate", str(tmp_path), "hello"], capsys)[1]


@pytest.mark.parametrize("task", [name for name in get_args(TaskName) if name != "causal-lm"])
def test_generate_names_the_commands_of_other_tasks(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter").mkdir()
    # The base does not even exist: the refusal comes before anything is loaded.
    run = {"task": task, "model": {"source": "nowhere/at-all"}, "data": {"train": "rows.jsonl"}}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    code, shown = said(["generate", str(tmp_path), "hello"], capsys)
    assert code == 2
    assert f"its task is {task}" in shown
    assert f"qlora predict {tmp_path} --data FILE --out FILE" in shown
    assert f"qlora evaluate {tmp_path} --data FILE" in shown


@pytest.mark.parametrize("task", get_args(TaskName))
def test_a_finished_run_names_the_commands_that_take_it(
    task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = TrainingOutcome(
        step=4, complete=True, reason="all steps done", best_step=None, best_value=None,
        first_evaluation=None, best_evaluation=None, last_evaluation=None, overflows=0,
        micro_batch_parts=1,
    )  # fmt: skip
    result = TrainResult(Path("runs/a"), Path("runs/a/adapter"), outcome, {}, task)
    ConsoleReporter().show_result(result)
    commands = re.findall(r"qlora (\w+) runs/a", capsys.readouterr().out)
    assert commands == (["generate"] if task == "causal-lm" else ["evaluate", "predict"])


def test_a_finished_run_says_loss_and_its_own_metric_before_and_after(
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcome = TrainingOutcome(
        step=4, complete=True, reason="all steps done", best_step=2, best_value=0.75,
        first_evaluation=None, best_evaluation=None, last_evaluation=None, overflows=0,
        micro_batch_parts=1, best_metric="accuracy",
    )  # fmt: skip
    metrics = {"loss_before": 1.5, "loss": 0.5, "accuracy_before": 0.25, "accuracy": 0.75}
    metrics |= {"macro_f1_before": 0.125, "macro_f1": 0.625}
    ConsoleReporter().show_result(TrainResult(Path("runs/a"), None, outcome, metrics))
    shown = capsys.readouterr().out
    assert "held-out loss 1.5000 before, 0.5000 after (step 2)\n" in shown
    assert "held-out accuracy 0.2500 before, 0.7500 after (step 2)\n" in shown
    assert "macro_f1" not in shown


def test_no_prompt_is_a_fault(tmp_path: Path) -> None:
    assert "no prompt given" in qlora("generate", ".", cwd=tmp_path, stdin="\n").stderr


def test_generate_says_on_a_terminal_what_it_waits_for(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    keyboard, terminal = pty.openpty()
    os.write(keyboard, b"\x04")  # Ctrl-D
    done = subprocess.run(
        [sys.executable, "-m", "qlora_trainer", "generate", "."],
        cwd=tmp_path, stdin=terminal, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    os.close(keyboard)
    os.close(terminal)
    assert "Type prompts, one a line; Ctrl-D" in done.stderr
    assert "no prompt given" in done.stderr


def test_doctor_finds_this_machine_good(tmp_path: Path) -> None:
    done = qlora("doctor", cwd=tmp_path)
    assert done.returncode == 0
    for topic in ("python", "gpu", "cpu", "nf4", "ram", "disk", "bitsandbytes"):
        assert topic in done.stdout


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("--format", choices.Format), ("--dtype", choices.Dtype), ("--onto", choices.AskedOnto),
        ("--gguf-type", choices.GgufType), ("--quantization", choices.Quantization),
        ("--proof-by", choices.By),
    ],
)  # fmt: skip
def test_an_export_is_asked_for_what_there_is(
    tmp_path: Path, option: str, known: object, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = said(
        ["export", str(tmp_path), "--out", str(tmp_path / "out"), option, "else"], capsys
    )
    assert code == 2
    assert all(f"'{choice}'" in told for choice in get_args(known))
    assert not (tmp_path / "out").exists()


def test_what_can_be_asked_for_is_what_the_export_can_write() -> None:
    assert get_args(choices.Dtype) == ("auto", *merged.DTYPES)
    assert get_args(choices.GgufType) == tuple(gguf_file.TYPES) == tuple(FURTHER_KL)
