"""Several real processes, started as a launcher would, with nothing that watches over them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

TIMEOUT_SECONDS = 900.0


def run_together(commands: Sequence[Sequence[str]], folder: Path) -> list[tuple[int, str]]:
    """Run a Python module, with its arguments, in a process each; a hang is a failure.

    Returns:
        Exit code and standard error of each.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    count = str(len(commands))
    shared = {
        "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    said = [folder / f"stderr-{rank}.txt" for rank in range(len(commands))]
    processes: list[subprocess.Popen[bytes]] = []
    until = time.monotonic() + TIMEOUT_SECONDS
    try:
        for rank, command in enumerate(commands):
            with said[rank].open("w") as errors:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", *command], cwd=REPOSITORY, stderr=errors,
                        stdout=subprocess.DEVNULL,
                        env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    )
                )  # fmt: skip
        for process in processes:
            process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        told = "\n".join(f"{file.name}: {file.read_text()}" for file in said)
        pytest.fail(f"not at an end after {TIMEOUT_SECONDS:g} s\n{told}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        (process.returncode, file.read_text())
        for process, file in zip(processes, said, strict=True)
    ]
