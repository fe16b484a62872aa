"""A run under every fault we know, again and again; at its end, not one bit may differ.

    .venv/bin/python scripts/chaos.py RUN.yaml --minutes N [--json FILE] [--only KIND,...]

One run is left alone. Another meets faults (`faults.py`) at random moments until it ends; then
both adapters are compared byte by byte, and the next round begins, until the minutes are over and
every kind has struck at least once. After each fault the newest whole state must be no older than
before it, and the run must go on from exactly there: no step is lost that was saved.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from faults import FAULTS, Ended, Storm, missing, terminate
from training_process import (
    ADAPTER,
    bits_different,
    memory_growth,
    newest_whole_step,
    remove_run,
    saved_states,
    start,
    steps_logged,
    train_command,
)

from qlora_trainer.config.read import read_run_file

_LATE_ROUNDS = 5  # after the time is over: a run too short for a kind is told, not tried for ever
_DISK_BYTES = 1 << 29  # of the small disk that fills up; memory is taken as it is used
_FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")  # Debian's place


@dataclass
class Tally:
    """What came of one kind of fault."""

    injected: int = 0
    survived: int = 0
    steps_lost: int = 0
    most_steps_lost: int = 0
    left_with: dict[str, int] = field(default_factory=dict)


class Chaos:
    """Rounds of one storm, and what they add up to."""

    def __init__(self, storm: Storm, kinds: Sequence[str]) -> None:
        self.storm, self.kinds = storm, kinds
        self.tallies = {kind: Tally() for kind in kinds}
        self.failures: list[str] = []
        self.rounds = self.bits = self.compared = 0
        self._queue: list[str] = []

    def round(self, calm: Path, until: float) -> None:
        """One run to its end: faults while there is time or a kind left to try."""
        remove_run(self.storm.folder)
        try:
            while time.monotonic() < until or self.untried:
                self._strike(self._next())
        except Ended as end:
            if end.args[0] != 0:
                raise SystemExit(f"exit code {end.args[0]} without a fault") from None
        is_done = (self.storm.folder / "result.json").exists()
        if not is_done and (code := self.storm.begin().wait()) != 0:
            raise SystemExit(f"the run cannot be finished (exit code {code})")
        ours, theirs = ((folder / ADAPTER).read_bytes() for folder in (calm, self.storm.folder))
        self.rounds += 1
        self.bits += bits_different(ours, theirs)
        self.compared += 8 * len(ours)

    @property
    def untried(self) -> list[str]:
        """Kinds that have not struck yet."""
        return [kind for kind, tally in self.tallies.items() if not tally.injected]

    def _next(self) -> str:
        if not self._queue:
            self._queue = list(self.kinds)
            self.storm.chance.shuffle(self._queue)
        return self._queue.pop()

    def _strike(self, kind: str) -> None:
        storm, tally = self.storm, self.tallies[kind]
        fault, may_leave = FAULTS[kind]
        if not saved_states(storm.folder) and kind in ("lost-data", "nan"):
            terminate(storm)  # these strike as the run begins: let there be something to lose
        before = newest_whole_step(storm.folder)
        code = fault(storm)
        if code == 0:
            raise Ended(0)
        tally.injected += 1
        tally.left_with[str(code)] = tally.left_with.get(str(code), 0) + 1
        after = newest_whole_step(storm.folder)
        lost = steps_logged(storm.folder) - after
        tally.steps_lost += lost
        tally.most_steps_lost = max(tally.most_steps_lost, lost)
        fine = code in may_leave and (after >= before or kind == "corrupted-state")
        if fine:
            tally.survived += 1
        else:
            self.failures.append(f"{kind}: exit code {code}; whole state {before} -> {after}")
        print(f"{kind}: left with {code}, state of step {after}, {lost} lost", flush=True)


@contextmanager
def _small_disk(place: Path) -> Iterator[bool]:
    """A disk in memory mounted at a folder, where we may; whether it is."""
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(place)]
    mounted = shutil.which("mount") is not None and (
        subprocess.run(words, capture_output=True, check=False).returncode == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(place)], check=True)


def _own_copies(run_file: Path, overrides: Sequence[str], place: Path) -> dict[str, Path]:
    """Copies of what faults damage, by the setting that names it."""
    config = read_run_file(run_file, overrides)
    copies = {}
    if len(config.data.train) == 1 and (rows := Path(config.data.train[0].path)).is_file():
        copies["data.train"] = Path(shutil.copy(rows, place / rows.name))
    if (model := Path(config.model.source).expanduser()).is_dir():
        copies["model.source"] = Path(shutil.copytree(model, place / "model"))
    return copies


def run_chaos(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both runs; what they came to."""
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="qlora-chaos-") as made,
        _small_disk(Path(made, "disk")) as mounted,
    ):
        place = Path(made)
        copies = _own_copies(arguments.run_file, arguments.overrides, place)
        changes = [*arguments.overrides, *(f"{key}={path}" for key, path in copies.items())]
        changes.append(f"data.cache_folder={place / 'cache'}")

        def command(folder: Path) -> list[str]:
            return train_command(arguments.run_file, [*changes, f"output.folder={folder}"])

        said, calm = place / "said.txt", place / "calm"
        print("Training without faults ...", flush=True)
        if start(command(calm), said=said).wait() != 0:
            raise SystemExit(f"the run fails without any fault:\n{said.read_text()[-2000:]}")
        clock = arguments.faketime or _FAKETIME
        storm = Storm(
            command(place / "disk" / "run"), place / "disk" / "run", copies.get("data.train"),
            copies.get("model.source"), said, random.Random(arguments.seed), mounted,
            clock if clock.is_file() else None,
        )  # fmt: skip
        wanted = arguments.only.split(",") if arguments.only else list(FAULTS)
        skipped = {kind: why for kind in wanted if (why := missing(kind, storm))}
        for kind, why in skipped.items():
            print(f"{kind}: left out, {why}", flush=True)
        chaos = Chaos(storm, [kind for kind in wanted if kind not in skipped])
        until = time.monotonic() + 60 * arguments.minutes
        try:
            late = 0
            while chaos.rounds == 0 or time.monotonic() < until or chaos.untried:
                untried = chaos.untried
                chaos.round(calm, until)
                late = late + 1 if time.monotonic() > until and chaos.untried == untried else 0
                if untried and late == _LATE_ROUNDS:
                    raise SystemExit(f"the runs end before {', '.join(untried)} can strike")
        except SystemExit:
            print(said.read_text(errors="replace")[-3000:], file=sys.stderr)
            raise
        resumes = storm.resumes()
        wrong = [f"resumed after {at}, not {newest}" for at, newest in resumes if at != newest]
        return {
            "faults": {kind: asdict(tally) for kind, tally in chaos.tallies.items()},
            "skipped": skipped,
            "failures": chaos.failures + wrong,
            "resumes": len(resumes),
            "rounds": chaos.rounds,
            "bits_different": chaos.bits,
            "bits_compared": chaos.compared,
            "memory_growth": memory_growth(calm),
            "minutes": (time.monotonic() - began) / 60,
        }


def main() -> int:
    """Command line: the storm, its table as JSON."""
    parser = argparse.ArgumentParser(description="Train under every fault; compare the bits.")
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--faketime", type=Path, help="libfaketime.so.1, where it is not installed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    report = run_chaos(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    injected = sum(tally["injected"] for tally in report["faults"].values())
    print(
        f"{injected} faults, {report['resumes']} resumes, {report['rounds']} runs, "
        f"{report['bits_different']} bits different, {len(report['failures'])} failures"
    )
    return 1 if report["failures"] or report["bits_different"] else 0


if __name__ == "__main__":
    sys.exit(main())
