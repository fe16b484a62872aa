"""Figures of several processes in one file."""

import json
import subprocess
import sys
from pathlib import Path

import figures_file
from figures_file import record

WRITE = """
import sys; from pathlib import Path; from figures_file import record
for part in sys.argv[2].split():
    record(Path(sys.argv[1]), part, {"means": part}, [str(n) for n in range(400)])
"""


def test_processes_write_one_file_and_no_part_is_lost(tmp_path):
    file, scripts = tmp_path / "figures.json", Path(figures_file.__file__).parent
    processes = []
    for first in range(4):
        parts = " ".join(str(number) for number in range(first, 400, 4))
        command = [sys.executable, "-c", WRITE, str(file), parts]
        processes.append(subprocess.Popen(command, cwd=scripts))
    assert [process.wait(60) for process in processes] == [0, 0, 0, 0]
    held = json.loads(file.read_text())
    assert list(held.items()) == [(str(number), {"means": str(number)}) for number in range(400)]
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_a_part_that_was_skipped_does_not_replace_figures(tmp_path):
    file = tmp_path / "figures.json"
    assert record(file, "a", {"skipped": "no model"}, ["a"]) == {"skipped": "no model"}
    assert record(file, "a", {"means": 1}, ["a"]) == {"means": 1}
    assert record(file, "a", {"skipped": "no model"}, ["a"]) == {"means": 1}
    assert json.loads(file.read_text()) == {"a": {"means": 1}}
