"""Our training step beside the others', on this machine, in one run: speed, memory, loss.

    python scripts/benchmark_step.py --model FOLDER [--json FILE] [--peers peft,trainer,trl]
                                     [--tokens 512] [--rows 1] [--rounds 10] [--dtype bf16]
    python scripts/benchmark_step.py --part NAME --model FOLDER --json FILE [--data FILE.jsonl]

Without `--part`: ours with all techniques, without the fused MLP and the tiled norms
(`ours-plain`), and the peers asked for, at equal settings. `step_cases.py` says what each part of
the whole comparison and each contender is; a part is written into FILE beside those done earlier.

All contenders are loaded at once, each in a process of its own, and take turns step by step
(`step_rounds.py`): a round is one step of everybody, begun by another each time, after a first
round that warms up. A ratio is the median over rounds of ours and the peer's step of the same
round; least, most and quartiles stand beside it. All start from the same adapter and see the same
tokens. A share of the ceiling is the time of the step's matrix products alone, in the dtype of the
comparison at the rate measured just before and after the step (the mean of both), over the time of
the step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from figures_file import record
from step_cases import CONTENDERS, PARTS, PEERS, in_dtype
from step_ceiling import ProductRate, flops_per_token
from step_figures import summarize
from step_rounds import WARM_UP, SideBySide
from steps import Stop, say, stop_with_message

RANK = 16
LONG = ("turns", "losses")  # in the file, not on the screen
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "trl", "accelerate")


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


def of_part(part: str, peers: Sequence[str]) -> list[str]:
    """Who takes part: ours, and of the part's others those of `peers`."""
    everybody = PARTS[part]["contenders"]
    return [name for name in everybody if CONTENDERS[name]["kind"] in ("ours", *peers)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everybody in rounds and print or write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a base model")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--part", choices=list(PARTS), help="one part of the whole comparison")
    parser.add_argument(
        "--peers", default=",".join(PEERS), help="of peft, trainer, trl; of a part: only these"
    )
    parser.add_argument("--data", type=Path, help="instructions, for the parts on real data")
    parser.add_argument("--activations", choices=("keep", "recompute"), default="recompute")
    for name, value in (("tokens", 512), ("rows", 1), ("rounds", 10)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--dtype", choices=("auto", "bf16", "fp32"), default="auto",
        help="what all compute in; auto: what this CPU multiplies fastest, as `qlora train` does",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args(arguments)
    peers = [name for name in given.peers.split(",") if name]
    if unknown := set(peers) - set(PEERS):
        parser.error(f"--peers: {', '.join(sorted(unknown))}: choose of {', '.join(PEERS)}")
    contenders = ["ours", "ours-plain", *peers]
    if given.part:
        part = PARTS[given.part]
        given.tokens, given.rows = part["tokens"], part["rows"]
        contenders = of_part(given.part, peers)
        if part["real"] and given.data is None:
            parser.error(f"--part {given.part}: needs --data")
    real = bool(given.part and PARTS[given.part]["real"])
    try:
        with tempfile.TemporaryDirectory() as scratch:
            content = _compare(given, installed(contenders), Path(scratch), real)
    except Stop as error:
        return stop_with_message(error)
    print(json.dumps({k: v for k, v in content.items() if k not in LONG}, indent=2))
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
    import torch

    from qlora_trainer.base.dtype import choose_compute_dtype, dtype_name

    make_adapter(given.model, scratch)
    job = {
        "model": str(given.model), "adapter": str(scratch), "tokens": given.tokens,
        "rows": given.rows, "steps": WARM_UP + given.rounds, "threads": given.threads,
        "activations": given.activations, "data": str(given.data) if real else None,
    }  # fmt: skip
    dtype = choose_compute_dtype(given.dtype, torch.device("cpu"), "llama")
    long_name = str(dtype).removeprefix("torch.")
    cases = {name: in_dtype(CONTENDERS[name], long_name) for name in contenders}
    jobs = {name: {**job, **case, "contender": name} for name, case in cases.items()}
    rate = ProductRate(given.model, given.tokens * given.rows, given.threads, long_name)
    rounds = []
    with SideBySide(jobs) as everybody:
        for number in range(job["steps"]):
            rounds.append(everybody.round(number, rate))
            said = (f"{n} {found['step_seconds']:.2f} s" for n, found in rounds[-1].items())
            say(f"round {number} of {given.rounds}: {', '.join(said)}")
    found = summarize(rounds[:WARM_UP], rounds[WARM_UP:], flops_per_token(given.model))
    settings = {name: value for name, value in job.items() if name not in ("adapter", "model")}
    settings |= {"model": given.model.name, "data": given.data.parent.name if real else None}
    settings |= {"dtype": dtype_name(dtype), "cpu": torch.backends.cpu.get_cpu_capability()}
    return {
        **found, "settings": settings | {"rank": RANK, "rounds": given.rounds},
        "contenders": cases,
        "versions": {name: version(name) for name in PACKAGES if find_spec(name)},
        "turns": rounds[WARM_UP:],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
