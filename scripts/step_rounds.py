"""Contenders of `benchmark_step.py` side by side, each a process, taking turns step by step.

A shared machine changes its speed within minutes, by a third or more. Steps that follow each other
meet the same moment, so a ratio is taken between steps of one round, and the order changes with
every round: each round begins with another contender. Contenders are loaded one after another, as
loading takes more memory than what is loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from steps import REPOSITORY, Stop, say

T = TypeVar("T")
WARM_UP = 1  # rounds that count for the losses and the memory, not for the speed
# threads of OpenMP go on looking for work for some milliseconds after it ends
_FALL_ASLEEP_SECONDS = 0.05
_LEAVE_SECONDS = 60.0


class Contender:
    """One contender's process, waiting at its gate (`step_gate.py`) once it has loaded.

    Args:
        job: As `step_contender.py` takes it.

    Raises:
        Stop: It failed; its own last lines say how. So does `step`.
    """

    def __init__(self, job: Mapping[str, Any]) -> None:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(job["threads"]),
        }
        self._name = job["contender"]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "scripts" / "step_contender.py"), json.dumps(job)],
            env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
        )  # fmt: skip
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def step(self) -> dict[str, Any]:
        """Let it do one step; what that took."""
        assert self._process.stdin is not None
        try:
            print("go", file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._failure() from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        found: dict[str, Any] = json.loads(line)
        return found

    def _failure(self) -> Stop:
        code = self._process.wait()
        self._said.seek(0)
        last = "\n".join(self._said.read().strip().splitlines()[-5:])
        return Stop(f"{self._name} failed with exit code {code}:\n{last}")

    def close(self) -> None:
        """Send it home: at its gate it finds nobody there, and cleans up."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()


class SideBySide:
    """All contenders of a part, loaded one after another; closed with the block.

    Args:
        jobs: Of each by its name; ours first.
    """

    def __init__(self, jobs: Mapping[str, Mapping[str, Any]]) -> None:
        self._jobs = jobs
        self._contenders: dict[str, Contender] = {}

    def __enter__(self) -> SideBySide:
        try:
            for name, job in self._jobs.items():
                say(f"loading {name}")
                self._contenders[name] = Contender(job)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._close()

    def _close(self) -> None:
        for contender in self._contenders.values():
            contender.close()

    def round(self, number: int, rate: Callable[[], float]) -> dict[str, dict[str, Any]]:
        """One step of everybody.

        Args:
            number: Of the round; says who begins.
            rate: Measures the machine's operations per second; called between the steps.

        Returns:
            By contender, in the order of the jobs: what its step took, with `tokens_per_second`
            and `products_per_second`, the mean of the rates just before and just after it.
        """
        names = list(self._jobs)
        found, before = {}, _rested(rate)
        for name in turned(names, number):
            step = _rested(self._contenders[name].step)
            after = _rested(rate)
            step["tokens_per_second"] = step["tokens"] / step["step_seconds"]
            step["products_per_second"] = (before + after) / 2
            found[name], before = step, after
        return {name: found[name] for name in names}


def turned(names: Sequence[str], number: int) -> list[str]:
    """The order of a round.

    >>> turned(["ours", "peft", "trl"], 1)
    ['peft', 'trl', 'ours']
    """
    first = number % len(names)
    return [*names[first:], *names[:first]]


def _rested(work: Callable[[], T]) -> T:
    """Do the work when whoever worked before is asleep."""
    time.sleep(_FALL_ASLEEP_SECONDS)
    return work()
