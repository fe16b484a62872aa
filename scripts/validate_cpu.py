"""Hold foresight to real training steps on this CPU: small models of four architectures.

    python scripts/validate_cpu.py [--json scripts/results/memory-cpu.json]

Makes models with random weights (memory does not ask what they are), lets `qlora profile --measure`
train two real steps of each, and prints predicted beside measured live storages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHARED = {
    "vocab_size": 8000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "max_position_embeddings": 1024,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama": SHARED,
    "GPT2": {"vocab_size": 8000, "n_embd": 256, "n_layer": 6, "n_head": 4, "n_positions": 1024,
             "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "Gemma2": SHARED | {"head_dim": 64, "sliding_window": 128},
    "Qwen3": SHARED | {"head_dim": 64},
}  # fmt: skip
SETTINGS = {
    "nf4": (),
    "16 bit, nothing recomputed": ("--quantization", "none", "--activations", "keep"),
}
BATCH = ("--max-seq-len", "256", "--micro-batch-size", "2")


def make(family: str, folder: Path) -> None:
    """Save a random model."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**MODELS[family])
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        folder
    )
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)  # a run opens one, though these steps read no text


def compare(folder: Path, settings: tuple[str, ...]) -> dict[str, Any]:
    """What `qlora profile --measure` says."""
    command = [sys.executable, "-m", "qlora_trainer", "profile", "--model", str(folder)]
    command += [*BATCH, *settings, "--device", "cpu", "--measure", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout))


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Predicted against real steps on this CPU.")
    parser.add_argument("--json", type=Path, help="write the figures here")
    target = parser.parse_args().json
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows = []
    for family in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            make(family, Path(folder))
            for name, settings in SETTINGS.items():
                told = compare(Path(folder), settings)
                row = {"model": family, "settings": name} | {
                    part: told[part]
                    for part in (
                        "predicted", "measured", "errors", "predicted_by_phase", "measured_by_phase"
                    )
                }  # fmt: skip
                rows.append(row)
                print(f"{family:8s} {name:28s} {row['errors']['allocated']:+.4%}", flush=True)
    errors = [abs(row["errors"]["allocated"]) for row in rows]
    summary = {"allocated_mean_abs_error": sum(errors) / len(errors),
               "allocated_worst_error": max(errors)}  # fmt: skip
    if target:
        text = json.dumps({"rows": rows, "summary": summary}, indent=1) + "\n"
        target.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
