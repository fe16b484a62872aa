"""Keep a finished run of this version in the tests, so that every later one must still take it up.

    .venv/bin/python scripts/release_run.py tests/releases/VERSION

A random model of two layers with a tokenizer of bytes trains four steps on a few sums; model, rows,
run file and run folder stay, about 250 kB. Made once, when a version is released, and never again:
what counts is that its files are of that version. In its run files the folder is called `/RELEASE`,
which the tests replace by where their copy stands (`tests/test_releases.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from fuzz_targets import small_tokenizer
from training_process import train_command
from transformers import LlamaConfig, LlamaForCausalLM

RUN = """\
model: {source: model, device: cpu, compute_dtype: fp32}
adapter: {rank: 2, dropout: 0.1}
data: {train: rows.jsonl, eval_fraction: 0.25, max_seq_len: 64, cache_folder: cache}
train: {max_steps: 4, micro_batch_size: 2, gradient_accumulation_steps: 2, learning_rate: 1e-2}
evaluation: {every_steps: 2}
output: {folder: run, save_every_steps: 2, keep_last: 2}
"""


def write_inputs(place: Path) -> None:
    """A model, rows and a run file."""
    place.mkdir(parents=True)
    torch.manual_seed(0)
    tokenizer = small_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    rows = [{"prompt": f"{n} plus {n} is", "completion": f" {2 * n}."} for n in range(24)]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    (place / "run.yaml").write_text(RUN, encoding="utf-8")


def main() -> int:
    """Command line: make the folder."""
    parser = argparse.ArgumentParser(description="Keep a run of this version in the tests.")
    parser.add_argument("place", type=Path)
    place = parser.parse_args().place
    if place.exists():
        print(f"{place} is there; a released version's run is never made again", file=sys.stderr)
        return 1
    write_inputs(place)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = train_command(Path("run.yaml"))
    code = subprocess.run(command, cwd=place, env=environment, check=False).returncode
    shutil.rmtree(place / "cache", ignore_errors=True)
    for file in (place / "run" / "run.yaml", place / "run" / "adapter" / "adapter_config.json"):
        text = file.read_text(encoding="utf-8").replace(str(place.resolve()), "/RELEASE")
        file.write_text(text, encoding="utf-8")
    system = f"{platform.system()}-{platform.machine()}"  # not the kernel of whoever made it
    for file in (place / "run" / "environment.json", place / "run" / "adapter" / "README.md"):
        text = file.read_text(encoding="utf-8").replace(platform.platform(), system)
        file.write_text(text, encoding="utf-8")
    (place / "run" / "loss.png").unlink()  # a picture, and half of the bytes
    return code


if __name__ == "__main__":
    sys.exit(main())
