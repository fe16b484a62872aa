"""What loading a base in 4 bits takes on this CPU: quantized, quantized and kept, and kept before.

    python scripts/benchmark_load.py [--model FOLDER] [--json scripts/results/load.json]
                                     [--rounds 3] [--threads 2]

Each load is a process of its own that has imported everything before its clock starts. `quantize`
reads the 16-bit weights and quantizes them; `bitsandbytes` is the same by transformers and
bitsandbytes alone; `first` quantizes and keeps the quantized copy (`model.quantized_cache`);
`second` reads that copy, whose checksums it verifies. Rounds alternate; the medians count; all four
must hold the same codes. Without `--model`: a Llama of 1.1 billion random weights, made in a folder
that is removed. Files may come from the page cache, for all four alike.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from export_checkpoint import make_checkpoint
from steps import Stop, say, stop_with_message

WAYS = ("bitsandbytes", "quantize", "first", "second")


def load_once(way: str, model: Path, cache: Path, threads: int) -> dict[str, Any]:
    """In the process of one load: its seconds, and the weights it holds in 4 bits."""
    import torch
    from transformers import AutoModelForCausalLM

    from qlora_trainer.base.load import BaseSpec, load_base
    from qlora_trainer.base.nf4 import NF4Linear
    from qlora_trainer.base.quantized_cache import cached_base

    torch.set_num_threads(threads)
    if way == "bitsandbytes":
        return _load_by_others(model)
    device, spec = torch.device("cpu"), BaseSpec("nf4")
    began = time.perf_counter()
    folder = model
    if way != "quantize":
        folder = cached_base(model, cache, AutoModelForCausalLM, spec, device)
    held = load_base(folder, AutoModelForCausalLM, spec, device)
    seconds = time.perf_counter() - began
    layers = [layer for layer in held.modules() if isinstance(layer, NF4Linear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return {
        "seconds": seconds, "quantized_weights": weights,
        "codes": _digest(layer.codes for layer in layers),
    }  # fmt: skip


def _digest(codes: Iterable[Any]) -> str:
    """Of all layers' codes, in the model's order."""
    whole = hashlib.sha256()
    for tensor in codes:
        whole.update(tensor.contiguous().view(-1).numpy().data)
    return whole.hexdigest()


def _load_by_others(model: Path) -> dict[str, Any]:
    """As PEFT's users load."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    began = time.perf_counter()
    held = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"},
        local_files_only=True,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    layers = [layer for layer in held.modules() if isinstance(layer, Linear4bit)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return {
        "seconds": seconds, "quantized_weights": weights,
        "codes": _digest(layer.weight.data for layer in layers),
    }  # fmt: skip


def in_a_process(*words: str, threads: int) -> str:
    """Run this script with a job; its last line.

    Raises:
        Stop: It failed.
    """
    command = [sys.executable, __file__, *words]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise Stop("\n".join(done.stderr.strip().splitlines()[-5:]))
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def measure(model: Path, scratch: Path, rounds: int, threads: int) -> dict[str, Any]:
    """All rounds."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        cache = scratch / f"cache-{number}"
        for way in WAYS:
            line = in_a_process("--once", way, str(model), str(cache), str(threads),
                                threads=threads)  # fmt: skip
            found[way].append(json.loads(line))
            say(f"round {number + 1}, {way}: {found[way][-1]['seconds']:.1f} s")
    if len({one["codes"] for ones in found.values() for one in ones}) != 1:
        raise Stop("the ways do not lead to the same codes")
    return {
        "threads": threads,
        "quantized_weights": found["quantize"][0]["quantized_weights"],
        "seconds": {w: statistics.median(one["seconds"] for one in found[w]) for w in WAYS},
        "seconds_of_rounds": {w: [one["seconds"] for one in found[w]] for w in WAYS},
    }


def main() -> int:
    """Command line."""
    if sys.argv[1:2] == ["--once"]:
        way, source, cache, threads = sys.argv[2:]
        print(json.dumps(load_once(way, Path(source), Path(cache), int(threads))))
        return 0
    parser = argparse.ArgumentParser(description="Time loading a base in 4 bits.")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            if given.model is None:
                make_checkpoint(Path(folder, "made"), "1.1b")
            model = given.model or Path(folder, "made", "base")
            content = measure(model, Path(folder), given.rounds, given.threads)
    except Stop as error:
        return stop_with_message(error)
    print(json.dumps(content["seconds"], indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
