"""One contender of `benchmark_step.py`, in a process of its own: a step whenever it is let.

    python scripts/step_contender.py '{"contender": "ours", "kind": "ours", "model": ..., ...}'

`step_gate.py` says when it steps and what it answers. Every contender trains the same NF4 base
(double quantization), the same adapter on all linear layers, from the same first values, on
the same tokens, with AdamW at a fixed learning rate and no dropout. PEFT's weights are quantized by
bitsandbytes and multiplied by its own kernels; Trainer and SFTTrainer run on PEFT's model.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step_data import Batch, made_up_rows, packed_batches, real_examples
from step_gate import Gate

CPU = torch.device("cpu")
WIDE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run_ours(job: dict[str, Any], gate: Gate) -> None:
    """Our step with the techniques the job names."""
    from transformers import AutoModelForCausalLM

    from qlora_trainer.base.host_memory import FreedPages, keep_freed_pages
    from qlora_trainer.base.layers import decoder_layers
    from qlora_trainer.base.load import BaseSpec, load_base
    from qlora_trainer.base.packed_attention import use_packed_attention
    from qlora_trainer.lora.files import load_adapter
    from qlora_trainer.lora.inject import adapter_parameters
    from qlora_trainer.tasks.causal_lm import CausalLM
    from qlora_trainer.training.activations import plan_activations
    from qlora_trainer.training.compiled import compile_modules
    from qlora_trainer.training.optimizer import AdapterAdamW
    from qlora_trainer.training.step import train_step
    from qlora_trainer.training.techniques import Techniques, apply_techniques

    on = set(job["techniques"])
    if "freed_pages" in on:
        keep_freed_pages()  # as `qlora train` on a CPU
    attention = None if "tiled_attention" in on else "sdpa"
    spec = BaseSpec("nf4", compute_dtype=WIDE[job["compute_dtype"]], attention=attention)
    model = load_base(Path(job["model"]), AutoModelForCausalLM, spec, CPU)
    load_adapter(model, Path(job["adapter"]), dtype=WIDE[job["adapter_dtype"]], trainable=True)
    techniques = Techniques(
        fused_mlp="fused_mlp" in on,
        tiled_norms="tiled_norms" in on,
        mlp_keeps_inner=job.get("mlp_keeps_inner", False),
        fused_qkv="fused_qkv" in on,
        fused_linear="fused_linear" in on,
        attention_keeps_probabilities=job.get("attention_keeps_probabilities", False),
    )
    apply_techniques(model, techniques)
    if job["data"]:
        use_packed_attention(model, job["tokens"])
    layers = decoder_layers(model)
    plan_activations(model, layers, activation_plan(job["activations"], len(layers)))
    if job.get("compile"):
        compile_modules(model)
    task = CausalLM.for_model(
        model, chunk_tokens=job.get("loss_chunk_tokens"), chunked="chunked_loss" in on
    )
    optimizer = AdapterAdamW(adapter_parameters(model), kind="adamw", weight_decay=0.0)
    model.train()
    done, freed = 0, FreedPages(CPU)

    def step(batch: Batch) -> float:
        nonlocal done
        if "freed_pages" not in on:
            freed.give_back()
        freed.before_step()
        result = train_step(
            model, [task.prepare(batch)], task=task, optimizer=optimizer, learning_rate=1e-4,
            device=CPU, step=done,
        )  # fmt: skip
        freed.after_step()
        done += 1
        return float(result.loss)

    _one_by_one(step, _batches(job, model.config.vocab_size), gate)


def _one_by_one(step: Callable[[Batch], float], batches: list[Batch], gate: Gate) -> None:
    """A step whenever the gate opens."""
    for batch in batches:
        gate.begin()
        loss = step(batch)
        gate.end()
        gate.say(loss=loss, tokens=batch["input_ids"].numel())
    gate.leave()


def activation_plan(activations: str, layers: int) -> Any:
    """What each layer does: `recompute:N` recomputes the first N layers and keeps the rest."""
    kind, _, count = activations.partition(":")
    return [kind if index < int(count) else "keep" for index in range(layers)] if count else kind


def _batches(job: dict[str, Any], vocabulary: int) -> list[Batch]:
    if job["data"]:
        return packed_batches(job)
    return [{"input_ids": ids, "labels": ids} for ids in made_up_rows(job, vocabulary)]


def peft_model(job: dict[str, Any]) -> Any:
    """PEFT on bitsandbytes; weights that are not quantized are held in the dtype of computing."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = WIDE[job["compute_dtype"]]
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        job["model"], quantization_config=config, dtype=dtype, device_map={"": "cpu"},
        attn_implementation=job["attention"], local_files_only=True,
    )  # fmt: skip
    base.config.use_cache = False
    # PEFT's own default casts the adapter to fp32.
    wide = job["adapter_dtype"] == "float32"
    model = PeftModel.from_pretrained(
        base, job["adapter"], is_trainable=True, autocast_adapter_dtype=wide
    )
    if job["activations"] == "recompute":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def run_peft(job: dict[str, Any], gate: Gate) -> None:
    """The loop a user would write by hand."""
    model = peft_model(job)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def step(batch: Batch) -> float:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    _one_by_one(step, _batches(job, model.config.vocab_size), gate)


def run_trainer(job: dict[str, Any], gate: Gate) -> None:
    """Transformers' Trainer, or TRL's; let through and timed from its own callbacks."""
    from transformers import TrainerCallback

    counts: list[int] = []  # of batches, which are made ahead of their steps

    class Turnstile(TrainerCallback):  # type: ignore[misc]
        """Waits before a step, and says what it was when its loss is known."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.end()

        def on_log(self, _: Any, state: Any, *__: Any, logs: dict[str, float], **___: Any) -> None:
            if "loss" in logs:
                gate.say(loss=logs["loss"], tokens=counts[state.global_step - 1])

    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(job, peft_model(job), folder)
        collate = trainer.data_collator

        def counted(rows: Any) -> Any:
            batch = collate(rows)
            mask = batch.get("attention_mask")
            counts.append(int(batch["input_ids"].numel() if mask is None else mask.sum()))
            return batch

        trainer.data_collator = counted
        trainer.add_callback(Turnstile())
        trainer.train()
        gate.leave()


def _trainer(job: dict[str, Any], model: Any, folder: str) -> Any:
    """Set up as the job says, on its data."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "output_dir": folder, "max_steps": job["steps"], "learning_rate": 1e-4,
        "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "seed": 1, "disable_tqdm": True,
        "gradient_checkpointing": job["activations"] == "recompute",
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    } | job["arguments"]  # fmt: skip
    tokenizer, rows = None, []
    if job["data"]:
        tokenizer = AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
        rows = real_examples(job)
    else:
        settings["per_device_train_batch_size"] = job["rows"]
        rows = [row for batch in made_up_rows(job, model.config.vocab_size) for row in batch]
    if job["kind"] == "trl":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        lists = [list(map(int, ids)) for ids in rows]
        data = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in lists])
        return SFTTrainer(model=model, args=SFTConfig(**settings), train_dataset=data,
                          processing_class=tokenizer)  # fmt: skip
    pads = {} if tokenizer is None else {"data_collator": DataCollatorForSeq2Seq(tokenizer)}
    data = [{"input_ids": ids, "labels": ids} for ids in rows]
    return Trainer(model=model, args=TrainingArguments(**settings), train_dataset=data, **pads)


def main() -> int:
    """Run the contender described in the one argument."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    run = {"ours": run_ours, "peft": run_peft}.get(job["kind"], run_trainer)
    run(job, Gate())
    return 0


if __name__ == "__main__":
    sys.exit(main())
