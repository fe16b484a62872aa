"""Our training step beside the others', on this machine, in one run: speed, memory, loss.

    python scripts/benchmark_step.py --model FOLDER [--json FILE] [--peers peft,trainer,trl]
                                     [--tokens 512] [--rows 1] [--steps 6] [--repeats 3]

    ours        all techniques of the step
    ours-plain  the same without the fused MLP and the tiled norms (ablation)
    peft        PEFT and bitsandbytes, the loop written by hand
    trainer     transformers.Trainer on PEFT's model
    trl         TRL's SFTTrainer on PEFT's model (`pip install trl`)

The machine may be shared, so contenders take turns, each in a process of its own, and a ratio is
the median over turns of ours and the peer's of the same turn; the spread is printed beside it. All
start from the same adapter and see the same tokens. `ceiling_share` is the time of the step's
matrix products alone, at the bf16 rate measured between the turns, over the time of our step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steps import REPOSITORY, Stop, say, stop_with_message

OURS = ("ours", "ours-plain")
PEERS = ("peft", "trainer", "trl")
RANK = 16


def make_adapter(model: Path, folder: Path) -> None:
    """An adapter on all linear layers whose products are not zero, for all to start from."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_trainer.lora.files import save_adapter
    from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
    from qlora_trainer.lora.spec import AdapterSpec

    config = AutoConfig.from_pretrained(model)
    net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    spec = AdapterSpec(rank=RANK, alpha=2.0 * RANK)
    inject_adapter(net, spec, dtype=torch.bfloat16, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapter_parameters(net).items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=1e-3, generator=generator)
    save_adapter(net, spec, folder, base_source=str(model), task_type="CAUSAL_LM")


def step_flops(model: Path, tokens: int) -> float:
    """Operations of a step's products with the base: forward, and the gradient of the input.

    Every token goes through every linear layer and the head; adapters and attention are left out,
    so the ceiling is no better than it is.
    """
    from transformers import AutoConfig

    c: Any = AutoConfig.from_pretrained(model).get_text_config()
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    query, key = c.num_attention_heads * head, c.num_key_value_heads * head
    layer = c.hidden_size * (2 * query + 2 * key) + 3 * c.hidden_size * c.intermediate_size
    weights = c.num_hidden_layers * layer + c.hidden_size * c.vocab_size
    return 2.0 * 2.0 * tokens * weights


def matmul_rate(model: Path, tokens: int, threads: int) -> float:
    """Operations per second of bf16 products in the model's own MLP shape, the best of a few."""
    import torch
    from transformers import AutoConfig

    c: Any = AutoConfig.from_pretrained(model).get_text_config()
    torch.set_num_threads(threads)
    x = torch.randn(tokens, c.hidden_size).bfloat16()
    weight = torch.randn(c.intermediate_size, c.hidden_size).bfloat16()
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(4):
            torch.nn.functional.linear(x, weight)
        done = 4 * 2.0 * tokens * c.hidden_size * c.intermediate_size
        best = max(best, done / (time.perf_counter() - began))
    return best


def run_contender(job: Mapping[str, Any]) -> dict[str, Any]:
    """One contender's turn.

    Raises:
        Stop: It failed; its own last lines say how.
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(job["threads"]),
    }
    command = [sys.executable, str(REPOSITORY / "scripts" / "step_contender.py"), json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise Stop(f"{job['contender']} failed:\n{last}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def summarize(
    turns: Sequence[Mapping[str, Mapping[str, Any]]],
    rates: Sequence[float],
    tokens: int,
    flops: float,
) -> dict[str, Any]:
    """Medians of all turns, ratios of pairs, and the share of the ceiling.

    Args:
        turns: Contender -> its figures, turn by turn.
        rates: Measured product rate of each turn, operations per second.
        tokens: Of a step.
        flops: Of a step's products.
    """
    names = list(turns[0])
    seconds = {name: [float(turn[name]["step_seconds"]) for turn in turns] for name in names}
    pairs = {
        name: [theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True)]
        for name in names
        if name != "ours"
    }
    shares = [flops / rate / own for rate, own in zip(rates, seconds["ours"], strict=True)]
    return {
        "tokens_per_second": {n: tokens / statistics.median(s) for n, s in seconds.items()},
        "peak_step_bytes": {
            n: statistics.median(turn[n]["peak_step_bytes"] for turn in turns) for n in names
        },
        "final_loss": {n: turns[-1][n]["losses"][-1] for n in names},
        "times_faster": {n: statistics.median(ratios) for n, ratios in pairs.items()},
        "spread": {n: [min(ratios), max(ratios)] for n, ratios in pairs.items()},
        "ceiling_share": statistics.median(shares),
    }


def installed_peers(wanted: Sequence[str]) -> list[str]:
    """Peers that can run here; one that is not installed is named."""
    found = []
    for name in wanted:
        package = {"peft": "peft", "trainer": "peft", "trl": "trl"}[name]
        command = [sys.executable, "-c", f"import {package}"]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            found.append(name)
        else:
            say(f"{name}: {package} is not installed here, left out; pip install {package}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everybody in turns and print or write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a base model")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--peers", default=",".join(PEERS), help="of peft, trainer, trl")
    parser.add_argument("--activations", choices=("keep", "recompute"), default="recompute")
    for name, value in (("tokens", 512), ("rows", 1), ("steps", 6), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args(arguments)
    peers = [name for name in given.peers.split(",") if name]
    if unknown := set(peers) - set(PEERS):
        parser.error(f"--peers: {', '.join(sorted(unknown))}: choose of {', '.join(PEERS)}")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            content = _compare(given, [*OURS, *installed_peers(peers)], Path(scratch))
    except Stop as error:
        return stop_with_message(error)
    print(json.dumps(content["figures"], indent=2))
    if given.json is not None:
        given.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def _compare(given: argparse.Namespace, contenders: Sequence[str], scratch: Path) -> dict[str, Any]:
    make_adapter(given.model, scratch)
    job = {
        "model": str(given.model), "adapter": str(scratch), "tokens": given.tokens,
        "rows": given.rows, "steps": given.steps, "threads": given.threads,
        "activations": given.activations,
    }  # fmt: skip
    tokens = given.tokens * given.rows
    turns, rates = [], []
    for number in range(given.repeats):
        say(f"turn {number + 1} of {given.repeats}: {', '.join(contenders)}")
        rates.append(matmul_rate(given.model, tokens, given.threads))
        turns.append({name: run_contender(job | {"contender": name}) for name in contenders})
    found = summarize(turns, rates, tokens, step_flops(given.model, tokens))
    settings = {name: value for name, value in job.items() if name != "adapter"}
    return {"settings": settings | {"rank": RANK}, "figures": found, "turns": turns}


if __name__ == "__main__":
    sys.exit(main())
