"""A run under every fault we know, again and again; at its end, not one bit may differ.

    .venv/bin/python scripts/chaos.py RUN.yaml --minutes N [--json FILE] [--only KIND,...]
        [--of-two RUN.yaml]

One run is left alone. Another meets faults (`faults.py`) at random moments until it ends; then
both adapters are compared byte by byte, and the next round begins, until the minutes are over and
every kind has struck at least once. After each fault the newest whole state must be no older than
before it, no more steps may be lost than lie between two saves, and the run must go on from exactly
there: no step is lost that was saved. Faults for two processes are done to a run of two, beside
another of two that is left alone: sums over processes are added in an order of their own.

Minutes count while this program can work: not those in which the machine is held.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from faults import FAULTS, missing
from rounds import Chaos
from storm import Storm
from training_process import memory_growth, train_command
from working_clock import WorkingClock

from qlora_trainer.config.read import read_run_file

_LATE_ROUNDS = 5  # after the time is over: a run too short for a kind is told, not tried for ever
_DISK_BYTES = 1 << 29  # of the small disk that fills up; memory is taken as it is used
_FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")  # Debian's place
_STRIKES_OF_SEVERAL = 4  # a round, where a run of several processes takes long


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


class Place:
    """Where one run file is trained by so many processes: own copies of what is damaged there."""

    def __init__(
        self, arguments: argparse.Namespace, processes: int, made: Path, mounted: bool
    ) -> None:
        several = processes > 1 and arguments.of_two is not None
        self._run_file = arguments.of_two if several else arguments.run_file
        overrides = [] if several else arguments.overrides
        made.mkdir()
        copies = _own_copies(self._run_file, overrides, made)
        changes = [*overrides, *(f"{key}={path}" for key, path in copies.items())]
        self._changes = [*changes, f"data.cache_folder={made / 'cache'}"]
        self._arguments, self._made, self._mounted, self._copies = arguments, made, mounted, copies
        self._processes = processes
        config = read_run_file(self._run_file, overrides)
        every = config.output.save_every_steps
        if every is None:
            raise SystemExit("chaos counts steps: the run file must set output.save_every_steps")
        self._steps_between_saves = every
        self.facts = {"model": Path(config.model.source).name, "steps": config.train.max_steps,
                      "steps_between_saves": every}  # fmt: skip

    def storm(self, folder: Path) -> Storm:
        """One run in a folder."""
        clock = self._arguments.faketime or _FAKETIME
        return Storm(
            train_command(self._run_file, [*self._changes, f"output.folder={folder}"]), folder,
            self._copies.get("data.train"), self._copies.get("model.source"),
            self._made / f"said-{folder.name}.txt", random.Random(self._arguments.seed),
            self._mounted, clock if clock.is_file() else None, self._processes,
        )  # fmt: skip

    def chaos(self, disk: Path, skipped: dict[str, str]) -> Chaos | None:
        """The faults for so many processes, after a run of as many without any; None without."""
        storm, only = self.storm(disk / f"run-{self._processes}"), self._arguments.only
        wanted = only.split(",") if only else list(FAULTS)
        wanted = [kind for kind in wanted if FAULTS[kind].processes == self._processes]
        here = {kind: why for kind in wanted if (why := missing(kind, storm))}
        for kind, why in here.items():
            print(f"{kind}: left out, {why}", flush=True)
        skipped |= here
        if not (kinds := [kind for kind in wanted if kind not in here]):
            return None
        print(f"Training without faults, processes: {self._processes} ...", flush=True)
        calm = self.storm(self._made / "calm")
        if calm.finish() != 0:
            raise SystemExit(f"it fails without any fault:\n{calm.said.read_text()[-2000:]}")
        self.facts["memory"] = memory_growth(calm.folder)
        most = _STRIKES_OF_SEVERAL if self._processes > 1 else None
        return Chaos(storm, calm.folder, kinds, self._steps_between_saves, most)


def run_chaos(arguments: argparse.Namespace, tell: Callable[[dict[str, Any]], None]) -> None:
    """All runs; what they came to is told after each round."""
    began, clock = time.monotonic(), WorkingClock()
    skipped: dict[str, str] = {}
    with (
        tempfile.TemporaryDirectory(prefix="qlora-chaos-") as made,
        _small_disk(Path(made, "disk")) as mounted,
    ):
        places = {n: Place(arguments, n, Path(made, str(n)), mounted) for n in (1, 2)}
        found = {n: place.chaos(Path(made, "disk"), skipped) for n, place in places.items()}
        every = {count: chaos for count, chaos in found.items() if chaos is not None}
        facts = {"runs": {str(count): places[count].facts for count in every}}
        calm_seconds = clock.seconds

        def is_over() -> bool:
            return clock.seconds - calm_seconds >= 60 * arguments.minutes

        def seconds() -> dict[str, float]:
            return {
                "minutes": (clock.seconds - calm_seconds) / 60,
                "minutes_by_the_clock": (time.monotonic() - began) / 60,
            }

        late = 0
        while True:
            for chaos in every.values():
                if chaos.rounds and is_over() and not chaos.untried:
                    continue
                _round(chaos, is_over)
                tell(facts | _report(every, skipped) | seconds())
            untried = [kind for chaos in every.values() for kind in chaos.untried]
            if is_over() and not untried:
                return
            late += is_over()
            if late > _LATE_ROUNDS:
                raise SystemExit(f"the runs end before {', '.join(untried)} can strike")


def _round(chaos: Chaos, is_over: Callable[[], bool]) -> None:
    try:
        chaos.round(is_over)
    except SystemExit:
        said = chaos.storm.said
        print(said.read_text(errors="replace")[-3000:] if said.is_file() else "", file=sys.stderr)
        raise


def _report(every: dict[int, Chaos], skipped: dict[str, str]) -> dict[str, Any]:
    resumes = [pair for chaos in every.values() for pair in chaos.storm.resumes()]
    wrong = [f"went on after {at}, not {newest}" for at, newest in resumes if at != newest]
    return {
        "faults": {k: asdict(t) for chaos in every.values() for k, t in chaos.tallies.items()},
        "corrupted": {p: n for c in every.values() for p, n in c.storm.corrupted.items()},
        "skipped": skipped,
        "failures": [failure for chaos in every.values() for failure in chaos.failures] + wrong,
        "resumes": len(resumes),
        "rounds": {str(count): chaos.rounds for count, chaos in every.items()},
        "bits_different": sum(chaos.bits for chaos in every.values()),
        "bits_compared": sum(chaos.compared for chaos in every.values()),
    }


def main() -> int:
    """Command line: the storm, its table as JSON."""
    parser = argparse.ArgumentParser(description="Train under every fault; compare the bits.")
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--of-two", type=Path, help="another run file for two processes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--faketime", type=Path, help="libfaketime.so.1, where it is not installed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    report: dict[str, Any] = {}

    def tell(found: dict[str, Any]) -> None:
        report.update(found)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    run_chaos(arguments, tell)
    injected = sum(tally["injected"] for tally in report["faults"].values())
    print(
        f"{injected} faults, {report['resumes']} resumes, {sum(report['rounds'].values())} runs, "
        f"{report['bits_different']} bits different, {len(report['failures'])} failures"
    )
    return 1 if report["failures"] or report["bits_different"] else 0


if __name__ == "__main__":
    sys.exit(main())
