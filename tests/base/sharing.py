"""One of two processes that share a base's layers, started by `test_layer_shards.py`.

`python -m tests.base.sharing MODEL FOLDER`: loads, computes and fails as its number says, and
writes what it saw to `FOLDER/RANK.json` and its tensors to `FOLDER/RANK.safetensors`.
"""

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_trainer.base.layer_stream import stream_of
from qlora_trainer.base.layers import decoder_layers
from qlora_trainer.base.load import BaseSpec, load_base
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.tasks.loss_path import LossPath
from qlora_trainer.training.activations import plan_activations
from qlora_trainer.training.launch import join_processes
from qlora_trainer.training.loop import run_training
from qlora_trainer.training.plan import TrainingPlan
from qlora_trainer.training.processes import Processes
from qlora_trainer.training.step import seed_random
from tests.training.tiny import make_run, trained_values

CPU = torch.device("cpu")
IDS = torch.arange(1, 25).view(2, 12)


def live_bytes() -> int:
    """What all tensors of this process take."""
    gc.collect()
    found = {}
    for held in gc.get_objects():
        if isinstance(held, Tensor) and held.device.type == "cpu":
            local = held.to_local() if hasattr(held, "to_local") else held
            storage = local.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def spec(parts: int) -> BaseSpec:
    return BaseSpec("nf4", compute_dtype=torch.float32, layer_parts=parts)


def adapted(model: Any) -> Any:
    inject_adapter(model, AdapterSpec(rank=2, alpha=4, dropout=0.0), dtype=torch.float32, seed=0)
    plan_activations(model, decoder_layers(model), "recompute")
    return model


def gradients(model: Any, passes: int) -> dict[str, Tensor]:
    task = CausalLM(LossPath(True, ""))
    model.train()
    model.zero_grad()
    for index in range(passes):
        seed_random(1, 2, index)
        ids = IDS + index
        task.loss_sum(model, task.prepare({"input_ids": ids, "labels": ids})).backward()
    return {n: p.grad.clone() for n, p in adapter_parameters(model).items() if p.grad is not None}


@contextmanager
def short_of_memory_in(layer: Any, call: int) -> Iterator[None]:
    """Within, the layer's MLP has no room when it is called for the so-many-th time."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError("made up")

    handle = layer.mlp.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


def trained(model: Any, folder: Path, processes: Processes) -> dict[str, Any]:
    """Train three steps on windows of three; process 1 has no room in a backward of the first."""
    run = make_run(folder, model, total_steps=3, accumulation=3, processes=processes)
    # Of its one pass through the second layer: once forward, once computed again.
    layer = decoder_layers(model)[1][1]
    with short_of_memory_in(layer, 2 if processes.rank else 0):
        outcome = run_training(run, TrainingPlan(3, 1e-2, seed=5))
    return {"parts": outcome.micro_batch_parts, "step": outcome.step}


def main(source: Path, folder: Path) -> None:
    with join_processes("cpu", wait_seconds=300) as processes:
        rank, seen = processes.rank, dict[str, Any]()
        before = live_bytes()
        model = load_base(source, AutoModelForCausalLM, spec(2), CPU, peers=processes)
        seen["base_bytes"] = live_bytes() - before
        adapted(model)
        # Other numbers of passes: who has done, or has not begun, takes part in the other's.
        found = {f"gradient.{n}": t for n, t in gradients(model, passes=1 + 2 * rank).items()}
        processes.gather(None)
        stream = stream_of(model)
        assert stream is not None
        seen["present"] = stream.present
        if rank == 0:  # the main process alone, as when it scores what it has saved
            with torch.no_grad():
                model.eval()
                found["logits"] = model(input_ids=IDS).logits
                found["written"] = model.generate(
                    input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0
                )
        processes.gather(None)
        away = model.model.layers[stream.present[0] - 1].mlp.up_proj.base
        seen["away_is_no_number"] = bool(away.dense_weight().isnan().all())
        seen["trained"] = trained(model, folder / f"run-{rank}", processes)
        found |= {f"trained.{name}": value for name, value in trained_values(model).items()}
        save_file({name: t.contiguous() for name, t in found.items()},
                  folder / f"{rank}.safetensors")  # fmt: skip
        (folder / f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
