"""What was saved, scored again by a process that knows nothing but the run folder.

A head that was not saved, labels in another order, an adapter that loads differently: all show
here. On a CPU the figures must be the same to the last bit; on a GPU kernels may be chosen anew,
so a small difference is allowed, and said.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from qlora_trainer.errors import UserError

CUDA_TOLERANCE = 0.005  # of each figure: rounding of other kernels, a few rows on the border


def rescore_in_fresh_process(folder: Path) -> dict[str, float]:
    """The metrics of a run's adapter on its held-out rows, by a process of its own.

    Raises:
        UserError: It cannot be loaded or scored there.
    """
    with tempfile.TemporaryDirectory(prefix="qlora-rescore-") as place:
        result = Path(place, "metrics.json")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", __name__, str(folder.absolute()), str(result),
             str(torch.get_num_threads())],
            capture_output=True, text=True, check=False,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        if done.returncode != 0 or not result.is_file():
            last = "\n  ".join(done.stderr.strip().splitlines()[-4:])
            raise UserError(
                f"{folder}: the saved adapter could not be scored in a fresh process (exit code "
                f"{done.returncode}). Its last words:\n  {last}"
            )
        metrics: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))
        return metrics


def require_same_metrics(
    trained: Mapping[str, float], saved: Mapping[str, float], device: torch.device
) -> float:
    """See that the saved adapter scores as the trained one did.

    Returns:
        The largest difference; 0 on a CPU.

    Raises:
        UserError: A figure differs (on a GPU: by more than `CUDA_TOLERANCE`).
    """
    allowed = 0.0 if device.type == "cpu" else CUDA_TOLERANCE
    differences = {
        name: abs(value - saved.get(name, float("inf"))) for name, value in trained.items()
    }
    wrong = [
        f"{name}: {trained[name]!r} when it was trained, {saved.get(name)!r} saved and loaded again"
        for name, difference in differences.items()
        if not difference <= allowed
    ]
    if wrong:
        raise UserError.from_faults(
            "the saved adapter is not the model that was trained; do not use it, and report this",
            wrong,
        )
    return max(differences.values(), default=0.0)


def prove_saved(folder: Path, trained: Mapping[str, float], device: torch.device) -> str:
    """Score a finished run again in a fresh process; -> what to say of it.

    Args:
        folder: The run folder, with its adapter.
        trained: Metrics of that adapter while it was trained.
        device: Where both run.

    Raises:
        UserError: What was saved is not what was trained.
    """
    difference = require_same_metrics(trained, rescore_in_fresh_process(folder), device)
    said = "the same figures" if not difference else f"the same figures within {difference:.2g}"
    return f"saved adapter and head, scored again by a fresh process: {said}"


def _main(folder: str, result: str, threads: str) -> None:
    from qlora_trainer.run.ask import load_trained
    from qlora_trainer.run.evaluate import evaluate_trained

    torch.set_num_threads(int(threads))
    metrics = evaluate_trained(load_trained(folder)).metrics
    Path(result).write_text(json.dumps(metrics), encoding="utf-8")


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except UserError as fault:
        sys.exit(str(fault))
