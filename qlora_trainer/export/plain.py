"""The other half of the proof: runs in a fresh process, with transformers and nothing of ours.

Its source is copied into a folder of its own for a new Python, so the process does not import this
package by accident and sees the export exactly as a stranger would: it opens folder and tokenizer,
runs the same rows and compares its logits with those of base + adapter, which the first process
left in a file. The two halves share the functions below, so that both look at the same positions.

N compared positions, V classes or vocabulary.
"""

import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

NOT_COUNTED = -100
_POSITIONS = 64  # compared at one time
_NONE = torch.tensor(NOT_COUNTED)  # no dimension: no tokens, as a classifier's label has none


def read_rows(path: Path) -> list[dict[str, Tensor]]:
    """Rows as `write_rows` leaves them: each a mapping of inputs without a batch dimension."""
    rows: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            number, _, name = key.partition(".")
            rows.setdefault(int(number), {})[name] = file.get_tensor(key)
    return [rows[number] for number in sorted(rows)]


@torch.no_grad()
def compared_logits(
    model: Any, row: Mapping[str, Tensor], *, shift: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Logits of one row at the positions that count, in float32 on the CPU, and their labels.

    Args:
        model: Any transformers model with logits.
        row: Its inputs; `labels` choose the positions and are not given to the model.
        shift: Logits at one position stand for the label of the next (causal models).
        device: The model's.

    Returns:
        (N, V) and (N,); labels are `NOT_COUNTED` where there are none.
    """
    inputs = {
        name: value[None].to(device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in row.items()
        if name != "labels"
    }
    if getattr(model.config, "is_encoder_decoder", False) and row.get("labels", _NONE).dim() == 1:
        labels = row["labels"][None].to(device)
        own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        shifted = own or getattr(model, "_shift_right", None)
        if shifted is not None:
            inputs.setdefault("decoder_input_ids", shifted(labels))
        elif "decoder_input_ids" not in inputs:
            inputs["labels"] = labels  # M2M100 and its kind shift in their own forward
    output = model(**inputs)
    if "logits" not in output:  # question answering: one choice among positions, twice
        both = torch.cat([output["start_logits"], output["end_logits"]])
        return both.float().cpu(), torch.full((both.shape[0],), NOT_COUNTED)
    logits = output["logits"][0]
    labels = row.get("labels", torch.full(logits.shape[:-1], NOT_COUNTED))
    chosen = labels != NOT_COUNTED if "labels" in row else torch.ones_like(labels, dtype=torch.bool)
    if logits.dim() == 1:  # one label for the whole row
        return logits[None].float().cpu(), labels.reshape(-1)[:1].long()
    if shift:
        logits, labels, chosen = logits[:-1], labels[1:], chosen[1:]
    return logits[chosen.to(logits.device)].float().cpu(), labels[chosen].long()


class Comparison:
    """Sums over all positions of how far one model's logits are from another's."""

    def __init__(self) -> None:
        self.positions = self.agreeing = self.labelled = 0
        self.kl_sum = self.kl_max = self.largest = 0.0
        self.squared_difference = self.squared_reference = 0.0
        self.loss = {"reference": 0.0, "export": 0.0}

    def add(self, reference: Tensor, export: Tensor, labels: Tensor) -> None:
        """Count positions. reference, export: (N, V) float32; labels: (N,)."""
        for start in range(0, len(labels), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            self._add(reference[part], export[part], labels[part])

    def _add(self, reference: Tensor, export: Tensor, labels: Tensor) -> None:
        p, q = reference.double().log_softmax(-1), export.double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
        self.positions += len(labels)
        self.kl_sum += float(kl.sum())
        self.kl_max = max(self.kl_max, float(kl.max()))
        self.agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
        difference = export - reference
        self.largest = max(self.largest, float(difference.abs().max()))
        self.squared_difference += float(difference.double().square().sum())
        self.squared_reference += float(reference.double().square().sum())
        known = labels != NOT_COUNTED
        if known.any():
            self.labelled += int(known.sum())
            chosen = labels[known][:, None]
            self.loss["reference"] -= float(p[known].gather(1, chosen).sum())
            self.loss["export"] -= float(q[known].gather(1, chosen).sum())

    def figures(self) -> dict[str, float]:
        """The report's figures; loss and perplexity only where there are labels."""
        count = max(1, self.positions)
        figures = {
            "positions": float(self.positions),
            "mean_kl": self.kl_sum / count,
            "max_kl": self.kl_max,
            "top1_agreement": self.agreeing / count,
            "max_logit_difference": self.largest,
            "relative_difference": (self.squared_difference / max(self.squared_reference, 1e-30))
            ** 0.5,
        }
        if self.labelled:
            for side, total in self.loss.items():
                loss = total / self.labelled
                figures[f"{side}_loss"] = loss
                figures[f"{side}_perplexity"] = float(torch.tensor(loss).exp())
        return figures


def stored_references(
    path: Path, counts: list[int], columns: list[int]
) -> Iterator[Tensor]:  # (N, V) a row of the proof
    """Logits of base + adapter, row by row, as the first process wrote them."""
    with path.open("rb") as file:
        for count, width in zip(counts, columns, strict=True):
            data = bytearray(file.read(4 * count * width))
            flat = torch.frombuffer(data, dtype=torch.float32) if data else torch.empty(0)
            yield flat.view(count, width)


def compare(job: Mapping[str, Any], turns: Any = None) -> dict[str, Any]:
    """Open the export as a stranger and compare it; -> what the report says.

    Args:
        job: As `fresh` writes it.
        turns: The module `turns`, where the model is taken layer by layer.
    """
    import transformers

    device = torch.device(job["device"])
    trust = bool(job["trust_remote_code"])
    auto = getattr(transformers, job["auto_class"])
    by_layer = job["by"] == "layer"
    # Cast a layer at a time below: here that would make a whole copy. A GGUF file is unpacked to
    # float32 in any case, and another dtype would round it.
    cast_later = by_layer and job["gguf_file"] is None
    model, info = auto.from_pretrained(
        job["folder"], dtype="auto" if cast_later else job["dtype"] or "auto",
        output_loading_info=True, trust_remote_code=trust, local_files_only=True, **_of_gguf(job),
    )  # fmt: skip
    model = model.eval()
    written_dtype = job["dtype"] or str(model.dtype).removeprefix("torch.")
    rows = read_rows(Path(job["rows"]))

    def run(number: int) -> tuple[Tensor, Tensor]:
        return compared_logits(model, rows[number], shift=job["shift"], device=device)

    if by_layer:
        model.config.use_cache = False
        wanted = None if job["dtype"] is None else getattr(torch, job["dtype"])
        parts = turns.MappedParts(model, None if wanted is None else lambda _: wanted, device)
        outputs = turns.run_in_turns(
            len(rows), run, parts.parts, load=parts.load, unload=parts.unload
        )
    else:
        model = model.to(device)
        outputs = map(run, range(len(rows)))
    comparison = Comparison()
    references = stored_references(Path(job["reference"]), job["counts"], job["columns"])
    for (logits, labels), reference in zip(outputs, references, strict=True):
        if len(logits):
            comparison.add(reference, logits, labels)
    texts: list[list[int]] | None = None
    if job["has_tokenizer"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            job["folder"], trust_remote_code=trust, local_files_only=True
        )
        texts = [tokenizer(text)["input_ids"] for text in job["texts"]]
    return {
        "figures": comparison.figures(),
        "bad_keys": sorted(
            f"{kind}: {key}"
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            for key in map(str, info[kind])
        ),
        "dtype": written_dtype,
        "architecture": type(model).__name__,
        "token_ids": texts,
        "of_ours": [name for name in sys.modules if name.startswith("qlora_trainer")],
        "transformers": transformers.__version__,
    }


def _of_gguf(job: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments to open a GGUF file, with a folder's configuration where its own is not enough."""
    if job["gguf_file"] is None:
        return {}
    arguments = {"gguf_file": job["gguf_file"]}
    if job["config_folder"] is not None:
        from transformers import AutoConfig

        arguments["config"] = AutoConfig.from_pretrained(
            job["config_folder"], trust_remote_code=bool(job["trust_remote_code"])
        )
    return arguments


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(given["threads"])
    # Beside this file, in the folder the first process made for both.
    helper = importlib.import_module("turns") if given["by"] == "layer" else None
    Path(given["result"]).write_text(json.dumps(compare(given, helper)), encoding="utf-8")
