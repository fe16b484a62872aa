"""What a run file names, found and opened: the model's folder and tokenizer, the rows, the base.

model named -> folder, configuration, tokenizer -> records -> encoded rows -> base in NF4; `setup`
goes on from there. Reads the configuration; everything it calls takes plain values.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import is_flash_attn_2_available

from qlora_trainer.base.dtype import choose_compute_dtype
from qlora_trainer.base.hub import ResolvedModel, resolve_model
from qlora_trainer.base.load import BaseSpec, load_base, load_config
from qlora_trainer.base.machine import choose_device
from qlora_trainer.base.packed_attention import use_packed_attention
from qlora_trainer.config.settings import RunConfig, SourceSettings
from qlora_trainer.data.dataset import EncodedDataset, build_dataset, split_eval
from qlora_trainer.data.encode import choose_pad_id
from qlora_trainer.data.faults import FaultLog, TooManyFaults
from qlora_trainer.data.formats import rename
from qlora_trainer.data.isolation import refuse_packing_leak
from qlora_trainer.data.read import DataSource, open_source
from qlora_trainer.data.rows import RecordEncoder
from qlora_trainer.errors import UserError
from qlora_trainer.lora.peft_config import read_json
from qlora_trainer.tasks.catalogue import task_kind
from qlora_trainer.tasks.kind import EncoderInputs, TaskKind

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ModelSource:
    """A model found, its tokenizer read, nothing heavy loaded.

    Attributes:
        kind: The task it is for.
        resolved: Folder and, for a hub model, the commit.
        config: transformers' configuration.
        tokenizer: The model's own; None for a task that reads images.
        processor: The model's image processor, for such a task.
        device: Where it is going to live.
        base_spec: How it is going to be held.
        stop_ids: Tokens that end an answer, by the model's generation settings.
    """

    kind: TaskKind
    resolved: ResolvedModel
    config: Any
    tokenizer: Any
    processor: Any
    device: torch.device
    base_spec: BaseSpec
    stop_ids: tuple[int, ...]


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


def open_model(run: RunConfig) -> ModelSource:
    """Find the model and read what is light: configuration and tokenizer.

    Raises:
        UserError: It is not there, is broken, or does not fit the device or the settings.
    """
    model, kind = run.model, task_kind(run.task)
    try:
        device = choose_device(model.device)
    except ValueError as error:
        raise UserError(f"model.device = {model.device!r}: {error}") from None
    check_attention(model.attention, device)
    resolved = resolve_model(
        model.source, model.revision, trust_remote_code=model.trust_remote_code
    )
    config = load_config(resolved.folder, trust_remote_code=model.trust_remote_code)
    compute_dtype = choose_compute_dtype(model.compute_dtype, device, config.model_type)
    spec = base_spec(run, compute_dtype)
    reads_text = kind.reads == "text"
    tokenizer = _read_tokenizer(resolved, model) if reads_text else None
    processor = None if reads_text else _read_processor(resolved, model)
    stop_ids = _stop_ids(resolved.folder)
    return ModelSource(kind, resolved, config, tokenizer, processor, device, spec, stop_ids)


def check_attention(attention: str, device: torch.device) -> None:
    """Refuse an attention kernel that the device or the installed packages do not have."""
    if attention != "flash_attention_2":
        return
    if device.type != "cuda":
        raise UserError(
            f"model.attention = {attention!r}: needs a GPU, but the device is {device}; take 'auto'"
        )
    if not is_flash_attn_2_available():
        raise UserError(
            f"model.attention = {attention!r}: flash-attn 2.3.3 or newer is not installed; "
            "pip install flash-attn, or take 'auto'"
        )


def _stop_ids(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of the model's generation settings, which may be several or none."""
    file = folder / "generation_config.json"
    try:
        given = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except FileNotFoundError:
        return ()
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: is not a JSON object: {error}") from None
    return tuple(given) if isinstance(given, list) else () if given is None else (given,)


def _read_tokenizer(resolved: ResolvedModel, model: Any) -> Any:
    try:
        return AutoTokenizer.from_pretrained(
            str(resolved.folder), local_files_only=True, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise UserError(
            f"model.source = {model.source!r}: its tokenizer cannot be read from "
            f"{resolved.folder}: {error}"
        ) from error


def _read_processor(resolved: ResolvedModel, model: Any) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(
            str(resolved.folder),
            local_files_only=True,
            trust_remote_code=model.trust_remote_code,
            backend="pil",  # the other one is torchvision
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise UserError(
            f"model.source = {model.source!r}: its image processor cannot be read from "
            f"{resolved.folder}: {error}"
        ) from error


def base_spec(run: RunConfig, compute_dtype: torch.dtype) -> BaseSpec:
    """How the base is held."""
    model = run.model
    return BaseSpec(
        quantization=model.quantization,
        double_quant=model.double_quant,
        block_size=model.block_size,
        compute_dtype=compute_dtype,
        attention=None if model.attention == "auto" else model.attention,
        keep_unquantized=tuple(model.keep_unquantized),
        trust_remote_code=model.trust_remote_code,
        embeddings_on_host=model.embeddings_on_host,
    )


def check_length(run: RunConfig, config: Any) -> None:
    """Refuse sequences longer than the model knows positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and run.data.max_seq_len > limit:
        raise UserError(
            f"data.max_seq_len = {run.data.max_seq_len}: {run.model.source} knows {limit} "
            f"positions; take {limit} or less"
        )


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
    named = Path(run.adapter.init_from).expanduser()
    for folder in (named / "adapter", named):
        if (folder / "adapter_config.json").is_file():
            return folder.absolute()
    raise UserError(
        f"adapter.init_from = {run.adapter.init_from!r}: is neither a finished run nor an adapter "
        "(adapter_config.json)"
    )


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


def load_model(
    run: RunConfig,
    source: ModelSource,
    progress: Progress | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """Load the base, frozen, onto its device.

    Args:
        run: The settings.
        source: The model.
        progress: Told of every tensor.
        settings: What the data says of the model's configuration (its labels); without, what the
            run file alone says.

    Raises:
        UserError: The checkpoint is not whole, or the model lets packed examples see each other.
    """
    kind = source.kind
    if settings is None:
        settings = kind.weightless_settings(run.task_settings.model_dump())
    model = load_base(
        source.resolved.folder,
        kind.auto_class,
        source.base_spec,
        source.device,
        progress=progress,
        new_heads_allowed=kind.new_head,
        head_seed=run.train.seed,
        config_changes=dict(settings),
    )
    if run.data.packing:
        if run.data.mask_free_packing:
            # an attention it does not know builds its own mask
            use_packed_attention(model, run.data.max_seq_len)
        refuse_packing_leak(model, source.device, source.config.get_text_config().vocab_size)
    return model
