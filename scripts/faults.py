"""What can happen to a training process, done to a real one from outside.

Each fault is a function of a `Storm`: it starts the run, waits until it has gone further, strikes,
mends what it broke, and returns how the process left. Nothing in the trainer knows of any of this:
signals, mounts, limits of the system, files changed under its feet. What the machine does not
allow is said by `missing`. Standard library only.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from damage import REGIONS, STATE_FILES, corrupt, poisoned
from training_process import (
    last_step_seconds,
    newest_whole_step,
    saved_states,
    start,
    steps_logged,
)

STOPPED = 75  # how the trainer leaves when asked to stop
REFUSED = 2  # with a message for the user
PATIENCE_SECONDS = 1800.0
_RESUMED = re.compile(rb"resuming\s+after\s+step\s+(\d+)")


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
        regions: Next place to corrupt a state at.
        begun: Of each process, where its words begin and the newest whole state it found.
    """

    command: list[str]
    folder: Path
    data: Path | None
    model: Path | None
    said: Path
    chance: random.Random
    mounted: bool
    clock: Path | None
    regions: int = 0
    begun: list[tuple[int, int]] = field(default_factory=list)

    def begin(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start the run."""
        self.begun.append((self.said.stat().st_size, newest_whole_step(self.folder)))
        return start(self.command, said=self.said, environment={**os.environ, **environment})

    def resumes(self) -> list[tuple[int, int]]:
        """Where each process that resumed did so, and where it should have."""
        words = self.said.read_bytes()
        ends = [*(place for place, _ in self.begun[1:]), len(words)]
        found = []
        for (place, newest), end in zip(self.begun, ends, strict=True):
            if match := _RESUMED.search(words[place:end]):
                found.append((int(match.group(1)), newest))
        return found

    def running(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start the run and come back at a random moment after it has gone a step further.

        Raises:
            Ended: It did not get so far.
        """
        before, process = steps_logged(self.folder), self.begin(**environment)
        self.go_on(process, before)
        time.sleep(self.chance.uniform(0, 2 * last_step_seconds(self.folder)))
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
            time.sleep(0.01)


def _left(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise SystemExit("the process hangs after a fault") from None


def _stop(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    return _left(process)


def kill(storm: Storm) -> int:
    """Killed in the midst of whatever it does: a step, a save, an evaluation."""
    process = storm.running()
    process.kill()
    return _left(process)


def terminate(storm: Storm) -> int:
    """Asked to stop: saves, and leaves."""
    return _stop(storm.running())


def pause(storm: Storm) -> int:
    """Stopped in its tracks and let go on, as by a laptop's lid."""
    process = storm.running()
    process.send_signal(signal.SIGSTOP)
    time.sleep(storm.chance.uniform(0.2, 1.0))
    before = steps_logged(storm.folder)
    process.send_signal(signal.SIGCONT)
    storm.go_on(process, before)
    return _stop(process)


def disk_full(storm: Storm) -> int:
    """Its disk has no byte left."""
    process, ballast = storm.running(), storm.folder.parent / "ballast"
    try:
        process.send_signal(signal.SIGSTOP)  # or it writes between the asking and the taking
        os.waitpid(process.pid, os.WUNTRACED)
        with ballast.open("wb") as file:
            free = os.statvfs(storm.folder)
            size = free.f_bavail * free.f_frsize
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
        process.send_signal(signal.SIGCONT)
        return _left(process)
    finally:
        ballast.unlink(missing_ok=True)


def read_only(storm: Storm) -> int:
    """Its folder cannot be written any more."""
    process = storm.running()
    with _read_only(storm.folder):
        return _left(process)


@contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    if os.geteuid() != 0:
        mode = folder.stat().st_mode
        inside = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        for path in inside:
            path.chmod(0o555)
        try:
            yield
        finally:
            for path in inside:
                path.chmod(mode)
        return
    # Modes do not bind root; a mount over the folder does.
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def lost_data(storm: Storm) -> int:
    """The rows are gone when it is to go on."""
    assert storm.data is not None
    away = storm.data.with_suffix(".away")
    storm.data.rename(away)
    try:
        return _left(storm.begin())
    finally:
        away.rename(storm.data)


def clock_back(storm: Storm) -> int:
    """Its clock is a month behind the files it finds; this process's clock alone."""
    process = storm.running(LD_PRELOAD=str(storm.clock), FAKETIME="-30d", DONT_FAKE_MONOTONIC="1")
    return _stop(process)


def corrupted_state(storm: Storm) -> int:
    """The newest saved state is damaged, each time at another place."""
    while len(states := saved_states(storm.folder)) < 2:
        _stop(storm.running())
    count = len(STATE_FILES)
    name, region = STATE_FILES[storm.regions % count], REGIONS[storm.regions // count]
    storm.regions = (storm.regions + 1) % (count * len(REGIONS))
    corrupt(states[-1] / name, region, storm.chance)
    return _stop(storm.running())


def out_of_memory(storm: Storm) -> int:
    """The system gives it no more memory: the next allocation that needs some fails."""
    process = storm.running()
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") // 2
    before = steps_logged(storm.folder)
    resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
    for ahead in range(20):  # what it holds may be enough for a few more steps
        try:
            storm.go_on(process, before + ahead)
        except Ended:
            break
    return _left(process) if process.poll() is not None else _stop(process)


def not_a_number(storm: Storm) -> int:
    """A weight of its base is read as NaN, so the loss of a batch is."""
    assert storm.model is not None
    with poisoned(storm.model):
        return _left(storm.begin())


# Kind -> the fault, and how a process may leave it: by signal (negative), saved, or refused with a
# message. A fault for several processes (one of two killed) is one more line here: its function
# starts `storm.command` behind a launcher.
FAULTS: Mapping[str, tuple[Callable[[Storm], int], tuple[int, ...]]] = {
    "kill": (kill, (-signal.SIGKILL,)),
    "terminate": (terminate, (STOPPED,)),
    "pause": (pause, (STOPPED,)),
    "disk-full": (disk_full, (REFUSED,)),
    "read-only": (read_only, (REFUSED,)),
    "lost-data": (lost_data, (REFUSED,)),
    "clock-back": (clock_back, (STOPPED,)),
    "corrupted-state": (corrupted_state, (STOPPED,)),
    "out-of-memory": (out_of_memory, (REFUSED,)),
    "nan": (not_a_number, (REFUSED,)),
}


def missing(kind: str, storm: Storm) -> str | None:
    """Why a fault cannot be done here; None where it can."""
    reasons = {
        "disk-full": None if storm.mounted else "needs root, to mount a small disk",
        "read-only": None if shutil.which("mount") or os.geteuid() else "needs mount",
        "lost-data": None if storm.data else "data.train is not one local file",
        "clock-back": None if storm.clock else "needs libfaketime (--faketime FILE)",
        "out-of-memory": None if Path("/proc/self/statm").is_file() else "needs Linux",
        "nan": None if storm.model else "model.source is not a local folder",
    }
    return reasons.get(kind)
