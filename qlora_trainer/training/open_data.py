"""The rows that a run file names: read, encoded or found encoded, held-out ones apart.

records -> encoder (the task's, with the labels of training or of an earlier adapter) -> encoded
rows. Reads the configuration; what it calls takes plain values.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_trainer.config.settings import RunConfig, SourceSettings
from qlora_trainer.data.dataset import EncodedDataset, build_dataset, split_eval
from qlora_trainer.data.encode import choose_pad_id
from qlora_trainer.data.faults import FaultLog, TooManyFaults
from qlora_trainer.data.formats import rename
from qlora_trainer.data.read import DataSource, open_source
from qlora_trainer.data.rows import RecordEncoder
from qlora_trainer.errors import UserError
from qlora_trainer.lora.peft_config import CONFIG_NAME, adapter_in, read_json
from qlora_trainer.tasks.kind import EncoderInputs, TaskKind
from qlora_trainer.training.open_model import ModelSource, check_length


@dataclass(frozen=True)
class RunData:
    """Encoded rows of a run.

    Attributes:
        train: Rows to learn.
        held_out: Rows to evaluate on, if any.
        encoder: What made them.
        pad_id: Fills shorter rows of a causal model; never trained.
    """

    train: EncodedDataset
    held_out: EncodedDataset | None
    encoder: RecordEncoder
    pad_id: int


def open_data(
    run: RunConfig,
    source: ModelSource,
    progress: Callable[[int], None] | None = None,
    *,
    known: Mapping[str, Any] | None = None,
) -> RunData:
    """Read and encode all rows, or find them encoded.

    Args:
        run: The settings.
        source: The model.
        progress: Told of rows read.
        known: Task settings that a trained adapter has settled, where there is one.

    Raises:
        UserError: With every faulty row, its file and line.
    """
    check_length(run, source.config)
    data = run.data
    known = _settled(run, source.kind) if known is None else known
    encoder = make_encoder(run, source, known=known)
    train = encode_sources(run, encoder, data.train, "data.train", progress)
    held_out = None
    if data.eval:
        held_out = encode_sources(run, encoder, data.eval, "data.eval", progress)
    if data.eval_fraction:
        train, held_out = split_eval(train, data.eval_fraction, run.train.seed)
    if held_out is not None and run.evaluation.max_rows is not None:
        held_out = held_out.select(range(min(len(held_out), run.evaluation.max_rows)))
    return RunData(train, held_out, encoder, pad_id(source))


def pad_id(source: ModelSource) -> int:
    """Fills shorter rows of a causal model; images need none."""
    return 0 if source.tokenizer is None else choose_pad_id(source.tokenizer)


def encode_sources(
    run: RunConfig,
    encoder: RecordEncoder,
    sources: Sequence[SourceSettings],
    name: str,
    progress: Callable[[int], None] | None = None,
) -> EncodedDataset:
    """Encode sources as the run says, or find them encoded.

    Args:
        run: The settings.
        encoder: Makes examples of records.
        sources: Where they are.
        name: What named them, for errors.
        progress: Told of rows read.

    Raises:
        UserError: With every faulty row, its file and line.
    """
    data = run.data
    try:
        return build_dataset(
            [DataSource(**item.model_dump()) for item in sources],
            encoder,
            max_seq_len=data.max_seq_len,
            over_length=data.over_length,
            cache_dir=_cache_folder(data.cache_folder),
            seed=run.train.seed,
            progress=progress,
        )
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def earlier_adapter(run: RunConfig) -> Path | None:
    """The adapter's folder that `adapter.init_from` means.

    Raises:
        UserError: It is not there.
    """
    if run.adapter.init_from is None:
        return None
    folder = adapter_in(Path(run.adapter.init_from).expanduser())
    if folder is None:
        raise UserError(
            f"adapter.init_from = {run.adapter.init_from!r}: is neither a finished run nor an "
            f"adapter ({CONFIG_NAME})"
        )
    return folder.absolute()


def _settled(run: RunConfig, kind: TaskKind) -> dict[str, Any]:
    """What the adapter that is gone on from has settled: its labels, in its order.

    Raises:
        UserError: The run file says other labels.
    """
    folder = earlier_adapter(run)
    if folder is None or not kind.new_head:
        return {}
    known = head_settings(folder)
    given = run.task_settings.labels
    if given is not None and given != known["labels"]:
        raise UserError(
            f"task_settings.labels = {given}: the adapter of adapter.init_from has "
            f"{known['labels']}; leave them out"
        )
    return known


def head_settings(adapter: Path) -> dict[str, Any]:
    """Task settings that the configuration beside an adapter settles: labels, kind of problem.

    Raises:
        UserError: It is not there.
    """
    # The file as it is: transformers would run the model's own code for these few values.
    config = read_json(adapter / "config.json")
    problem = (config.get("problem_type") or "single").split("_")[0]
    if problem == "regression":
        return {"problem": problem, "labels": None}
    names = config.get("id2label")
    if not names:  # transformers leaves out what is its default: two labels, numbered
        numbers = range(config.get("num_labels") or 2)
        return {"problem": problem, "labels": [f"LABEL_{number}" for number in numbers]}
    return {"problem": problem, "labels": [names[index] for index in sorted(names, key=int)]}


def make_encoder(
    run: RunConfig,
    source: ModelSource,
    *,
    labelled: bool = True,
    known: Mapping[str, Any] | None = None,
) -> RecordEncoder:
    """What makes examples of the run's records.

    Args:
        run: The settings.
        source: The model.
        labelled: False where records are to be predicted.
        known: Task settings that a trained adapter has settled, such as its labels.

    Raises:
        UserError: The settings do not fit the model, or the training data tells no labels.
    """
    settings = {**run.task_settings.model_dump(), **(known or {})}
    return source.kind.make_encoder(
        EncoderInputs(
            tokenizer=source.tokenizer,
            processor=source.processor,
            config=source.config,
            max_seq_len=run.data.max_seq_len,
            over_length=run.data.over_length,
            settings=settings,
            training_rows=lambda: _training_records(run),
            labelled=labelled,
            chat_template=run.model.chat_template,
            chat_template_kwargs=run.model.chat_template_kwargs,
            loss_on=run.data.loss_on,
        )
    )


def _training_records(run: RunConfig) -> Iterator[Mapping[str, Any]]:
    """All training records as they are; what cannot be read is told when it is encoded."""
    unread = FaultLog()
    for item in run.data.train:
        try:
            for row in open_source(DataSource(**item.model_dump())).rows(unread):
                yield rename(row.record, item.columns)
        except TooManyFaults:
            return


def _cache_folder(setting: str | None) -> Path:
    chosen = setting or os.environ.get("QLORA_CACHE") or "~/.cache/qlora_trainer"
    return Path(chosen).expanduser() / "data"
