"""Tasks on real models and real data: the metric before and after, beside PEFT with the same steps.

    python scripts/benchmark_tasks.py --json results.json [--only sentiment] [--steps 200]

Ours is a whole run (4-bit base, adapter, head, scored again by a fresh process). PEFT trains the
same base in 16 bit, with the same micro-batches in the same order, rank, learning rate and steps,
torch's AdamW and PEFT's own adapters and head; both are scored by the same code on the same rows.
A case whose model or data is not there is skipped, with the reason in the figures. The assets come
with `assets.py`, `assets_words.py`, `assets_text.py`, `assets_translation.py` and
`assets_images.py`.

No registry has a real encoder-decoder or ResNet inside a package, so those are small and random
(`random_models.py`; the figures say so): they show that both sides learn the same, not how well
such models translate or see.
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
from random_models import MAKERS, read_texts

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
_TEXT_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_WORDS, _TEXT = "assets_words.py", "assets_text.py"


@dataclass(frozen=True)
class Case:
    """One task on one model and one data set; settings beside the common ones.

    Attributes:
        task: As in the run file.
        model: Folder of a real model; where `is_random`, a key of `random_models.MAKERS`.
        data: Folder of the rows.
        made_by: Scripts that make both.
        suffix: Of the files of rows.
        settings: Sections of the run file.
        is_random: The model is made on the spot, with random weights.
    """

    task: str
    model: str
    data: str
    made_by: str
    suffix: str = "jsonl"
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_random: bool = False

    @property
    def weights(self) -> str:
        """What the base knows."""
        return "random" if self.is_random else "pretrained"

    def missing(self) -> str | None:
        """Why the case cannot be run here; None where it can."""
        needed = [f"data/{self.data}", *(() if self.is_random else (f"models/{self.model}",))]
        absent = [f".cache/{name}" for name in needed if not (CACHE / name).is_dir()]
        if not absent:
            return None
        return f"{' and '.join(absent)} cannot be found here; made by {self.made_by}"


CASES = {
    "sentiment": Case("sequence-classification", "minilm", "sentiment", f"{_WORDS}, {_TEXT}"),
    "newsgroups": Case("sequence-classification", "minilm", "newsgroups", f"{_WORDS}, {_TEXT}"),
    "sentiment-decoder": Case(
        "sequence-classification", "smollm2", "sentiment", f"assets.py, {_TEXT}"
    ),
    "entities": Case("token-classification", "minilm", "tweet-entities", _WORDS, "conll"),
    "questions": Case(
        "question-answering", "minilm", "disfl-qa", _WORDS, settings={"data": {"max_seq_len": 384}}
    ),
    "translation-t5": Case(
        "seq2seq-lm", "t5", "django-en-de", "assets_translation.py", is_random=True,
        settings={"task_settings": {"max_target_len": 64}},
    ),
    "translation-marian": Case(
        "seq2seq-lm", "marian", "django-en-fr", "assets_translation.py", is_random=True,
        settings={"task_settings": {"max_target_len": 64}},
    ),
    "pictures": Case("image-classification", "dinov2-small", "fashion", "assets_images.py"),
    "pictures-resnet": Case(
        "image-classification", "resnet", "fashion", "assets_images.py", is_random=True,
        settings={"adapter": {"target_modules": ["convolution"]}},
    ),
}  # fmt: skip


def settings_of(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """The run file of our side."""
    data = CACHE / "data" / case.data
    model = folder / "base" if case.is_random else CACHE / "models" / case.model
    values: dict[str, dict[str, Any]] = {
        "model": {"source": str(model), "device": "cpu"},
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
        values[section] = {**values.get(section, {}), **more}
    return {"task": case.task, **values}


def make_model(case: Case, folder: Path) -> None:
    """Make the base of a case that has none of its own, with a tokenizer of the training rows."""
    if not case.is_random:
        return
    is_text = case.task == "seq2seq-lm"
    rows = CACHE / "data" / case.data / f"train.{case.suffix}"
    MAKERS[case.model](folder / "base", read_texts(rows) if is_text else [])


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


def lora_config(run: Any, task_type: str | None) -> peft.LoraConfig:
    """PEFT's own choice of layers; where it has none for the task, the layers our run adapted."""
    if task_type in _TEXT_HEADS:
        return peft.LoraConfig(
            r=run.adapter.rank, lora_alpha=int(run.adapter.alpha), target_modules="all-linear",
            task_type=task_type,
        )  # fmt: skip
    written: Any = peft.LoraConfig.from_pretrained(str(Path(run.output.folder, "adapter")))
    return peft.LoraConfig(
        r=written.r, lora_alpha=written.lora_alpha, target_modules=written.target_modules,
        modules_to_save=written.modules_to_save,
    )  # fmt: skip


def with_peft(run: Any) -> dict[str, Any]:
    """The same rows, steps and learning rate with PEFT on a 16-bit base."""
    source = setup.open_model(run)
    data = setup.open_data(run, source)
    spec = BaseSpec("none", compute_dtype=source.base_spec.compute_dtype)
    base = load_base(
        source.resolved.folder, source.kind.auto_class, spec, CPU, new_heads_allowed=True,
        head_seed=run.train.seed, config_changes=setup.model_settings(data.encoder),
    )  # fmt: skip
    # PEFT puts its layers into the base itself, which is asked: its wrapper knows texts only.
    model: Any = base
    adapted = peft.get_peft_model(base, lora_config(run, source.kind.peft_type))
    if source.kind.peft_type in _TEXT_HEADS:
        model = adapted
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
        if why := case.missing():
            figures[name] = {"skipped": why}
            print(f"{name}: skipped, {why}")
            given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
            continue
        with tempfile.TemporaryDirectory(prefix="benchmark-tasks-") as place:
            make_model(case, Path(place))
            run = check_values(settings_of(case, Path(place), given.steps), name=name)
            figures[name] = {"steps": given.steps, "weights": case.weights}
            figures[name] |= {"ours": ours(run), "peft": with_peft(run)}
        best = figures[name]["peft"]["best_by"]
        sides = {side: figures[name][side]["metrics"] for side in ("ours", "peft")}
        print(
            f"{name} ({case.weights} base): {best} {sides['ours'][f'{best}_before']:.4f} before, "
            f"{sides['ours'][best]:.4f} ours, {sides['peft'][best]:.4f} PEFT"
        )
        given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
