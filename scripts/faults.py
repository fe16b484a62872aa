"""What can happen to a training process, done to a real one from outside.

Each fault is a function of a `Storm`: it starts the run, waits until it has gone further, strikes,
mends what it broke, and returns how the process left: by signals, mounts, limits of the system,
files changed under its feet. What the machine does not allow is said by `missing`. Standard
library only.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from damage import REGIONS, STATE_FILES, corrupt, poisoned
from storm import Ended, Storm, left
from training_process import newest_whole_step, saved_states, steps_logged

STOPPED = 75  # how the trainer leaves when asked to stop
REFUSED = 2  # with a message for the user


def _stop(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    return left(process)


def kill(storm: Storm) -> int:
    """Killed in the midst of whatever it does: a step, a save, an evaluation."""
    process = storm.running()
    process.kill()
    return left(process)


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
        return left(process)
    finally:
        ballast.unlink(missing_ok=True)


def read_only(storm: Storm) -> int:
    """Its folder cannot be written any more."""
    process = storm.running()
    with _read_only(storm.folder):
        return left(process)


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
        return left(storm.begin())
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
    # Their numbers have no common factor: every file meets every region in turn.
    name = STATE_FILES[storm.regions % len(STATE_FILES)]
    region = REGIONS[storm.regions % len(REGIONS)]
    storm.regions += 1
    place = f"{name}, {region}"
    storm.corrupted[place] = storm.corrupted.get(place, 0) + 1
    had = newest_whole_step(storm.folder)
    corrupt(states[-1] / name, region, storm.chance)
    storm.given_up += max(0, had - newest_whole_step(storm.folder))
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
    return left(process) if process.poll() is not None else _stop(process)


def not_a_number(storm: Storm) -> int:
    """A weight of its base is read as NaN, so the loss of a batch is."""
    assert storm.model is not None
    with poisoned(storm.model):
        return left(storm.begin())


def one_of_two(storm: Storm) -> int:
    """One of two processes is killed, the main one or the other; how the other leaves."""
    main = storm.running()
    pair = [main, *storm.others]
    victim = pair.pop(storm.chance.randrange(len(pair)))
    victim.kill()
    left(victim)
    return left(pair[0])


@dataclass(frozen=True)
class Fault:
    """What happens, and how a process may leave: by signal (negative), saved, or refused.

    Attributes:
        strike: Does it; -> exit code.
        leaves_with: Exit codes that are as they should be.
        processes: How many train the run.
    """

    strike: Callable[[Storm], int]
    leaves_with: tuple[int, ...]
    processes: int = 1


FAULTS: Mapping[str, Fault] = {
    "kill": Fault(kill, (-signal.SIGKILL,)),
    "terminate": Fault(terminate, (STOPPED,)),
    "pause": Fault(pause, (STOPPED,)),
    "disk-full": Fault(disk_full, (REFUSED,)),
    "read-only": Fault(read_only, (REFUSED,)),
    "lost-data": Fault(lost_data, (REFUSED,)),
    "clock-back": Fault(clock_back, (STOPPED,)),
    "corrupted-state": Fault(corrupted_state, (STOPPED,)),
    "out-of-memory": Fault(out_of_memory, (REFUSED,)),
    "nan": Fault(not_a_number, (REFUSED,)),
    "one-of-two": Fault(one_of_two, (REFUSED,), processes=2),
}


def missing(kind: str, storm: Storm) -> str | None:
    """Why a fault cannot be done here; None where it can."""
    bound = os.geteuid() != 0 or storm.mounted  # modes do not bind root, mounts do
    reasons = {
        "disk-full": None if storm.mounted else "needs the right to mount a small disk",
        "read-only": None if bound else "needs the right to mount: modes do not bind root",
        "lost-data": None if storm.data else "data.train is not one local file",
        "clock-back": None if storm.clock else "needs libfaketime (--faketime FILE)",
        "out-of-memory": None if Path("/proc/self/statm").is_file() else "needs Linux",
        "nan": None if storm.model else "model.source is not a local folder",
    }
    return reasons.get(kind)
