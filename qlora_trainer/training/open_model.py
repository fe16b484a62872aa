"""The model that a run file names: found, its light parts read, and loaded when its turn comes.

model named -> folder, configuration, tokenizer (`open_model`) ... -> base in NF4 (`load_model`);
the rows between are `open_data`'s. Reads the configuration; what it calls takes plain values.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import is_flash_attn_2_available

from qlora_trainer.base.dtype import choose_compute_dtype
from qlora_trainer.base.host_memory import keep_few_shapes, keep_freed_pages
from qlora_trainer.base.hub import ResolvedModel, resolve_model
from qlora_trainer.base.load import BaseSpec, load_base, load_config
from qlora_trainer.base.machine import choose_device
from qlora_trainer.base.packed_attention import use_packed_attention
from qlora_trainer.base.quantized_cache import cached_base
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.data.isolation import refuse_packing_leak
from qlora_trainer.errors import UserError
from qlora_trainer.tasks.catalogue import task_kind
from qlora_trainer.tasks.kind import TaskKind
from qlora_trainer.training.processes import ALONE, Processes

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


def open_model(run: RunConfig, processes: Processes = ALONE) -> ModelSource:
    """Find the model and read what is light: configuration and tokenizer.

    Args:
        run: The settings.
        processes: Those that hold it; this one's number on the machine is that of its card.

    Raises:
        UserError: It is not there, is broken, or does not fit the device or the settings.
    """
    model, kind = run.model, task_kind(run.task)
    try:
        device = choose_device(model.device, processes.local_rank)
    except ValueError as error:
        raise UserError(f"model.device = {model.device!r}: {error}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # bitsandbytes makes paged states for the current card
    if device.type == "cpu":
        keep_few_shapes()  # before the first matrix is multiplied
        keep_freed_pages()
    check_attention(model.attention, device)
    resolved = resolve_model(
        model.source, model.revision, trust_remote_code=model.trust_remote_code
    )
    config = load_config(resolved.folder, trust_remote_code=model.trust_remote_code)
    compute_dtype = choose_compute_dtype(model.compute_dtype, device, config.model_type)
    spec = base_spec(run, compute_dtype, processes.count)
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
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: is not a JSON object: {error}") from None
    return tuple(given) if isinstance(given, list) else () if given is None else (given,)


def _read_tokenizer(resolved: ResolvedModel, model: Any) -> Any:
    try:
        return AutoTokenizer.from_pretrained(
            str(resolved.folder), local_files_only=True, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # the tokenizers library raises nothing more particular
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


def base_spec(run: RunConfig, compute_dtype: torch.dtype, processes: int = 1) -> BaseSpec:
    """How the base is held by each of so many processes.

    One alone takes layers that were shared from host memory instead, to evaluate or answer with a
    model too large for its card.
    """
    model = run.model
    parts = processes if model.shard_layers else 1
    return BaseSpec(
        quantization=model.quantization,
        double_quant=model.double_quant,
        block_size=model.block_size,
        compute_dtype=compute_dtype,
        attention=None if model.attention == "auto" else model.attention,
        keep_unquantized=tuple(model.keep_unquantized),
        trust_remote_code=model.trust_remote_code,
        embeddings_on_host=model.embeddings_on_host,
        head_on_host=model.head_on_host,
        head_bits=model.head_bits,
        stream_layers=model.stream_layers or (model.shard_layers and parts == 1),
        layer_parts=parts,
    )


def known_positions(config: Any) -> int | None:
    """Longest sequence a model knows, in tokens; None where nothing bounds it."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


def check_length(run: RunConfig, config: Any) -> None:
    """Refuse sequences longer than the model knows positions."""
    limit = known_positions(config)
    if limit is not None and run.data.max_seq_len > limit:
        raise UserError(
            f"data.max_seq_len = {run.data.max_seq_len}: {run.model.source} knows {limit} "
            f"positions; take {limit} or less"
        )


def load_model(
    run: RunConfig,
    source: ModelSource,
    progress: Progress | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    processes: Processes = ALONE,
) -> Any:
    """Load the base, frozen, onto its device.

    Args:
        run: The settings.
        source: The model.
        progress: Told of every tensor.
        settings: What the data says of the model's configuration (its labels); without, what the
            run file alone says.
        processes: Those that share the layers, as `open_model` was told.

    Raises:
        UserError: The checkpoint is not whole, or the model lets packed examples see each other.
    """
    kind = source.kind
    if settings is None:
        settings = kind.weightless_settings(run.task_settings.model_dump())
    folder = source.resolved.folder
    if run.model.quantized_cache is not None:
        cache = Path(run.model.quantized_cache).expanduser()
        folder = cached_base(
            folder, cache, kind.auto_class, source.base_spec, source.device, progress=progress
        )
    model = load_base(
        folder,
        kind.auto_class,
        source.base_spec,
        source.device,
        progress=progress,
        new_heads_allowed=kind.new_head,
        head_seed=run.train.seed,
        config_changes=dict(settings),
        peers=processes if source.base_spec.layer_parts > 1 else None,
    )
    if run.data.packing:
        if run.data.mask_free_packing:
            # an attention it does not know builds its own mask
            use_packed_attention(model, run.data.max_seq_len)
        refuse_packing_leak(model, source.device, source.config.get_text_config().vocab_size)
    return model
