"""Our training step beside the others', on this machine, in one run: speed, memory, loss.

    python scripts/benchmark_step.py --model FOLDER [--json FILE] [--peers peft,trainer,trl]
                                     [--tokens 512] [--rows 1] [--steps 6] [--repeats 3]
    python scripts/benchmark_step.py --part NAME --model FOLDER --json FILE [--data FILE.jsonl]

Without `--part`: ours with all techniques, without the fused MLP and the tiled norms
(`ours-plain`), and the peers asked for, at equal settings. `step_cases.py` says what each part of
the whole comparison and each contender is; a part is written into FILE beside those done earlier.

The machine may be shared, so contenders take turns, each in a process of its own, and a ratio is
the median over turns of ours and the peer's of the same turn; the spread is printed beside it. All
start from the same adapter and see the same tokens. `ceiling_share` is the time of the step's
matrix products alone, at the bf16 rate measured before and after our turn (the better of both),
over the time of our step.
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

from figures_file import record
from step_cases import CONTENDERS, PARTS, PEERS
from steps import REPOSITORY, Stop, say, stop_with_message

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
    turns: Sequence[Mapping[str, Mapping[str, Any]]], rates: Sequence[float], flops: float
) -> dict[str, Any]:
    """Medians of all turns, ratios of pairs, and the share of the ceiling.

    Args:
        turns: Contender -> its figures, turn by turn; the first is ours.
        rates: Measured product rate of each turn, operations per second.
        flops: Of a step's products.
    """
    names = list(turns[0])
    ours = names[0]
    speeds = {n: [float(turn[n]["tokens_per_second"]) for turn in turns] for n in names}
    pairs = {
        name: [own / theirs for own, theirs in zip(speeds[ours], speeds[name], strict=True)]
        for name in names[1:]
    }
    peaks = {n: [float(turn[n]["peak_step_bytes"]) for turn in turns] for n in names}
    shares = [
        flops / rate / turn[ours]["step_seconds"] for rate, turn in zip(rates, turns, strict=True)
    ]
    return {
        "tokens_per_second": {n: statistics.median(s) for n, s in speeds.items()},
        "peak_step_bytes": {n: statistics.median(p) for n, p in peaks.items()},
        "final_loss": {n: turns[-1][n]["losses"][-1] for n in names},
        "times_faster": {n: statistics.median(ratios) for n, ratios in pairs.items()},
        "spread": {n: [min(ratios), max(ratios)] for n, ratios in pairs.items()},
        "memory_share": {
            n: statistics.median(peaks[ours]) / statistics.median(peaks[n]) for n in names[1:]
        },
        "ceiling_share": statistics.median(shares),
        "loss_difference": {n: _apart(turns[-1][ours], turns[-1][n]) for n in names[1:]},
    }


def _apart(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """The largest relative difference of two losses of the same step (Trainer shuffles rows)."""
    pairs = zip(ours["losses"], theirs["losses"], strict=False)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def installed(contenders: Sequence[str]) -> list[str]:
    """Contenders that can run here; one whose package is not installed is named and left out."""
    found = []
    for name in contenders:
        package = {"ours": "qlora_trainer", "trl": "trl"}.get(CONTENDERS[name]["kind"], "peft")
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
    parser.add_argument("--part", choices=list(PARTS), help="one part of the whole comparison")
    parser.add_argument("--peers", default=",".join(PEERS), help="of peft, trainer, trl")
    parser.add_argument("--data", type=Path, help="instructions, for the parts on real data")
    parser.add_argument("--activations", choices=("keep", "recompute"), default="recompute")
    for name, value in (("tokens", 512), ("rows", 1), ("steps", 6), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args(arguments)
    peers = [name for name in given.peers.split(",") if name]
    if unknown := set(peers) - set(PEERS):
        parser.error(f"--peers: {', '.join(sorted(unknown))}: choose of {', '.join(PEERS)}")
    contenders = ["ours", "ours-plain", *peers]
    if given.part:
        part = PARTS[given.part]
        given.tokens, given.rows = part["tokens"], part["rows"]
        contenders = part["contenders"]
        if part["real"] and given.data is None:
            parser.error(f"--part {given.part}: needs --data")
    real = bool(given.part and PARTS[given.part]["real"])
    try:
        with tempfile.TemporaryDirectory() as scratch:
            content = _compare(given, installed(contenders), Path(scratch), real)
    except Stop as error:
        return stop_with_message(error)
    print(json.dumps({k: v for k, v in content.items() if k != "turns"}, indent=2))
    if given.json is not None:
        if given.part:
            record(given.json, given.part, content, [*PARTS])
        else:
            given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        plot(content, given.json.with_name(f"{given.json.stem}-{given.part or 'all'}.png"))
    return 0


def plot(content: Mapping[str, Any], path: Path) -> None:
    """Tokens per second and peak memory of every contender, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    names = list(content["tokens_per_second"])
    left.barh(names, list(content["tokens_per_second"].values()))
    left.set_xlabel("tokens per second")
    right.barh(names, [peak / 2**20 for peak in content["peak_step_bytes"].values()])
    right.set_xlabel("peak over the base (MiB)")
    for axis in (left, right):
        axis.invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _compare(
    given: argparse.Namespace, contenders: Sequence[str], scratch: Path, real: bool
) -> dict[str, Any]:
    make_adapter(given.model, scratch)
    job = {
        "model": str(given.model), "adapter": str(scratch), "tokens": given.tokens,
        "rows": given.rows, "steps": given.steps, "threads": given.threads,
        "activations": given.activations, "data": str(given.data) if real else None,
    }  # fmt: skip
    tokens = given.tokens * given.rows
    turns, rates = [], []
    for number in range(given.repeats):
        say(f"turn {number + 1} of {given.repeats}: {', '.join(contenders)}")
        turn, rate = {}, matmul_rate(given.model, tokens, given.threads)
        for name in contenders:
            turn[name] = run_contender({**job, **CONTENDERS[name], "contender": name})
            if not rates[number:]:
                rates.append(max(rate, matmul_rate(given.model, tokens, given.threads)))
        turns.append(turn)
    found = summarize(turns, rates, step_flops(given.model, tokens))
    settings = {name: value for name, value in job.items() if name not in ("adapter", "model")}
    settings |= {"model": given.model.name, "data": given.data.parent.name if real else None}
    described = {name: {**CONTENDERS[name]} for name in contenders}
    return {
        **found, "settings": settings | {"rank": RANK}, "contenders": described,
        "products_per_second": rates, "turns": turns,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
