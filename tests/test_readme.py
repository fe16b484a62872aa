"""Every command and every Python line the README shows is run, in order, as a user would."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
TWO_COMMANDS = ["python3 scripts/quickstart.py", "python3 scripts/test.py"]
NOT_RUN_HERE = {*TWO_COMMANDS, "pip install -e ."}  # they are what runs these tests


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_the_readme_opens_with_the_two_commands() -> None:
    assert [block.strip() for block in _blocks("bash")[:2]] == TWO_COMMANDS
    assert all((REPOSITORY / command.split()[1]).is_file() for command in TWO_COMMANDS)


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
def test_every_command_shown_works(tmp_path: Path) -> None:
    (tmp_path / ".cache").symlink_to(REPOSITORY / ".cache")
    (tmp_path / "profiles").symlink_to(REPOSITORY / "profiles")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "QLORA_CACHE": str(tmp_path / "encoded")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    commands = [line for block in _blocks("bash") for line in block.splitlines() if line]
    ran = 0
    for command in commands:
        if command in NOT_RUN_HERE:
            continue
        done = subprocess.run(
            shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    for number, block in enumerate(_blocks("python")):
        done = subprocess.run(
            [sys.executable, "-c", block],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"Python block {number}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip()
    assert ran >= 6
