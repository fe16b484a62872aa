"""What a run's bits depend on besides its settings: versions, device, dtype, threads, the base.

Recorded when a run begins and kept as it was; each resumption adds its own below `resumed`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.base.dtype import dtype_name
from qlora_trainer.base.machine import versions
from qlora_trainer.errors import UserError
from qlora_trainer.training.resume import differences

# A change of the others (system, Python, what reads files) moves no bit of a step.
_VERSIONS_THAT_COMPUTE = ("torch", "transformers", "bitsandbytes", "cuda", "qlora-trainer")


def describe_environment(
    device: torch.device,
    compute_dtype: torch.dtype,
    *,
    model_revision: str | None,
    base_fingerprint: str,
    processes: int = 1,
) -> dict[str, Any]:
    """Describe this process for `environment.json`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "versions": versions(),
        "device": name,
        "compute_dtype": dtype_name(compute_dtype),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "model_revision": model_revision,
        "base_fingerprint": base_fingerprint,
    }


def base_trained_on(run_folder: Path) -> str | None:
    """Fingerprint of the base a run was trained on; None where the folder is no run's.

    Raises:
        UserError: The run does not tell.
    """
    file = run_folder / "environment.json"
    if not (run_folder / "run.yaml").is_file():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["base_fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: does not tell what base was trained on: {error}") from None


def environment_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs and may change bits, a line each."""
    return [line for _, line in differences(_what_computes(old), _what_computes(new))]


def with_resumption(begun: Mapping[str, Any], resumed: Mapping[str, Any]) -> dict[str, Any]:
    """The environment of the beginning, with that of one more resumption below it."""
    return {**begun, "resumed": [*begun.get("resumed", []), dict(resumed)]}


def always_alike(environment: Mapping[str, Any]) -> bool:
    """Tell whether every resumption of a run computed, and evaluated, as its beginning did."""
    return not any(
        environment_changes(environment, resumed)
        or resumed.get("evaluation") != environment.get("evaluation")
        for resumed in environment.get("resumed", [])
    )


def _what_computes(environment: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: environment.get(name) for name in ("device", "compute_dtype", "threads")}
    kept["processes"] = environment.get("processes", 1)  # where none are told, one
    found = environment.get("versions", {})
    return kept | {f"versions.{name}": found.get(name) for name in _VERSIONS_THAT_COMPUTE}
