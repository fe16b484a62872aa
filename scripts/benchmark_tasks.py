"""Tasks on real models and real data: the metric before and after, beside PEFT with the same steps.

    python scripts/benchmark_tasks.py --json results.json [--only sentiment] [--steps 200]

Ours is a whole run (4-bit base, adapter, head, scored again by a fresh process). PEFT trains the
same base in 16 bit, with the same micro-batches in the same order, rank, learning rate and steps,
torch's AdamW and PEFT's own adapters and head; both are scored by the same code on the same rows.
The assets come with `assets.py`, `assets_words.py` and `assets_text.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch

from qlora_trainer.base.load import BaseSpec, load_base
from qlora_trainer.config.read import check_values
from qlora_trainer.run.report import Reporter
from qlora_trainer.run.train import train
from qlora_trainer.tasks.kind import TaskInputs
from qlora_trainer.tasks.task import to_device
from qlora_trainer.training import setup
from qlora_trainer.training.evaluate import evaluate
from qlora_trainer.training.schedule import learning_rate_factor
from qlora_trainer.training.step import seed_random

CACHE = Path(__file__).resolve().parents[1] / ".cache"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One task on one model and one data set; settings beside the common ones."""

    task: str
    model: str
    data: str
    suffix: str = "jsonl"
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


CASES = {
    "sentiment": Case("sequence-classification", "minilm", "sentiment"),
    "newsgroups": Case("sequence-classification", "minilm", "newsgroups"),
    "sentiment-decoder": Case("sequence-classification", "smollm2", "sentiment"),
    "entities": Case("token-classification", "minilm", "tweet-entities", "conll"),
    "questions": Case(
        "question-answering", "minilm", "disfl-qa", settings={"data": {"max_seq_len": 384}}
    ),
}


def settings_of(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """The run file of our side."""
    data = CACHE / "data" / case.data
    values: dict[str, dict[str, Any]] = {
        "model": {"source": str(CACHE / "models" / case.model), "device": "cpu"},
        "adapter": {"rank": 8, "alpha": 16.0},
        "data": {
            "train": str(data / f"train.{case.suffix}"),
            "eval": str(data / f"eval.{case.suffix}"),
            "max_seq_len": 128,
            "over_length": "truncate",
            "cache_folder": str(folder / "cache"),
        },
        "train": {
            "max_steps": steps,
            "micro_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
        },
        "evaluation": {"max_rows": 400},
        "output": {"folder": str(folder / "run")},
    }
    for section, more in case.settings.items():
        values[section] = {**values[section], **more}
    return {"task": case.task, **values}


class Said(Reporter):
    """Shows what is said, so that one sees it is alive."""

    def say(self, line: str) -> None:
        """Show a line."""
        print(f"   {line}", file=sys.stderr)


def ours(run: Any) -> dict[str, Any]:
    """A whole run of this package."""
    start = time.perf_counter()
    result = train(run, reporter=Said())
    return {"metrics": result.metrics, "seconds": round(time.perf_counter() - start, 1)}


def with_peft(run: Any) -> dict[str, Any]:
    """The same rows, steps and learning rate with PEFT on a 16-bit base."""
    source = setup.open_model(run)
    data = setup.open_data(run, source)
    spec = BaseSpec("none", compute_dtype=source.base_spec.compute_dtype)
    base = load_base(
        source.resolved.folder, source.kind.auto_class, spec, CPU, new_heads_allowed=True,
        head_seed=run.train.seed, config_changes=setup.model_settings(data.encoder),
    )  # fmt: skip
    settings = peft.LoraConfig(
        r=run.adapter.rank, lora_alpha=int(run.adapter.alpha), target_modules="all-linear",
        task_type=source.kind.peft_type,
    )  # fmt: skip
    model = peft.get_peft_model(base, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.train.learning_rate, weight_decay=0.0)
    task = source.kind.make_task(
        TaskInputs(base, run.task_settings.model_dump(), data.encoder, data.train)
    )
    windows = setup.make_windows(run, data, base.config._attn_implementation)
    plan = setup.training_plan(run, windows, task)
    begin = setup.eval_batches(run, data)
    assert begin is not None
    references = setup.references(run, data)
    start = time.perf_counter()
    model.train()
    for step in range(plan.total_steps):
        factor = learning_rate_factor(
            step, total_steps=plan.total_steps, warmup_steps=plan.warmup_steps,
            schedule=plan.schedule,
        )  # fmt: skip
        optimizer.param_groups[0]["lr"] = plan.learning_rate * factor
        seed_random(plan.seed, step, 0)
        for batch in windows.window(step):
            prepared = to_device(task.prepare(batch), CPU)
            (task.loss_sum(model, prepared) / task.loss_weight(prepared)).backward()
        torch.nn.utils.clip_grad_norm_(trained, plan.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
    metrics = evaluate(model, begin(), task=task, device=CPU, references=references)
    total = sum(p.numel() for p in model.parameters())
    return {
        "metrics": metrics,
        "trained_share": sum(p.numel() for p in trained) / total,
        "best_by": task.best_metric,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> int:
    """Run the cases and write their figures as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where figures are written")
    parser.add_argument("--only", choices=CASES, action="append", help="only this case")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    given = parser.parse_args()
    figures: dict[str, Any] = {}
    for name in given.only or CASES:
        case = CASES[name]
        with tempfile.TemporaryDirectory(prefix="benchmark-tasks-") as place:
            run = check_values(settings_of(case, Path(place), given.steps), name=name)
            figures[name] = {"steps": given.steps, "ours": ours(run), "peft": with_peft(run)}
        best = figures[name]["peft"]["best_by"]
        sides = {side: figures[name][side]["metrics"] for side in ("ours", "peft")}
        print(
            f"{name}: {best} {sides['ours'][f'{best}_before']:.4f} before, "
            f"{sides['ours'][best]:.4f} ours, {sides['peft'][best]:.4f} PEFT"
        )
        given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
