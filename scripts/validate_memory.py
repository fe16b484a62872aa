"""Hold the memory simulator to peaks that other people measured on real GPUs.

    python scripts/validate_memory.py tests/memory/measurements/t4_peft_training_steps.csv
    python scripts/validate_memory.py FILE.csv --json out.json --rows 0,3

Each row of the file is a training run with every setting; `scripts/peft_recipe.py` simulates that
very recipe (library behaviour included) in a process of its own, and this script prints predicted
against measured: per row, mean, worst, and the worst under-prediction. Nothing is fitted.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MIB = 2**20
WORKER = Path(__file__).resolve().with_name("peft_recipe.py")
FAMILIES = (  # part of the model id, transformers' configuration class; the first that matches
    ("qwen3", "Qwen3"), ("qwen2", "Qwen2"), ("qwen1.5", "Qwen2"), ("mistral", "Mistral"),
    ("zephyr", "Mistral"), ("gemma-3", "Gemma3Text"), ("gemma-2", "Gemma2"), ("gemma", "Gemma"),
    ("phi-3", "Phi3"), ("phi-4", "Phi3"), ("phi3", "Phi3"), ("granite", "Granite"),
    ("smollm3", "SmolLM3"), ("olmo-2", "Olmo2"), ("stablelm", "StableLm"),
)  # fmt: skip
PHASES = {  # column of the CSV -> what the simulation calls it
    "after_load_allocated_mib": "after_load",
    "peak_forward_mib": "forward",
    "peak_backward_mib": "backward",
    "peak_optimizer_mib": "optimizer",
}


def family_of(model_id: str) -> str:
    """The configuration class of a model id; Llama's where nothing else is said.

    >>> family_of("Qwen/Qwen2.5-1.5B-Instruct"), family_of("HuggingFaceTB/SmolLM2-135M")
    ('Qwen2', 'Llama')
    """
    low = model_id.lower()
    return next((family for part, family in FAMILIES if part in low), "Llama")


def _yes(text: str) -> bool:
    return text.strip().lower() in ("true", "1", "yes")


def t4_request(row: dict[str, str]) -> dict[str, Any]:
    """The recipe of a row measured with fitcheck-llm's measure.py."""
    numbers = (
        "num_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_kv_heads",
        "head_dim", "vocab_size",
    )  # fmt: skip
    model: dict[str, Any] = {name: int(row[name]) for name in numbers}
    model |= {
        "family": family_of(row["model_id"]),
        "tie_word_embeddings": _yes(row["tie_word_embeddings"]),
    }
    if "mistral-7b" in row["model_id"].lower():
        model["sliding_window"] = 4096 if "v0.1" in row["model_id"] else None
    card, _, total = row["gpu"].removesuffix(" MiB").rpartition(" ")
    return {
        "kind": "t4",
        "capacity_bytes": int((float(total) - float(row["cuda_context_mib"])) * MIB),
        "recipe": {
            "gpu": card,
            "model": model,
            "quantization": row["quantization"],
            "double_quant": _yes(row["double_quant"]),
            "attention": row["attn"],
            "batch_size": int(row["batch_size"]),
            "seq_len": int(row["seq_len"]),
            "rank": int(row["lora_rank"]),
            "targets": row["lora_targets"].split("+"),
            "compute_dtype": row["compute_dtype"],
            "gradient_checkpointing": _yes(row["gradient_checkpointing"]),
            "optimizer": row["optimizer"],
        },
    }


MISTRAL_7B = {
    "family": "Mistral", "num_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_kv_heads": 8, "head_dim": 128, "vocab_size": 32000,
    "tie_word_embeddings": False, "sliding_window": 4096,
}  # fmt: skip
LLAMA_3B = {
    "family": "Llama", "num_layers": 28, "hidden_size": 3072, "intermediate_size": 8192,
    "num_attention_heads": 24, "num_kv_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "tie_word_embeddings": True,
}  # fmt: skip


def a100_request(row: dict[str, str]) -> dict[str, Any]:
    """The recipe of a row of fms-acceleration's published benchmark."""
    return {
        "kind": "a100",
        "recipe": {
            "gpu": "A100", "model": MISTRAL_7B,
            "quantization": "nf4" if "nf4" in row["base"] else "none",
            "double_quant": "double quant" in row["base"], "attention": "flash",
            "batch_size": int(row["micro_batch_size"]), "seq_len": int(row["seq_len_packed"]),
            "rank": int(row["lora_rank"]), "targets": row["lora_targets"].split("+"),
            "compute_dtype": "bf16",
            "gradient_checkpointing": _yes(row["gradient_checkpointing"]),
            "norm_dtype": row["norm_and_residual_dtype"],
        },
    }  # fmt: skip


def l40s_request(row: dict[str, str]) -> dict[str, Any]:
    """The recipe of a row of PEFT's published method comparison (MetaMathQA)."""
    method = row["method"]
    mlp = "MLP" in method
    return {
        "kind": "l40s",
        "recipe": {
            "gpu": "L40S", "model": LLAMA_3B, "quantization": "none", "double_quant": False,
            "attention": "sdpa", "batch_size": int(row["micro_batch_size"]),
            "seq_len": int("".join(c for c in row["longest_batch_tokens"] if c.isdigit())),
            "rank": int(method.split("rank ")[1].split()[0]),
            "targets": ["gate_proj", "up_proj", "down_proj"] if mlp else ["q_proj", "v_proj"],
            "compute_dtype": "bf16", "gradient_checkpointing": False,
        },
    }  # fmt: skip


def request_for(row: dict[str, str]) -> dict[str, Any]:
    """Tell by its columns where a row comes from."""
    if "max_reserved_gb_1e9" in row:
        return l40s_request(row)
    return a100_request(row) if "steady_allocated_bytes" in row else t4_request(row)


def measured_of(row: dict[str, str]) -> dict[str, float]:
    """What was measured, in bytes, under the names of the simulation."""
    if "max_reserved_gb_1e9" in row:
        return {"reserved": float(row["max_reserved_gb_1e9"]) * 1e9}
    if "steady_allocated_bytes" in row:
        return {
            "allocated": float(row["peak_allocated_bytes"]),
            "steady": float(row["steady_allocated_bytes"]),
        }
    named = {"allocated": "peak_allocated_mib", "reserved": "peak_reserved_mib"}
    named |= {name: column for column, name in PHASES.items()}
    return {name: float(row[column]) * MIB for name, column in named.items() if row.get(column)}


class Simulators:
    """Worker processes, one per thread that asks."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._all: list[subprocess.Popen[str]] = []

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Simulate one recipe."""
        worker = getattr(self._local, "worker", None)
        if worker is None:
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            worker = subprocess.Popen(
                [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, env=environment,
            )  # fmt: skip
            self._local.worker = worker
            self._all.append(worker)
        worker.stdin.write(json.dumps(request) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
            raise RuntimeError(f"the simulation of {request['recipe']} failed; see above")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the workers by closing what they read."""
        for worker in self._all:
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait()


def result_of(row: dict[str, str], predicted: dict[str, Any]) -> dict[str, Any]:
    """The row's columns, with predicted and measured bytes beside them."""
    result: dict[str, Any] = dict(row)
    for name, bytes_ in measured_of(row).items():
        result[f"predicted_{name}_bytes"] = predicted[name]
        result[f"measured_{name}_bytes"] = round(bytes_)
    for name in ("allocated", "reserved"):
        result.setdefault(f"predicted_{name}_bytes", predicted[name])
        result.setdefault(f"measured_{name}_bytes", None)
    result["kernels"] = predicted["kernels"]
    return result


def errors_of(results: list[dict[str, Any]], name: str) -> list[float]:
    """Relative errors (predicted / measured - 1) of the rows that have a measurement."""
    return [
        r[f"predicted_{name}_bytes"] / r[f"measured_{name}_bytes"] - 1
        for r in results
        if r.get(f"measured_{name}_bytes")
    ]


def summarize(results: list[dict[str, Any]]) -> dict[str, float | None]:
    """Mean, worst and worst under-prediction, as fractions."""
    summary: dict[str, float | None] = {}
    names = ("allocated", "reserved", "after_load", "forward", "backward", "optimizer", "steady")
    for name in names:
        errors = errors_of(results, name)
        if not errors and name not in ("allocated", "reserved"):
            continue
        sizes = [abs(e) for e in errors]
        summary[f"{name}_mean_abs_error"] = sum(sizes) / len(sizes) if sizes else None
        summary[f"{name}_worst_error"] = max(sizes) if sizes else None
        summary[f"{name}_worst_under"] = min([0.0, *errors]) if errors else None
    return summary


def _label(row: dict[str, str]) -> str:
    model = row.get("model_id") or row.get("model") or ""
    keys = ("recipe", "method", "quantization", "attn", "batch_size", "micro_batch_size", "seq_len")
    return " ".join([model.split("/")[-1][:24], *(row[k] for k in keys if row.get(k))])


def _print(results: list[dict[str, Any]], summary: dict[str, float | None]) -> None:
    for number, result in enumerate(results):
        parts = []
        for key in result:
            if key.startswith("predicted_") and result.get("measured_" + key[10:]):
                error = result[key] / result["measured_" + key[10:]] - 1
                parts.append(f"{key[10:].removesuffix('_bytes')} {error:+.3%}")
        print(f"{number:3d} {_label(result):62s} {'  '.join(parts)}")
    for name in ("allocated", "reserved", "after_load", "forward", "backward", "optimizer"):
        mean, worst = summary.get(f"{name}_mean_abs_error"), summary.get(f"{name}_worst_error")
        if mean is not None and worst is not None:
            under = summary[f"{name}_worst_under"] or 0.0
            print(f"{name:11s} mean {mean:.3%}  worst {worst:.3%}  worst under {under:+.3%}")


def main() -> int:
    """Simulate the rows, print the errors, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, help="measured rows")
    parser.add_argument("--json", type=Path, help="write rows and summary here")
    parser.add_argument("--rows", help="only these, counted from 0: 0,3,5")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    with arguments.csv.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if arguments.rows:
        rows = [rows[int(number)] for number in arguments.rows.split(",")]
    simulators = Simulators()
    try:
        with ThreadPoolExecutor(arguments.processes) as pool:
            found = list(pool.map(simulators.ask, [request_for(row) for row in rows]))
    finally:
        simulators.close()
    results = [result_of(row, answer) for row, answer in zip(rows, found, strict=True)]
    summary = summarize(results)
    _print(results, summary)
    if arguments.json:
        document = {"rows": results, "summary": summary}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
