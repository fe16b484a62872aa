"""The proof that an export is the model that was trained.

Here base + adapter is run as training ran it, and its logits go to a file; then a fresh process
with plain transformers (`plain`) opens the export and compares. One model is in memory at a time.

Two precisions. `native`: base + adapter in training's compute dtype, the export in the dtype it was
written in; what a user will see. `fp32`: both sides compute in float32, so that what differs is
the weights alone.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_trainer.base.load import BaseSpec, load_base
from qlora_trainer.errors import UserError
from qlora_trainer.export import plain
from qlora_trainer.export.adapter import FittedAdapter
from qlora_trainer.lora.files import load_adapter
from qlora_trainer.units import format_bytes

Row = Mapping[str, Tensor]
Precision = Literal["native", "fp32"]
_MOST_REFERENCE_BYTES = 2**30


@dataclass(frozen=True)
class Limits:
    """How far an export may be from base + adapter before it is refused.

    Attributes:
        mean_kl: Mean Kullback-Leibler divergence in nats, where the export has the very weights
            training saw: merged onto dequantized weights, or trained in 16 bit.
        mean_kl_original: The same for weights merged onto the original ones, which differ from
            what training saw by the whole quantization error.
    """

    mean_kl: float = 0.02
    mean_kl_original: float = 0.5

    def of(self, onto: str, *, quantized: bool) -> float:
        """The limit for one way of merging."""
        return self.mean_kl_original if onto == "original" and quantized else self.mean_kl


@dataclass(frozen=True)
class ProofRequest:
    """What is compared, and how.

    Attributes:
        rows: Inputs without a batch dimension; `labels` choose positions and give the losses.
        texts: What the rows were made from, where the tokenizer shall be checked with them.
        rows_from: "held-out rows" or "built-in text", for the report.
        precisions: The first one decides.
        limits: Above which the export is refused.
        max_positions: Compared at most, over all rows.
        device: Where both models run.
    """

    rows: Sequence[Row]
    texts: Sequence[str] = ()
    rows_from: str = "held-out rows"
    precisions: tuple[Precision, ...] = ("native",)
    limits: Limits = Limits()
    max_positions: int = 2048
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class References:
    """Logits of base + adapter in a file, and which positions they are of."""

    file: Path
    rows_file: Path
    counts: list[int]
    columns: list[int]
    shift: bool
    auto_class: str


def write_references(
    folder: Path,
    base_folder: Path,
    adapter_folder: Path,
    adapter: FittedAdapter,
    model_class: Any,
    spec: BaseSpec,
    request: ProofRequest,
    *,
    precision: Precision,
    config_changes: Mapping[str, Any],
) -> References:
    """Run base + adapter as training ran it and leave its logits in a folder."""
    if precision == "fp32":
        spec = dataclasses.replace(spec, compute_dtype=torch.float32)
    model = load_trained(
        base_folder, adapter_folder, adapter, model_class, spec, request.device, config_changes
    )
    shift = is_causal(model)
    counts: list[int] = []
    columns: list[int] = []
    used: list[Row] = []
    left = request.max_positions
    with (folder / f"reference-{precision}").open("wb") as file:
        for row in request.rows:
            logits, _ = plain.compared_logits(model, row, shift=shift, device=request.device)
            left = min(left, _MOST_REFERENCE_BYTES // (4 * max(1, logits.shape[-1])))
            if len(logits) > left and used:
                break
            file.write(memoryview(logits.contiguous().numpy()))  # type: ignore[arg-type]
            counts.append(logits.shape[0])
            columns.append(logits.shape[1])
            used.append(row)
            left -= len(logits)
    rows_file = folder / "rows.safetensors"
    save_file(
        # Own memory for each: labels are often the very tensor of the inputs.
        {f"{i}.{n}": v.clone().contiguous() for i, row in enumerate(used) for n, v in row.items()},
        rows_file,
    )
    return References(
        Path(file.name), rows_file, counts, columns, shift, auto_class_name(type(model).__name__)
    )


def reference_bytes(request: ProofRequest | None, widest: int) -> int:
    """Disk the logits of base + adapter may take; `widest` is the most columns they can have."""
    if request is None:
        return 0
    return min(_MOST_REFERENCE_BYTES, 4 * request.max_positions * widest)


def memory_fault(
    elements: int, request: ProofRequest, *, quantized: bool, available_bytes: int
) -> str | None:
    """Why the comparison would not fit into this machine's memory, or None.

    Base + adapter is held as in training, a little over half a byte a weight in NF4. The export is
    mapped from its files in the dtype it has; in fp32 it is not, and every weight takes four.

    Args:
        elements: Weights of the model.
        request: What is compared.
        quantized: Whether training held the base in NF4.
        available_bytes: Of memory.
    """
    in_training = 0.75 if quantized else 2.0
    needed = elements * (4.0 if "fp32" in request.precisions else in_training)
    if request.device.type != "cpu" or needed <= available_bytes:
        return None
    return (
        f"comparing the export with base + adapter needs about {format_bytes(needed)} of memory, "
        f"{format_bytes(available_bytes)} are available; close other programs, compare in native "
        "precision only, or leave the proof out (--no-proof)"
    )


def load_trained(
    base_folder: Path,
    adapter_folder: Path,
    adapter: FittedAdapter,
    model_class: Any,
    spec: BaseSpec,
    device: torch.device,
    config_changes: Mapping[str, Any],
) -> Any:
    """Base + adapter, as training held them."""
    model = load_base(
        base_folder, model_class, spec, device, new_heads_allowed=True,
        config_changes=dict(config_changes),
    )  # fmt: skip
    if adapter.vocabulary is not None:
        model.resize_token_embeddings(adapter.vocabulary, mean_resizing=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        # Whole weights beside the adapter proper: new rows of resized embeddings, mostly.
        for name, value in adapter.replaced.items():
            parameter = parameters.get(name)
            owner = name.rpartition(".")[0]
            in_full = any(
                owner == wanted or f".{owner}.".find(f".{wanted}.") >= 0
                for wanted in adapter.spec.modules_to_save
            )
            if parameter is not None and not in_full:
                parameter.copy_(value)
    load_adapter(model, adapter_folder, dtype=spec.compute_dtype, trainable=False)
    return model.eval()


def is_causal(model: Any) -> bool:
    """Whether logits at one position stand for the next token."""
    name = type(model).__name__
    return name.endswith(("ForCausalLM", "LMHeadModel")) and not model.config.is_encoder_decoder


_AUTO_CLASSES = (
    ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    ("ForCausalLM", "AutoModelForCausalLM"),
    ("LMHeadModel", "AutoModelForCausalLM"),
    ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    ("ForTokenClassification", "AutoModelForTokenClassification"),
    ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
    ("ForMaskedLM", "AutoModelForMaskedLM"),
    ("ForImageClassification", "AutoModelForImageClassification"),
    ("ForMultipleChoice", "AutoModelForMultipleChoice"),
)


def auto_class_name(architecture: str) -> str:
    """The auto class a stranger would open such a model with.

    >>> auto_class_name("LlamaForCausalLM")
    'AutoModelForCausalLM'
    """
    found = (auto for ending, auto in _AUTO_CLASSES if architecture.endswith(ending))
    return next(found, architecture)


def compare_in_fresh_process(
    export: Path,
    references: References,
    request: ProofRequest,
    *,
    precision: Precision,
    trust_remote_code: bool,
    gguf_file: str | None = None,
    config_folder: Path | None = None,
) -> dict[str, Any]:
    """Open the export in a new process and compare; -> its figures.

    Args:
        export: The folder.
        references: Of the same precision.
        request: What is compared.
        precision: "fp32", or the dtype the export is in.
        trust_remote_code: Whether the export may bring its own Python.
        gguf_file: Open this file of the folder instead of its safetensors.
        config_folder: Whose configuration to open it with, where the file's own is not enough.

    Raises:
        UserError: The export does not open, or not with every weight in its place.
    """
    with tempfile.TemporaryDirectory(prefix="qlora-proof-") as place:
        result = Path(place, "result.json")
        job = {
            "folder": str(export.absolute()),
            "auto_class": references.auto_class,
            "dtype": "float32" if precision == "fp32" or gguf_file is not None else None,
            "gguf_file": gguf_file,
            "config_folder": None if config_folder is None else str(config_folder.absolute()),
            "rows": str(references.rows_file.absolute()),
            "reference": str(references.file.absolute()),
            "counts": references.counts,
            "columns": references.columns,
            "shift": references.shift,
            "device": str(request.device),
            "trust_remote_code": trust_remote_code,
            "has_tokenizer": (export / "tokenizer_config.json").is_file(),
            "texts": list(request.texts),
            "threads": torch.get_num_threads(),
            "result": str(result),
        }
        Path(place, "job.json").write_text(json.dumps(job), encoding="utf-8")
        source = Path(plain.__file__).read_text(encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", source, str(Path(place, "job.json"))],
            cwd=place, capture_output=True, text=True, check=False,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        if done.returncode != 0 or not result.is_file():
            last = "\n  ".join(done.stderr.strip().splitlines()[-4:])
            raise UserError(
                "the export was written, but plain transformers cannot run it in a new process "
                f"(exit code {done.returncode}); it was removed. Its last words:\n  {last}"
            )
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if found["bad_keys"]:
        raise UserError.from_faults(
            "plain transformers does not find every weight of the export in its place",
            found["bad_keys"],
        )
    return found


def check_limits(figures: Mapping[str, float], onto: str, limit: float) -> str | None:
    """What is wrong with an export whose figures these are, or None."""
    if not all(math.isfinite(value) for value in figures.values()):
        return f"merged onto {onto}: its logits are not finite"
    if figures["mean_kl"] > limit:
        return (
            f"merged onto {onto}: mean KL divergence from base + adapter is "
            f"{figures['mean_kl']:.4g} nats, the limit is {limit:g} (top-1 agreement "
            f"{figures['top1_agreement']:.1%}, largest logit difference "
            f"{figures['max_logit_difference']:.3g})"
        )
    return None
