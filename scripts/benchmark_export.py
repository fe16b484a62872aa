"""Measure an export beside PEFT's `merge_and_unload`, on a checkpoint of a known model's shape.

    python scripts/benchmark_export.py --size 1.1b --json scripts/results/export.json
    python scripts/benchmark_export.py --proof runs/quickstart --json scripts/results/export.json

Each job runs in a fresh process that imports first and then waits; peak private memory (RssAnon)
is sampled from outside and given over what the imports took, pages mapped from files apart. The
weights are random, which changes neither time nor memory. Every job starts with the base's files
out of the page cache and ends with its own files forced to disk; copying the base's files under
the same conditions says how fast the disk is. All jobs run in turn, `--rounds` times; each is given
by its fastest round, with the seconds of all, and with the cores that were busy with anything else
meanwhile (other programs, the system's own threads).

`--proof` merges a trained run both ways and compares both with base + adapter, in native precision
and in fp32. The file gathers what several calls measure, each with its machine and its load.

Jobs: copy, original, dequantized (ours, fp16), peft (load in fp16, merge_and_unload,
save_pretrained).
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from export_checkpoint import SHAPES, make_checkpoint
from figures_file import record

REPOSITORY = Path(__file__).resolve().parents[1]
JOBS = ("copy", "original", "dequantized", "peft")


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, where the system lets a program ask for it."""
    if hasattr(os, "posix_fadvise"):
        for file in folder.iterdir():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def force_to_disk(folder: Path) -> None:
    """Wait until a folder's files stand on the disk."""
    for file in sorted(folder.iterdir()):
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())


def run_job(job: str, folder: Path) -> None:
    """In the measured process: import, say so, wait for the word, work, say so."""
    import torch
    from transformers import AutoModelForCausalLM

    from qlora_trainer.base.load import BaseSpec
    from qlora_trainer.export.merged import prepare, write_candidate

    if job == "peft":
        import peft
    print("ready", flush=True)
    sys.stdin.readline()
    base, adapter, out = folder / "base", folder / "adapter", folder / f"out-{job}"
    out.mkdir()
    forget(base)
    started, worked, busy = time.perf_counter(), time.process_time(), busy_seconds()
    if job == "copy":
        for file in sorted(base.iterdir()):
            with file.open("rb") as source, (out / file.name).open("wb") as target:
                shutil.copyfileobj(source, target, 2**23)
    elif job == "peft":
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
        merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(out)
    else:
        prepared = prepare(base, adapter, AutoModelForCausalLM, BaseSpec("nf4"), dtype="fp16")
        way: Any = job
        write_candidate(prepared, out, way, max_shard_bytes=5 * 10**9)
    force_to_disk(out)
    seconds, processor = time.perf_counter() - started, time.process_time() - worked
    figures = {"seconds": seconds, "processor_seconds": processor}
    if busy is not None:
        figures["cores_busy_elsewhere"] = max(0.0, busy_seconds() - busy - processor) / seconds
    print(json.dumps(figures), flush=True)


def busy_seconds() -> float | None:
    """Processor time anything on this machine has used since it started, where that is told."""
    file = Path("/proc/stat")
    if not file.is_file():
        return None
    user, nice, system, _, _, irq, softirq = map(int, file.read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> dict[str, int]:
    """Private and file-mapped resident bytes of a process."""
    found = {"RssAnon": 0, "RssFile": 0}
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return found
    for line in text.splitlines():
        key = line.partition(":")[0]
        if key in found:
            found[key] = int(line.split()[1]) * 1024
    return found


def measure(job: str, folder: Path, threads: int) -> dict[str, Any]:
    """Run one job in a fresh process and watch its memory."""
    command = [sys.executable, __file__, "--job", job, "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, cwd=REPOSITORY,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{job} did not start:\n{process.stderr.read()[-2000:]}")
        before = resident(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        peak = dict(before)
        while process.poll() is None:
            now = resident(process.pid)
            peak = {key: max(peak[key], now[key]) for key in peak}
            time.sleep(0.002)
        lines = process.stdout.read().strip().splitlines()
        if process.returncode != 0 or not lines:
            raise SystemExit(f"{job} failed:\n{process.stderr.read()[-2000:]}")
    shutil.rmtree(folder / f"out-{job}")
    return {
        **{key: round(float(value), 3) for key, value in json.loads(lines[-1]).items()},
        "peak_private_bytes": peak["RssAnon"] - before["RssAnon"],
        "peak_mapped_bytes": peak["RssFile"] - before["RssFile"],
    }


def prove(run: Path) -> dict[str, Any]:
    """Figures of both ways of merging a trained run, against base + adapter."""
    import dataclasses

    from qlora_trainer.export.export import export_merged
    from qlora_trainer.run.export import held_out_proof, open_export

    opened = open_export(run)
    request = dataclasses.replace(held_out_proof(opened), precisions=("native", "fp32"))
    with tempfile.TemporaryDirectory(prefix="benchmark-export-") as place:
        report = export_merged(
            opened.export, Path(place) / "merged", dtype="fp16", onto="best", proof=request
        ).report
    return shown_of(report)


def shown_of(report: dict[str, Any]) -> dict[str, Any]:
    """What the README shows of an export's report."""
    return {
        **{key: report[key] for key in ("base", "adapter", "dtype", "kept", "reason", "rows",
                                        "transformers", "torch")},
        "ways": {
            way: {precision: proof["figures"] for precision, proof in part["proof"].items()}
            for way, part in report["ways"].items()
        },
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """Where the figures were measured."""
    import peft
    import psutil
    import torch
    import transformers

    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.processor(),
    )  # fmt: skip
    return {
        "cpu": model, "cpus": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total,
        "torch": torch.__version__, "transformers": transformers.__version__,
        "peft": peft.__version__,
    }  # fmt: skip


def main() -> None:
    """Make the checkpoint, run the jobs, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="ci")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--proof", type=Path, metavar="RUN_DIR", help="prove a run instead")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=1, help="run all jobs so many times")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="also add the figures to this file")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        run_job(given.job, given.folder)
        return
    sys.path.insert(0, str(REPOSITORY))
    if given.proof:
        keep(given.json, "proof", {**prove(given.proof), "machine": machine()})
        return
    figures = measure_size(given)
    for name, value in figures["ratios"].items():
        print(f"{name}: {value}")


def keep(file: Path | None, key: str, figures: dict[str, Any]) -> None:
    """Write figures under their key, beside what the file holds already."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        record(file, key, figures, ("proof", *reversed(SHAPES)))


def measure_size(given: argparse.Namespace) -> dict[str, Any]:
    """Make the checkpoint and run the jobs."""
    with tempfile.TemporaryDirectory(prefix="benchmark-export-", dir=given.folder) as place:
        folder = Path(place)
        make_checkpoint(folder, given.size)
        weights = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
        shape = SHAPES[given.size]
        largest = 2 * max(shape["vocab_size"], shape["intermediate_size"]) * shape["hidden_size"]
        figures: dict[str, Any] = {
            "size": given.size, "weights_bytes": weights, "largest_tensor_bytes": largest,
            "bound_bytes": 3 * largest + 300 * 10**6, "threads": given.threads,
            "machine": machine(), "jobs": {},
        }  # fmt: skip
        for job in given.jobs * given.rounds:
            result = measure(job, folder, given.threads)
            print(
                f"{job:12} {result['seconds']:8.2f} s, of processor "
                f"{result['processor_seconds']:8.2f} s   private "
                f"{result['peak_private_bytes'] / 2**20:8.0f} MiB   mapped "
                f"{result['peak_mapped_bytes'] / 2**20:8.0f} MiB",
                flush=True,
            )
            note_round(figures["jobs"], job, result)
            figures["ratios"] = ratios(figures["jobs"])
            keep(given.json, given.size, figures)  # a later job may fail: keep what there is
    return figures


def ratios(jobs: dict[str, Any]) -> dict[str, float]:
    """Of times and memory, between the jobs that have been run."""
    return {
        f"{job}_over_{other}_{unit}": round(jobs[job][key] / jobs[other][key], 3)
        for job, other, unit, key in (
            ("original", "copy", "seconds", "seconds"),
            ("dequantized", "copy", "seconds", "seconds"),
            ("original", "peft", "seconds", "seconds"),
            ("original", "peft", "memory", "peak_private_bytes"),
            ("dequantized", "peft", "memory", "peak_private_bytes"),
        )
        if job in jobs and other in jobs
    }


def note_round(jobs: dict[str, Any], job: str, result: dict[str, Any]) -> None:
    """Keep the fastest round's figures, all rounds' seconds and the highest memory."""
    before = jobs.get(job, result)
    fastest = min(before, result, key=lambda round_: float(round_["seconds"]))
    highest = {key: max(before[key], result[key]) for key in result if key.startswith("peak_")}
    rounds = [*before.get("seconds_of_rounds", ()), result["seconds"]]
    jobs[job] = {**fastest, **highest, "seconds_of_rounds": rounds}


if __name__ == "__main__":
    main()
