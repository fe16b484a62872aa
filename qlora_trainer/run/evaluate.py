"""A finished run scored and asked on a file: metrics, report and pictures; predictions as JSONL."""

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_trainer.base.files import write_text_atomically
from qlora_trainer.data.encode import Encoder
from qlora_trainer.errors import UserError
from qlora_trainer.lora.inject import adapters_disabled
from qlora_trainer.run.ask import Trained, generate, load_trained
from qlora_trainer.run.prompts import in_prompts, read_questions, source_like
from qlora_trainer.run.report import Reporter, rows_read
from qlora_trainer.tasks.task import ScoredTask, to_device
from qlora_trainer.training import setup
from qlora_trainer.training.evaluate import Evaluation, examine
from qlora_trainer.training.folder import EVALUATION


@dataclass(frozen=True)
class Evaluated:
    """What a file says of a run.

    Attributes:
        evaluation: Metrics, report, predictions.
        folder: Where they were written.
    """

    evaluation: Evaluation
    folder: Path


def evaluate_run(
    folder: str | Path,
    data: str | None = None,
    *,
    out: str | Path | None = None,
    adapter: bool = True,
    reporter: Reporter | None = None,
) -> Evaluated:
    """Score a finished run and write `metrics.json`, `report.txt` and pictures.

    Args:
        folder: The run folder.
        data: A file in the format of the training data; the run's own held-out rows unless given.
        out: Where to write; `evaluation` in the run folder unless given.
        adapter: False scores the base (with its head as it was before training).
        reporter: Told what happens.

    Raises:
        UserError: The folder is no finished run, or the file cannot be scored.
    """
    told = reporter or Reporter()
    trained = load_trained(folder, reporter=told)
    evaluation = evaluate_trained(trained, data, adapter=adapter, reporter=told)
    target = Path(out) if out is not None else Path(folder) / EVALUATION
    write_evaluation(evaluation, target)
    return Evaluated(evaluation, target)


def evaluate_trained(
    trained: Trained,
    data: str | None = None,
    *,
    adapter: bool = True,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Score a loaded run; see `evaluate_run`."""
    run, source = trained.run, trained.source
    parts = run_data(trained, data, reporter or Reporter())
    batches = setup.eval_batches(run, parts)
    if batches is None:
        raise UserError("the run has no held-out rows; name a file with --data")
    # Class weights are of the training rows: with a file of its own there are none.
    own = parts if data is None else None
    task = setup.make_task(run, trained.model, source, own, encoder=parts.encoder)
    with nullcontext() if adapter else adapters_disabled(trained.model):
        return examine(
            trained.model,
            batches(),
            task=task,
            device=source.device,
            references=setup.references(run, parts),
        )


def held_out_metrics(trained: Trained, *, adapter: bool = True) -> dict[str, float]:
    """The task's metrics on the run's held-out rows, with or without the adapter.

    Raises:
        UserError: The run has no held-out rows.
    """
    return evaluate_trained(trained, adapter=adapter).metrics


def run_data(trained: Trained, data: str | None, told: Reporter) -> setup.RunData:
    """The run's own data, or a file's rows as held-out ones.

    Raises:
        UserError: With every faulty row, its file and line.
    """
    run, source = trained.run, trained.source
    if data is None:
        return setup.open_data(run, source, rows_read(told), known=trained.known)
    held_out = setup.encode_sources(
        run, trained.encoder, [source_like(trained, data)], "--data", rows_read(told)
    )
    return setup.RunData(held_out, held_out, trained.encoder, setup.pad_id(source))


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write the figures, and the report and the pictures where there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(evaluation.metrics, indent=2)
    write_text_atomically(folder / "metrics.json", text + "\n")
    if evaluation.scores is None:
        return
    if evaluation.scores.report:
        write_text_atomically(folder / "report.txt", evaluation.scores.report + "\n")
    for name, draw in evaluation.scores.pictures.items():
        draw(folder / name)


def predict_file(
    folder: str | Path,
    data: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    prompt_template: str | None = None,
    examples: str | None = None,
    max_new_tokens: int | None = None,
    reporter: Reporter | None = None,
) -> int:
    """Write what a finished run says of every record of a file, one JSON object a line.

    Args:
        folder: The run folder.
        data: Records as in training; what is asked for need not be there.
        out: The JSONL file; whole, or not at all. Never the records themselves.
        overwrite: Whether a file there may be replaced.
        prompt_template: Text or file with `{prompt}`; a causal model is asked in it.
        examples: A file of questions and answers that stand before; of a causal model.
        max_new_tokens: Longest answer of a causal model, in tokens; 256 unless given.
        reporter: Told what happens.

    Returns:
        How many records.

    Raises:
        UserError: The folder is no finished run, a record is faulty, or `out` may not be written.
    """
    _check_out(data, Path(out), overwrite)
    told = reporter or Reporter()
    trained = load_trained(folder, reporter=told)
    if isinstance(trained.encoder, Encoder):
        source = source_like(trained, data)
        questions = read_questions(source, trained.encoder, answered=False)
        asked = in_prompts(trained, questions, prompt_template, examples)
        answers = generate(trained, asked, max_new_tokens=max_new_tokens or 256, raw=True)
        where = [question.where for question in questions]
        return _write_predictions(Path(out), where, [{"prediction": text} for text in answers])
    options = {
        "--prompt-template": prompt_template,
        "--examples": examples,
        "--max-new-tokens": max_new_tokens,
    }
    for name, value in options.items():
        if value is not None:
            raise UserError(f"{name}: {folder} is of task {trained.run.task}, which has no prompts")
    task = setup.make_task(
        trained.run, trained.model, trained.source, None, encoder=trained.encoder
    )
    assert isinstance(task, ScoredTask)  # as every task but the causal one
    encoder = setup.make_encoder(trained.run, trained.source, labelled=False, known=trained.known)
    rows = setup.encode_sources(
        trained.run, encoder, [source_like(trained, data)], "--data", rows_read(told)
    )
    data_at_hand = setup.RunData(rows, rows, encoder, setup.pad_id(trained.source))
    reference_of = setup.references(trained.run, data_at_hand)
    assert reference_of is not None  # likewise
    references = [reference_of(index) for index in range(len(rows))]
    records = task.tell(_predictions(trained, task, data_at_hand), references)
    places = list(dict.fromkeys(rows.where(index) for index in range(len(rows))))
    return _write_predictions(Path(out), places, records)


def _write_predictions(out: Path, places: Sequence[str], records: Sequence[Any]) -> int:
    text = "".join(
        json.dumps({"where": place, **record}, ensure_ascii=False) + "\n"
        for place, record in zip(places, records, strict=True)
    )
    write_text_atomically(out, text)  # makes the folder
    return len(records)


def _check_out(data: str, out: Path, overwrite: bool) -> None:
    """Refuse to write predictions over records, or over what nobody gave up."""
    records = Path(data).expanduser()
    same = records.resolve() == out.resolve()
    if same or (records.exists() and out.exists() and records.samefile(out)):
        raise UserError(f"--out {out}: is the file of --data; name another one")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")
    if os.path.lexists(out) and not overwrite:
        raise UserError(f"--out {out}: is there already; name another file, or pass --overwrite")


def _predictions(trained: Trained, task: ScoredTask, data: setup.RunData) -> list[Any]:
    """One per row, in order; like lengths are asked together."""
    batches = setup.eval_batches(trained.run, data)
    assert batches is not None  # the rows of the file stand as held-out ones
    found: dict[int, Any] = {}
    for batch in batches():
        prepared = to_device(task.prepare(batch), trained.source.device)
        answers = task.predict(trained.model, prepared)
        found.update(zip(batch["row"].tolist(), answers, strict=True))
    return [found[number] for number in sorted(found)]
