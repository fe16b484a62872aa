"""The second half of the proof, started: a new process, plain transformers, nothing of ours.

What runs there is `plain` (and `turns`, where the model is taken layer by layer), handed over as
text in a folder of its own; what comes back is one JSON file.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.base.device_memory import free_memory
from qlora_trainer.errors import UserError
from qlora_trainer.export import plain, turns
from qlora_trainer.export.proof import Precision, ProofRequest
from qlora_trainer.export.reference import References

# As torch says it of a card, cuBLAS of its workspace, and torch and Python of host memory.
_OUT_OF_MEMORY = (
    "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "MemoryError",
)  # fmt: skip


def compare_in_fresh_process(
    export: Path,
    references: References,
    request: ProofRequest,
    *,
    precision: Precision,
    trust_remote_code: bool,
    by: str = "model",
    gguf_file: str | None = None,
    config_folder: Path | None = None,
) -> dict[str, Any]:
    """Open the export in a new process and compare; -> its figures.

    Args:
        export: The folder.
        references: Of the same precision.
        request: What is compared.
        precision: "fp32", or the dtype the export is in.
        trust_remote_code: Whether the export may bring its own Python.
        by: "model", or "layer": hold one layer at a time.
        gguf_file: Open this file of the folder instead of its safetensors.
        config_folder: Whose configuration to open it with, where the file's own is not enough.

    Raises:
        UserError: The export does not open, or not with every weight in its place, or there is too
            little memory for it.
    """
    free_memory()  # this process' cache of base + adapter lies on the same card
    with tempfile.TemporaryDirectory(prefix="qlora-proof-") as place:
        result = Path(place, "result.json")
        job = {
            **comparison_job(
                export, references, request, precision=precision, by=by,
                trust_remote_code=trust_remote_code, gguf_file=gguf_file,
                config_folder=config_folder,
            ),
            "threads": torch.get_num_threads(),
            "result": str(result),
        }  # fmt: skip
        Path(place, "job.json").write_text(json.dumps(job), encoding="utf-8")
        for part in (plain, turns):
            text = Path(str(part.__file__)).read_text(encoding="utf-8")
            Path(place, Path(str(part.__file__)).name).write_text(text, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "plain.py", "job.json"],
            cwd=place, capture_output=True, text=True, check=False,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        if done.returncode != 0 or not result.is_file():
            raise UserError(last_words(done, by))
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if found["bad_keys"]:
        raise UserError.from_faults(
            "plain transformers does not find every weight of the export in its place",
            found["bad_keys"],
        )
    return found


def comparison_job(
    export: Path,
    references: References,
    request: ProofRequest,
    *,
    precision: Precision,
    by: str,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    config_folder: Path | None = None,
) -> dict[str, Any]:
    """What `plain.compare` is told, as JSON can hold it; arguments as above."""
    return {
        "folder": str(export.absolute()),
        "auto_class": references.auto_class,
        "dtype": "float32" if precision == "fp32" or gguf_file is not None else None,
        "gguf_file": gguf_file,
        "config_folder": None if config_folder is None else str(config_folder.absolute()),
        "rows": str(references.rows_file.absolute()),
        "reference": str(references.file.absolute()),
        "counts": references.counts,
        "columns": references.columns,
        "shift": references.shift,
        "by": by,
        "device": str(request.device),
        "trust_remote_code": trust_remote_code,
        "has_tokenizer": (export / "tokenizer_config.json").is_file(),
        "texts": list(request.texts),
    }


def last_words(done: "subprocess.CompletedProcess[str]", by: str) -> str:
    """Why a comparison came to nothing, and what helps, from how its process ended."""
    lines = done.stderr.strip().splitlines()
    without_memory = [line for line in lines if any(sign in line for sign in _OUT_OF_MEMORY)]
    if done.returncode == -9 or without_memory:
        ended = "was killed, most often for want of memory" if done.returncode == -9 else (
            f"ran out of memory ({without_memory[-1].strip()})"
        )  # fmt: skip
        or_else = "leave the proof out (--no-proof)" if by == "layer" else (
            "compare layer by layer (--proof-by layer)"
        )  # fmt: skip
        return (
            f"the process that compared the export {ended}; the export was removed. Close other "
            f"programs, or {or_else}"
        )
    last = "\n  ".join(lines[-4:])
    return (
        "the export was written, but plain transformers cannot run it in a new process "
        f"(exit code {done.returncode}); it was removed. Its last words:\n  {last}"
    )
