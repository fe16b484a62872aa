"""The README's launch lines, as they stand there, train a tiny model with two processes here."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow
PORT_OPTION = {"torchrun": "--master_port", "accelerate": "--main_process_port"}


def launch_line(launcher: str) -> list[str]:
    """The words of the README's line for one machine with two cards."""
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    found = [
        line for line in lines if line.startswith(f"{launcher} ") and " train RUN.yaml" in line
    ]
    [line] = [line for line in found if "--nnodes" not in line and "--set" not in line]
    return shlex.split(line)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_readmes_line_trains_with_two_processes(
    launcher: str, tiny_model: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n} plus {n} is", "completion": f" {2 * n}"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = {
        "model": {"source": str(tiny_model), "device": "cpu"},
        "adapter": {"rank": 2},
        "data": {"train": "rows.jsonl", "cache_folder": "cache", "max_seq_len": 64},
        "train": {"max_steps": 2, "gradient_accumulation_steps": 2},
        "output": {"folder": "run"},
    }
    (tmp_path / "RUN.yaml").write_text(json.dumps(run))  # YAML, too
    program, *words = launch_line(launcher)
    after = 1 if words[0] == "launch" else 0
    words[after:after] = [PORT_OPTION[launcher], free_port()]
    done = subprocess.run(
        [Path(sys.executable).with_name(program), *words], cwd=tmp_path, check=False,
        capture_output=True, text=True, errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
             "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == 2
    assert (tmp_path / "run" / "result.json").is_file()
