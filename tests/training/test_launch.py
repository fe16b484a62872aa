"""Processes that a launcher has started and that cannot be one run: refused, with the way out."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from qlora_trainer.errors import UserError
from qlora_trainer.training.launch import join_processes
from qlora_trainer.training.processes import ALONE
from tests.conftest import REPOSITORY


@pytest.fixture
def several_here(monkeypatch: pytest.MonkeyPatch) -> int:
    """One process more than there are cards, at least two, on a machine that says it has cards."""
    count = max(2, torch.cuda.device_count() + 1)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(count))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return count


def test_one_process_meets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join_processes("cpu") as processes:
        assert processes is ALONE


def test_several_processes_on_one_named_card_are_refused(several_here: int) -> None:
    told = rf"model\.device = 'cuda:1': {several_here} processes on this machine need a card each"
    with pytest.raises(UserError, match=told), join_processes("cuda:1"):
        pass


def test_more_processes_than_cards_are_refused(several_here: int) -> None:
    cards = torch.cuda.device_count()
    told = f"{several_here} processes on this machine, which has {cards} GPUs; start as many"
    with pytest.raises(UserError, match=told), join_processes("auto"):
        pass


@pytest.mark.slow
def test_an_address_where_nobody_answers_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = str(taken.getsockname()[1])
        launched = {
            "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "RANK": "1", "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        lines = [
            "from qlora_trainer.errors import UserError",
            "from qlora_trainer.training.launch import join_processes",
            "try:",
            "    join_processes('cpu', wait_seconds=1).__enter__()",
            "except UserError as error:",
            "    print(error)",
        ]
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(lines)], cwd=REPOSITORY, check=False,
            env={**os.environ, **launched}, capture_output=True, text=True,
        )  # fmt: skip
    assert done.stdout.startswith(f"the processes of this run cannot meet at 127.0.0.1:{port} ("), (
        done.stderr
    )
    assert "every machine must reach that address, and be given the same number" in done.stdout
