"""Several adapters on one base, weighted, as one adapter, exactly.

A weighted sum of low-rank products is a low-rank product: `sum_i w_i s_i B_i A_i` is
`[w_1 s_1 B_1 ... w_n s_n B_n] [A_1; ...; A_n]`. So adapters are joined by putting their factors
side by side (no decomposition, nothing lost), and the result is an adapter like any other: trained
on, exported and proven by the same code. Modules trained in full are averaged as their differences
from the base.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_trainer.base.load import BaseSpec
from qlora_trainer.errors import UserError
from qlora_trainer.export.adapter import FittedAdapter, LowRank, fit_adapter
from qlora_trainer.export.checkpoint import MappedCheckpoint
from qlora_trainer.export.merged import plain_model
from qlora_trainer.export.plan import PlannedTensor, plan_export
from qlora_trainer.lora.files import PREFIX, WEIGHTS_NAME
from qlora_trainer.lora.kind import CONV1D, CONV2D, EMBEDDING, LINEAR
from qlora_trainer.lora.peft_config import CONFIG_NAME, read_json

_MODEL_CONFIG = "config.json"
_FILE_KEYS = {kind.name: kind.file_keys for kind in (LINEAR, CONV1D, CONV2D, EMBEDDING)}


@dataclasses.dataclass(frozen=True)
class Combined:
    """What was joined.

    Attributes:
        folder: The joined adapter, in PEFT's format.
        modules: Weights with a low-rank update.
        largest_rank: Of the joined factors.
        replaced: Tensors trained in full.
    """

    folder: Path
    modules: int
    largest_rank: int
    replaced: int


def combine_adapters(
    base_folder: Path,
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    *,
    model_class: Any,
    spec: BaseSpec,
    config_changes: Mapping[str, Any] | None = None,
) -> Combined:
    """Write one adapter that does what several do together.

    Args:
        base_folder: The base all of them are for.
        adapters: Folder and weight of each.
        out: An empty or missing folder for the joined adapter.
        model_class: The transformers class or auto class of the task.
        spec: How training held the base.
        config_changes: Settings of the model configuration the task decided.

    Raises:
        UserError: Fewer than two adapters, one that does not fit, adapters of different tasks or
            labels, or weights that are not finite.
    """
    _check(adapters, out)
    plain = plain_model(base_folder, model_class, spec, config_changes or {})
    model = plain.model
    fitted = [(fit_adapter(folder, model), weight) for folder, weight in adapters]
    if len({adapter.vocabulary for adapter, _ in fitted}) > 1:
        raise UserError("the adapters have vocabularies of different sizes and cannot be joined")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for parameter in dict.fromkeys(name for adapter, _ in fitted for name in adapter.updates):
        parts = [
            (adapter.updates[parameter], weight)
            for adapter, weight in fitted
            if parameter in adapter.updates
        ]
        path = parameter.rpartition(".")[0]
        factors = joined_factors(parts)
        for suffix, factor in zip(_FILE_KEYS[parts[0][0].kind], factors, strict=True):
            tensors[f"{PREFIX}{path}.{suffix}"] = factor
        ranks[path] = factors[0].shape[0]
    base = MappedCheckpoint(base_folder)
    planned = {
        tensor.parameter: tensor
        for tensor in plan_export(
            model, base.tensors, fitted[0][0], quantized={}, dtype=torch.float32,
            base_architectures=plain.architectures,
        ).tensors
    }  # fmt: skip
    replaced = _joined_replacements(fitted, base, planned)
    tensors |= {f"{PREFIX}{name}": value for name, value in replaced.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / WEIGHTS_NAME,
              metadata={"format": "pt"})  # fmt: skip
    settings = _settings(adapters[0][0], fitted, ranks)
    (out / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if (adapters[0][0] / _MODEL_CONFIG).is_file():  # names the labels, in the order of the head
        shutil.copyfile(adapters[0][0] / _MODEL_CONFIG, out / _MODEL_CONFIG)
    return Combined(out, len(ranks), max(ranks.values(), default=0), len(replaced))


def _check(adapters: Sequence[tuple[Path, float]], out: Path) -> None:
    faults = [
        f"{folder}: weight {weight} must be a finite number other than 0"
        for folder, weight in adapters
        if not torch.isfinite(torch.tensor(weight)) or weight == 0
    ]
    if len(adapters) < 2:
        faults.append("name at least two adapters to join")
    if out.exists() and any(out.iterdir()):
        faults.append(f"{out}: exists already and is not overwritten; name another folder")
    tasks = {folder: read_json(folder / CONFIG_NAME).get("task_type") for folder, _ in adapters}
    if len(set(tasks.values()) - {None}) > 1:
        said = ", ".join(f"{folder}: {task}" for folder, task in tasks.items())
        faults.append(f"the adapters were trained for different tasks ({said})")
    faults += _different_labels([folder for folder, _ in adapters])
    if faults:
        raise UserError.from_faults("the adapters cannot be joined", faults)


def _different_labels(folders: Sequence[Path]) -> list[str]:
    """Heads are averaged row by row: each row must stand for the same label in all of them."""
    found = []
    for setting in ("id2label", "problem_type"):
        values = {}
        for folder in folders:
            file = folder / _MODEL_CONFIG
            value = read_json(file).get(setting) if file.is_file() else None
            values[folder] = sorted(value.items()) if isinstance(value, dict) else value
        if any(value != values[folders[0]] for value in values.values()):
            said = "; ".join(
                f"{folder / _MODEL_CONFIG}: {value}" for folder, value in values.items()
            )
            found.append(
                f"{setting} is not the same for all ({said}); train them with the same labels in "
                "the same order (task_settings.labels), and keep config.json beside each adapter"
            )
    return found


def joined_factors(parts: Sequence[tuple[LowRank, float]]) -> tuple[Tensor, Tensor]:
    """Factors A and B, with scale 1, of the weighted sum of updates of one weight."""
    joined_A = torch.cat([update.lora_A.float() for update, _ in parts], dim=0)
    joined_B = torch.cat(
        [update.lora_B.float() * (update.scale * weight) for update, weight in parts], dim=1
    )
    return joined_A, joined_B


def _joined_replacements(
    fitted: Sequence[tuple[FittedAdapter, float]],
    base: MappedCheckpoint,
    planned: dict[str | None, PlannedTensor],
) -> dict[str, Tensor]:
    """Base plus the weighted differences from it, in float32."""
    joined: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for adapter, _ in fitted for name in adapter.replaced):
        values = [(a.replaced[name].float(), w) for a, w in fitted if name in a.replaced]
        tensor = planned.get(name)
        source = None if tensor is None else tensor.source
        if source is None or source.shape != tuple(values[0][0].shape):
            # Nothing in the base to differ from (a new head, new rows): the weighted mean.
            total = sum(weight for _, weight in values)
            if len(values) < len(fitted) or total == 0:
                raise UserError(
                    f"{name}: not in the base, so every adapter must bring it, with weights that "
                    "do not sum to 0"
                )
            joined[name] = torch.stack([v * (w / total) for v, w in values]).sum(0)
            continue
        own = base.read(source).float()
        joined[name] = own + torch.stack([(v - own) * w for v, w in values]).sum(0)
    return joined


def _settings(
    first: Path, fitted: Sequence[tuple[FittedAdapter, float]], ranks: dict[str, int]
) -> dict[str, Any]:
    """PEFT's configuration of the joined adapter; its factors carry all scales: alpha is rank."""
    settings = read_json(first / CONFIG_NAME)
    usual = max(set(ranks.values()), key=list(ranks.values()).count, default=1)
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    saved = dict.fromkeys(n for adapter, _ in fitted for n in adapter.spec.modules_to_save)
    settings.update(
        r=usual, lora_alpha=usual, use_rslora=False, lora_dropout=0.0, rank_pattern=others,
        alpha_pattern=others, target_modules=sorted(ranks), modules_to_save=list(saved) or None,
        layers_to_transform=None, layers_pattern=None, exclude_modules=None,
        init_lora_weights=True, inference_mode=True,
    )  # fmt: skip
    return settings
