"""One contender of `benchmark_step.py`, in a process of its own: some steps, timed and weighed.

    python scripts/step_contender.py '{"contender": "ours", "model": ..., ...}'

Prints one line of JSON. Every contender trains the same NF4 base (double quantization, bf16), the
same adapter on all linear layers, from the same first values, on the same made-up tokens, with
AdamW at a fixed learning rate and no dropout. PEFT's weights are quantized by bitsandbytes and
multiplied by its own kernels; Trainer and SFTTrainer run on PEFT's model.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

CPU = torch.device("cpu")


def made_up_rows(job: dict[str, Any], vocabulary: int) -> list[torch.Tensor]:
    """One (rows, tokens) batch per step: every next token is the last one plus a fixed step."""
    generator = torch.Generator().manual_seed(11)
    batches = []
    for _ in range(job["steps"]):
        first = torch.randint(vocabulary, (job["rows"], 1), generator=generator)
        stride = torch.randint(1, 17, (job["rows"], 1), generator=generator)
        batches.append((first + stride * torch.arange(job["tokens"])) % vocabulary)
    return batches


def run_ours(job: dict[str, Any], plain: bool) -> dict[str, Any]:
    """Our step; `plain` without the techniques of this benchmark's ablation."""
    from transformers import AutoModelForCausalLM

    from qlora_trainer.base.layers import decoder_layers
    from qlora_trainer.base.load import BaseSpec, load_base
    from qlora_trainer.lora.files import load_adapter
    from qlora_trainer.lora.inject import adapter_parameters
    from qlora_trainer.tasks.causal_lm import CausalLM
    from qlora_trainer.training.activations import plan_activations
    from qlora_trainer.training.optimizer import AdapterAdamW
    from qlora_trainer.training.step import train_step
    from qlora_trainer.training.techniques import Techniques, apply_techniques

    spec = BaseSpec("nf4", compute_dtype=torch.bfloat16)
    model = load_base(Path(job["model"]), AutoModelForCausalLM, spec, CPU)
    load_adapter(model, Path(job["adapter"]), dtype=torch.bfloat16, trainable=True)
    if not plain:
        apply_techniques(model, Techniques(fused_mlp=True, tiled_norms=True))
    plan_activations(model, decoder_layers(model), job["activations"])
    task = CausalLM.for_model(model)
    optimizer = AdapterAdamW(adapter_parameters(model), kind="adamw", weight_decay=0.0)
    model.train()
    losses: list[float] = []

    def step(ids: torch.Tensor) -> None:
        batch = task.prepare({"input_ids": ids, "labels": ids})
        result = train_step(
            model, [batch], task=task, optimizer=optimizer, learning_rate=1e-4, device=CPU,
            step=len(losses),
        )  # fmt: skip
        losses.append(float(result.loss))

    return timed(step, made_up_rows(job, model.config.vocab_size), losses)


def peft_model(job: dict[str, Any]) -> Any:
    """PEFT on bitsandbytes, its weights in bf16 where they are not quantized."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        job["model"], quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"},
        attn_implementation="sdpa", local_files_only=True,
    )  # fmt: skip
    base.config.use_cache = False
    model = PeftModel.from_pretrained(
        base, job["adapter"], is_trainable=True, autocast_adapter_dtype=False
    )
    if job["activations"] == "recompute":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def run_peft(job: dict[str, Any]) -> dict[str, Any]:
    """The loop a user would write by hand."""
    model = peft_model(job)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    losses: list[float] = []

    def step(ids: torch.Tensor) -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    return timed(step, made_up_rows(job, model.config.vocab_size), losses)


def run_trainer(job: dict[str, Any], trainer_class: Any, arguments_class: Any) -> dict[str, Any]:
    """Transformers' Trainer, or TRL's; timed from its own callbacks."""
    from transformers import TrainerCallback

    model = peft_model(job)
    batches = made_up_rows(job, model.config.vocab_size)
    rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch]
    stamps = [0.0]

    class Stamp(TrainerCallback):  # type: ignore[misc]
        """Notes when steps begin and end."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            stamps.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps[-1] += time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_class(
            output_dir=folder, per_device_train_batch_size=job["rows"], max_steps=job["steps"],
            learning_rate=1e-4, lr_scheduler_type="constant", weight_decay=0.0, logging_steps=1,
            report_to=[], save_strategy="no", use_cpu=True, bf16=True, seed=1,
            gradient_checkpointing=job["activations"] == "recompute",
            gradient_checkpointing_kwargs={"use_reentrant": False}, disable_tqdm=True,
        )  # fmt: skip
        trainer = trainer_class(model=model, args=arguments, train_dataset=rows)
        trainer.add_callback(Stamp())
        with Resident() as resident:
            trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return figures(stamps[2:] or stamps[1:], resident, losses)


def timed(step: Any, batches: list[torch.Tensor], losses: list[float]) -> dict[str, Any]:
    """Run every batch; the first step warms up and is not timed."""
    seconds = []
    with Resident() as resident:
        for ids in batches:
            began = time.perf_counter()
            step(ids)
            seconds.append(time.perf_counter() - began)
    return figures(seconds[1:] or seconds, resident, losses)


class Resident:
    """The most resident memory inside the block, above what stood before it."""

    def __enter__(self) -> Resident:
        self._process = psutil.Process()
        self._before = self._highest = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._highest = max(self._highest, self._process.memory_info().rss)

    @property
    def grown_bytes(self) -> int:
        """Highest minus what stood before."""
        return self._highest - self._before


def figures(seconds: list[float], resident: Resident, losses: list[float]) -> dict[str, Any]:
    """What the benchmark compares."""
    return {
        "step_seconds": statistics.median(seconds),
        "peak_step_bytes": resident.grown_bytes,
        "losses": losses,
    }


def main() -> int:
    """Run the contender named in the one argument."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    name = job["contender"]
    if name in ("ours", "ours-plain"):
        found = run_ours(job, plain=name == "ours-plain")
    elif name == "peft":
        found = run_peft(job)
    elif name == "trainer":
        from transformers import Trainer, TrainingArguments

        found = run_trainer(job, Trainer, TrainingArguments)
    else:
        from trl import SFTConfig, SFTTrainer

        found = run_trainer(job, SFTTrainer, SFTConfig)
    print("\n" + json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
