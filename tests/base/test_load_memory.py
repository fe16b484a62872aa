"""Claim of base/load.py: host memory while loading stays near what the base finally takes.

A fresh process loads a 1.1B-parameter checkpoint of several shards and watches its own private
memory; pages of mapped files, which the system drops as it likes, are reported apart.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_trainer.base.load import BaseSpec, build_weightless_base

ALLOWED_OVER_IMPORTS = 500_000_000
_LOADER = """
import json, sys, threading
from pathlib import Path
import psutil, torch
from transformers import AutoModelForCausalLM
from qlora_trainer.base.audit import audit_base
from qlora_trainer.base.load import BaseSpec, load_base

def memory():
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return tuple(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return psutil.Process().memory_full_info().uss, 0

def watch():
    while not done.wait(0.005):
        now = memory()
        peak[:] = [max(pair) for pair in zip(peak, now)]

before = memory()
peak, done = list(before), threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = load_base(Path(sys.argv[1]), AutoModelForCausalLM, BaseSpec("nf4"), torch.device("cpu"))
done.set()
watcher.join()
audit = audit_base(model)
print(json.dumps({
    "before": before, "peak": peak, "after": memory(),
    "base_bytes": audit.total_bytes, "largest_bytes": audit.largest_bytes,
}))
"""


def write_checkpoint(folder: Path, config: LlamaConfig, shards: int) -> int:
    """Random bf16 weights, one shard in memory at a time. Returns the largest tensor's bytes."""
    folder.mkdir()
    config.save_pretrained(folder)
    spec = BaseSpec("none")
    model = build_weightless_base(config, AutoModelForCausalLM, spec)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    names = sorted(shapes)
    noise = torch.randn(2**20).to(torch.bfloat16) * 0.02
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {
            name: noise.repeat(-(-torch.Size(shapes[name]).numel() // noise.numel()))[
                : torch.Size(shapes[name]).numel()
            ].view(shapes[name])
            for name in names[number::shards]
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return max(torch.Size(shape).numel() * 2 for shape in shapes.values())


@pytest.mark.slow
def test_peak_host_memory_is_the_base_plus_two_tensors(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, dtype="bfloat16",
    )  # fmt: skip
    largest_bytes = write_checkpoint(tmp_path / "model", config, shards=4)
    run = subprocess.run(
        [sys.executable, "-c", _LOADER, str(tmp_path / "model")],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    (anon_before, _), (anon_peak, file_peak) = report["before"], report["peak"]
    rise = anon_peak - anon_before
    allowed = report["base_bytes"] + 2 * largest_bytes + ALLOWED_OVER_IMPORTS
    print(
        f"base {report['base_bytes']:,} largest tensor {largest_bytes:,} peak over imports "
        f"{rise:,} allowed {allowed:,} after {report['after'][0] - anon_before:,} "
        f"mapped file pages at most {file_peak:,}"
    )
    assert rise <= allowed
    stored = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert allowed < stored  # reading the checkpoint into private memory would be seen
    assert report["base_bytes"] < 0.4 * stored
