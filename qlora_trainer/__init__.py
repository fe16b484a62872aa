"""Fine-tune models in 4 bit on one GPU: foreseen before, exact throughout, proven after."""

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qlora_trainer.errors import UserError
    from qlora_trainer.run.ask import Trained, generate, load_trained
    from qlora_trainer.run.check import audit, check, doctor, load_run
    from qlora_trainer.run.evaluate import held_out_metrics
    from qlora_trainer.run.report import Reporter
    from qlora_trainer.run.train import TrainResult, train

# No telemetry, ours or the hub client's; it reads this when it is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# On import bitsandbytes advises CPU users to fetch a kernel from the hub; we never use that kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOME = {
    "UserError": "errors",
    "Trained": "run.ask",
    "generate": "run.ask",
    "load_trained": "run.ask",
    "audit": "run.check",
    "check": "run.check",
    "doctor": "run.check",
    "load_run": "run.check",
    "held_out_metrics": "run.evaluate",
    "Reporter": "run.report",
    "TrainResult": "run.train",
    "train": "run.train",
}

__all__ = [
    "Reporter",
    "TrainResult",
    "Trained",
    "UserError",
    "audit",
    "check",
    "doctor",
    "generate",
    "held_out_metrics",
    "load_run",
    "load_trained",
    "train",
]


def __getattr__(name: str) -> Any:
    """Bring a public name on first use, so that importing the package imports no torch."""
    if name in _HOME:
        return getattr(import_module(f"qlora_trainer.{_HOME[name]}"), name)
    raise AttributeError(f"module 'qlora_trainer' has no attribute {name!r}")
