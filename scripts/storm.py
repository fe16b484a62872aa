"""A run that faults are done to: its processes are started, watched and awaited here.

A run of several processes is started as a launcher would, each process told its number; nothing
watches over them. Nothing in the trainer knows of any of this. Standard library only.
"""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from training_process import last_step_seconds, newest_whole_step, start, steps_logged

PATIENCE_SECONDS = 1800.0
_RESUMED = re.compile(rb"resuming\s+after\s+step\s+(\d+)")
_ANEW = re.compile(rb"\bstep\s+1/\d+")
_LONGEST_STEP_SECONDS = 20.0  # one in which the machine was held is no measure of the next


class Ended(Exception):
    """The run came to its end before the fault could strike."""


@dataclass
class Storm:
    """One run that faults are done to.

    Attributes:
        command: Trains it.
        folder: The run's.
        data: The run's own copy of its rows; None where they are no single file.
        model: The run's own copy of its base; None where it is no local folder.
        said: Everything its processes say.
        chance: Of moments and places.
        mounted: Whether `folder` stands on a small disk of its own, mounted by us.
        clock: libfaketime, where it is installed.
        processes: How many train it together.
        regions: Next place to corrupt a state at.
        corrupted: How often each file of a state was damaged at each place.
        given_up: Steps that were saved and are to be made again, as their state was damaged.
        begun: Of each start, where its words begin and the newest whole state it found.
        others: All processes of the last start but the main one.
    """

    command: list[str]
    folder: Path
    data: Path | None
    model: Path | None
    said: Path
    chance: random.Random
    mounted: bool
    clock: Path | None
    processes: int = 1
    regions: int = 0
    corrupted: dict[str, int] = field(default_factory=dict)
    given_up: int = 0
    begun: list[tuple[int, int]] = field(default_factory=list)
    others: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def begin(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start the run; -> its main process."""
        self.settle()
        self.said.touch()
        self.begun.append((self.said.stat().st_size, newest_whole_step(self.folder)))
        each = [environment] * self.processes
        if self.processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            count = str(self.processes)
            shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port,
                      "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
            each = [
                {**environment, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                for rank in range(self.processes)
            ]
        main, *self.others = [
            start(self.command, said=self.said, environment={**os.environ, **one}) for one in each
        ]
        return main

    def settle(self) -> None:
        """Wait until every process but the main one has left."""
        for process in self.others:
            left(process)
        self.others = []

    def finish(self) -> int:
        """Let the run come to its end; -> exit code of its main process."""
        code = left(self.begin(), patience=None)
        self.settle()
        return code

    def resumes(self) -> list[tuple[int, int]]:
        """Where each start that trained went on (0: anew), and where it should have.

        A start that found no state is none.
        """
        if not self.begun:
            return []
        words = self.said.read_bytes()
        ends = [*(place for place, _ in self.begun[1:]), len(words)]
        found = []
        for (place, newest), end in zip(self.begun, ends, strict=True):
            if match := _RESUMED.search(words[place:end]):
                found.append((int(match.group(1)), newest))
            elif newest and _ANEW.search(words[place:end]):
                found.append((0, newest))
        return found

    def last_words(self) -> str:
        """What the processes of the last start said, their end."""
        if not self.begun:
            return ""
        return self.said.read_bytes()[self.begun[-1][0] :][-3000:].decode("utf-8", "replace")

    def running(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start the run and come back at a random moment after it has gone a step further.

        Raises:
            Ended: It did not get so far.
        """
        before, process = steps_logged(self.folder), self.begin(**environment)
        self.go_on(process, before)
        step_seconds = min(last_step_seconds(self.folder), _LONGEST_STEP_SECONDS)
        time.sleep(self.chance.uniform(0, 2 * step_seconds))
        return process

    def go_on(self, process: subprocess.Popen[bytes], before: int) -> None:
        """Wait until a process has logged more than a step.

        Raises:
            Ended: It left first.
        """
        began = time.monotonic()
        while steps_logged(self.folder) <= before:
            if process.poll() is not None:
                raise Ended(process.returncode)
            if time.monotonic() - began > PATIENCE_SECONDS:
                process.kill()
                raise SystemExit("the run makes no progress; look at it without faults first")
            time.sleep(0.05)


def left(process: subprocess.Popen[bytes], patience: float | None = PATIENCE_SECONDS) -> int:
    """Wait for a process to leave; -> its exit code.

    Raises:
        SystemExit: It does not.
    """
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise SystemExit("the process hangs after a fault") from None
