"""Fuzz every reader, guided by coverage (atheris): nothing but errors made for users may come out.

    .venv/bin/python scripts/fuzz.py --minutes N [--json FILE] [--only NAME,...] [--corpus FOLDER]

Each target of `fuzz_targets.py` gets its share of the time in a process of its own, with a limit on
memory (2 GiB) and on one input (20 s), so that neither a hang nor a bomb goes unseen. Inputs that
found new paths stay in the corpus folder and are the start of the next run. libFuzzer counts by the
wall: time in which the machine was held is made up for, and an input that took too long counts when
it does so again, alone, on a machine that was not held. With `--only`, figures of other targets
that the file holds stay in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from working_clock import WorkingClock

MEGABYTES_AT_MOST = 2048
SECONDS_AT_MOST = 20
_WORTH_SECONDS = 5.0  # of time that is missing: another process takes some to begin
_DONE = re.compile(r"Done (\d+) (?:runs )?in")
_AT = re.compile(r"^#(\d+)\s", re.MULTILINE)


def fuzz_one(name: str, seconds: float, corpus: Path, clock: WorkingClock) -> dict[str, Any]:
    """One target in its own process; executions, and what was found."""
    corpus.mkdir(parents=True, exist_ok=True)
    executions = 0
    while seconds >= _WORTH_SECONDS:
        began, worked = time.monotonic(), clock.seconds
        found = _session(name, [str(corpus), f"-max_total_time={int(seconds)}"])
        executions += found["executions"]
        held = (time.monotonic() - began) - (clock.seconds - worked)
        was_held = found["too_slow"] and not _is_too_slow(name, found["content"], clock)
        if found["failed"] and not was_held:
            content = found["content"] and repr(found["content"])
            said = {"said": found["said"], "input": content}
            return {"executions": executions, "crashes": 1, **said}
        seconds = min(seconds, held)
    return {"executions": executions, "crashes": 0}


def _session(name: str, words: Sequence[str]) -> dict[str, Any]:
    """One process of libFuzzer's; what it did and found."""
    with tempfile.TemporaryDirectory(prefix="qlora-fuzz-") as made:
        found = Path(made, "found")
        found.mkdir()
        command = [
            sys.executable, __file__, "--target", name, *words, f"-timeout={SECONDS_AT_MOST}",
            f"-rss_limit_mb={MEGABYTES_AT_MOST}", "-max_len=4096", "-print_final_stats=1",
            f"-artifact_prefix={found}/",
        ]  # fmt: skip
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, "TMPDIR": made},  # libFuzzer ends without tidying up
        )
        said = done.stdout + done.stderr
        inputs = [path.read_bytes() for path in sorted(found.iterdir())]
    counted = [int(number) for number in (*_DONE.findall(said), *_AT.findall(said))]
    return {
        "executions": max(counted, default=0),
        "failed": done.returncode != 0,
        "too_slow": "ERROR: libFuzzer: timeout" in said,
        "said": said[-3000:],
        "content": inputs[0] if inputs else None,
    }


def _is_too_slow(name: str, content: bytes | None, clock: WorkingClock) -> bool:
    """Whether an input takes too long, alone, in a process that is not held meanwhile."""
    if content is None:
        return True
    while True:
        began, worked = time.monotonic(), clock.seconds
        with tempfile.TemporaryDirectory(prefix="qlora-fuzz-") as made:
            file = Path(made, "input")
            file.write_bytes(content)
            too_slow = _session(name, [str(file)])["too_slow"]
        if not too_slow or (time.monotonic() - began) - (clock.seconds - worked) < 1:
            return too_slow


def run_in_this_process(name: str, words: list[str]) -> None:
    """Hand the process over to atheris; it ends there."""
    import atheris

    with atheris.instrument_imports(include=["qlora_trainer"]):
        import fuzz_seeds
        import fuzz_targets
    tokenizer = fuzz_targets.small_tokenizer()
    corpus = Path(words[0])  # or one input, to be tried alone
    for number, seed in enumerate(fuzz_seeds.SEEDS.get(name, []) if corpus.is_dir() else []):
        (corpus / f"seed-{number}").write_bytes(seed)
    with tempfile.TemporaryDirectory(prefix="qlora-input-") as made:

        def once(content: bytes) -> None:
            with tempfile.TemporaryDirectory(dir=made) as place:
                fuzz_targets.run_target(name, content, Path(place), tokenizer)

        atheris.Setup([sys.argv[0], *words], once)
        atheris.Fuzz()


def main() -> int:
    """Command line: all targets in turn, what they came to as JSON."""
    parser = argparse.ArgumentParser(description="Fuzz every reader of the product.")
    parser.add_argument("--minutes", type=float, default=5.0, help="in all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help="names of targets, apart by commas")
    parser.add_argument("--corpus", type=Path, default=Path(".cache/fuzz"))
    arguments = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("left out: atheris is not installed (pip install 'qlora-trainer[fuzz]'; Linux)")
        return 0
    import fuzz_targets

    names = arguments.only.split(",") if arguments.only else list(fuzz_targets.TARGETS)
    seconds = max(5, int(60 * arguments.minutes / len(names)))
    clock, before = WorkingClock(), _held(arguments.json if arguments.only else None)
    found: dict[str, Any] = before["targets"]
    report: dict[str, Any] = {}
    for name in names:
        found[name] = fuzz_one(name, seconds, arguments.corpus / name.replace(" ", "-"), clock)
        print(f"{name}: {found[name]['executions']} executions, {found[name]['crashes']} crashes")
        if found[name]["crashes"]:
            print(found[name]["said"], found[name]["input"], sep="\n")
        sys.stdout.flush()
        report = {
            "executions": sum(one["executions"] for one in found.values()),
            "crashes": sum(one["crashes"] for one in found.values()),
            "minutes": before["minutes"] + clock.seconds / 60,
            "not_tried": [other for other in fuzz_targets.TARGETS if other not in found],
            "targets": found,
        }
        if arguments.json:  # after each: what was found is not lost with what comes next
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{report['executions']} executions, {report['crashes']} crashes")
    return 1 if report["crashes"] else 0


def _held(file: Path | None) -> dict[str, Any]:
    """What an earlier run has put into the file."""
    if file is None or not file.is_file():
        return {"minutes": 0.0, "targets": {}}
    held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return held


if __name__ == "__main__":
    if sys.argv[1:2] == ["--target"]:
        run_in_this_process(sys.argv[2], sys.argv[3:])
    sys.exit(main())
