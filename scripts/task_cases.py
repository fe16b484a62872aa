"""The cases of `benchmark_tasks.py`: a task on a model and a data set, and the run file of each.

Settings were chosen by a few short runs of ours, so that something is learned in minutes; PEFT gets
the same. Where a case takes a model or rows otherwise than they lie in the cache, they are made in
the folder of its run.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asset_files import write_jsonl
from random_models import MAKERS, read_texts

CACHE = Path(__file__).resolve().parents[1] / ".cache"
# A random base has all to learn: a high rank, more and larger steps (5e-3 learns less).
_FROM_NOTHING: dict[str, dict[str, Any]] = {
    # T5 casts what goes into `wo` to the dtype of its weight, which bitsandbytes makes uint8.
    # transformers leaves `wo` unquantized for that; here both sides do.
    "model": {"compute_dtype": "fp32", "keep_unquantized": ["wo"]},
    "adapter": {"rank": 64, "alpha": 128.0},
    "train": {"max_steps": 400, "micro_batch_size": 32, "learning_rate": 1e-3},
}
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
        seeds: Of the runs; more where few rows or steps make a figure depend on it.
        also: Metrics to show beside the task's own.
        still: Without the dropout of the base, which short runs only lose by; on both sides.
        excerpts: Only questions that have an answer, each with the sentence of its answer and the
            two around it: what is learned of spans in minutes shows there.
    """

    task: str
    model: str
    data: str
    made_by: str
    suffix: str = "jsonl"
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_random: bool = False
    seeds: tuple[int, ...] = (42,)
    also: tuple[str, ...] = ()
    still: bool = False
    excerpts: bool = False

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
    "sentiment": Case(
        "sequence-classification", "minilm", "sentiment", f"{_WORDS}, {_TEXT}", still=True,
        settings={"train": {"max_steps": 120}, "evaluation": {"max_rows": 600}},
        also=("macro_f1",),
    ),
    "newsgroups": Case(
        "sequence-classification", "minilm", "newsgroups", f"{_WORDS}, {_TEXT}", still=True,
        settings={"data": {"max_seq_len": 64}, "train": {"max_steps": 120},
                  "evaluation": {"max_rows": 500}},
        also=("macro_f1",),
    ),
    "sentiment-decoder": Case(
        "sequence-classification", "smollm2", "sentiment", f"assets.py, {_TEXT}",
        settings={"train": {"max_steps": 32}, "evaluation": {"max_rows": 240}},
    ),
    "entities": Case(
        "token-classification", "minilm", "tweet-entities", _WORDS, "conll", still=True,
        settings={"train": {"max_steps": 200}},
    ),
    "questions": Case(
        "question-answering", "minilm", "disfl-qa", _WORDS, still=True, excerpts=True,
        settings={"data": {"max_seq_len": 192}, "adapter": {"rank": 16, "alpha": 32.0},
                  "train": {"max_steps": 240, "micro_batch_size": 8}},
        also=("exact_match",), seeds=(42, 43),
    ),
    "translation": Case(
        "seq2seq-lm", "t5", "django-en-de", "assets_translation.py", is_random=True,
        settings={"task_settings": {"max_target_len": 64}, **_FROM_NOTHING},
        also=("token_accuracy", "bleu"), seeds=(42, 43, 44),
    ),
    "pictures": Case(
        "image-classification", "dinov2-small", "fashion", "assets_images.py",
        settings={"train": {"max_steps": 80}, "evaluation": {"max_rows": 400}},
    ),
    "pictures-resnet": Case(
        "image-classification", "resnet", "fashion", "assets_images.py", is_random=True,
        settings={"adapter": {"target_modules": ["convolution"]},
                  "train": {"max_steps": 400, "learning_rate": 3e-3},
                  "evaluation": {"max_rows": 500}},
    ),
}  # fmt: skip


def settings_of(case: Case, folder: Path, steps: int | None) -> dict[str, Any]:
    """The run file of our side; `make_inputs` fills the folder."""
    data = folder / "data" if case.excerpts else CACHE / "data" / case.data
    model = folder / "base" if case.is_random or case.still else CACHE / "models" / case.model
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
            "max_steps": 200,
            "micro_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "learning_rate": 7e-4,
            "activations": "keep",
        },
        "evaluation": {"max_rows": 400},
        "output": {"folder": str(folder / "run")},
    }
    for section, more in case.settings.items():
        values[section] = {**values.get(section, {}), **more}
    if steps is not None:
        values["train"]["max_steps"] = steps
    return {"task": case.task, **values}


def make_inputs(case: Case, folder: Path) -> None:
    """Make what a case takes otherwise than it lies in the cache."""
    data = CACHE / "data" / case.data
    if case.is_random:
        is_text = case.task == "seq2seq-lm"
        rows = read_texts(data / f"train.{case.suffix}") if is_text else []
        MAKERS[case.model](folder / "base", rows)
    elif case.still:
        shutil.copytree(CACHE / "models" / case.model, folder / "base")
        config = folder / "base" / "config.json"
        values = json.loads(config.read_text(encoding="utf-8"))
        quiet = {name: 0.0 for name in values if name.endswith(("dropout_prob", "_dropout"))}
        config.write_text(json.dumps({**values, **quiet}), encoding="utf-8")
    if case.excerpts:
        (folder / "data").mkdir()
        for name in ("train.jsonl", "eval.jsonl"):
            lines = (data / name).read_text(encoding="utf-8").splitlines()
            rows = [excerpt(row) for row in map(json.loads, lines) if row["answers"]["text"]]
            write_jsonl(folder / "data" / name, rows)


def excerpt(row: dict[str, Any]) -> dict[str, Any]:
    """A question with the sentence of its answer, the one before and the one after."""
    context, (start,) = row["context"], row["answers"]["answer_start"]
    begins = [0, *(end.end() for end in re.finditer(r"[.?!] ", context)), len(context)]
    number = max(index for index, begin in enumerate(begins[:-1]) if begin <= start)
    stop = start + len(row["answers"]["text"][0])
    first = begins[max(0, number - 1)]
    last = next(end for end in [*begins[number + 2 :], len(context)] if end >= stop)
    answers = {**row["answers"], "answer_start": [start - first]}
    return {**row, "context": context[first:last], "answers": answers}
