"""The same run with PEFT: what `qlora train` is measured against.

    .venv/bin/python scripts/peft_twin.py RUN.yaml --json FILE [--film-reviews] [--set ...]

The run file, the encoded rows, the batches and their order, the learning rate of every step and the
held-out rows are those of `qlora train`. The rest is what one writes with PEFT: transformers and
bitsandbytes load the base in NF4, PEFT puts fp32 LoRA on it, the model computes its logits for
every token, torch's AdamW steps. The adapter starts from the same values: ours, saved before the
first step and loaded by PEFT, so that what differs at the end was made by the training.

One repair: bitsandbytes 0.50 re-packs a `Linear4bit` in a forward without gradients on CPUs with
avx512_bf16, and then trains nothing; the attribute that allows it is switched off on each instance.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bitsandbytes
import film_reviews
import torch
from peft import PeftModel
from peft_loop import Batch, train_steps
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_trainer import load_run
from qlora_trainer.data.encode import choose_pad_id
from qlora_trainer.lora.files import save_adapter
from qlora_trainer.tasks.generate import generate_tokens
from qlora_trainer.training import setup


def load_with_peft(run: Any, source: setup.ModelSource) -> Any:
    """Base in NF4 by transformers and bitsandbytes; PEFT's fp32 LoRA with our initial values."""
    with tempfile.TemporaryDirectory() as scratch:
        ours = setup.load_model(run, source)
        spec = setup.add_adapter(run, ours, source.base_spec.compute_dtype)
        save_adapter(ours, spec, Path(scratch), base_source=None, task_type="CAUSAL_LM")
        del ours
        base = AutoModelForCausalLM.from_pretrained(
            source.resolved.folder,
            dtype=source.base_spec.compute_dtype,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=source.base_spec.double_quant,
                bnb_4bit_compute_dtype=source.base_spec.compute_dtype,
            ),
        )
        for module in base.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False
        base.config.use_cache = False
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
        model = PeftModel.from_pretrained(base, scratch, is_trainable=True)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in name
            parameter.data = parameter.data.float()
    return model


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy summed over the trained tokens, from all logits in fp32."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def trained_tokens(batch: Batch) -> int:
    """Labels that count once shifted."""
    return int((batch["labels"][:, 1:] != -100).sum())


@torch.no_grad()
def held_out_loss(model: Any, batches: Iterable[Batch]) -> float:
    """Mean over trained tokens."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        total += float(loss_sum(model, batch))
        count += trained_tokens(batch)
    model.train()
    return total / count


def train(run: Any, model: Any, source: setup.ModelSource, data: setup.RunData) -> list[float]:
    """The steps of `qlora train`; returns the loss of each."""
    windows = setup.make_windows(run, data, model.config._attn_implementation)
    model.train()
    return train_steps(
        run,
        setup.training_plan(run, windows),
        [p for p in model.parameters() if p.requires_grad],
        windows.window,
        loss_sum=lambda batch: loss_sum(model, batch),
        loss_weight=trained_tokens,
        said=lambda line: print(line, flush=True),
    )


def film_accuracy(model: Any, source: setup.ModelSource, data: setup.RunData) -> dict[str, Any]:
    """Accuracy on the held-out film reviews, asked and read as `film_reviews.py` does."""
    questions = film_reviews.read_questions()
    system = {"role": "system", "content": film_reviews.SYSTEM}
    chats = [[system, {"role": "user", "content": question.prompt}] for question in questions]
    answers = generate_tokens(
        model,
        [data.encoder.encode_prompt(chat) for chat in chats],
        pad_token_id=choose_pad_id(source.tokenizer),
        stop_token_ids=sorted({source.tokenizer.eos_token_id, *source.stop_ids}),
        max_new_tokens=film_reviews.MAX_NEW_TOKENS,
        batch_size=film_reviews.BATCH_SIZE,
    )
    texts = [source.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return film_reviews.score_answers(texts, questions).as_json()


def main() -> int:
    """Command line: one run, its figures as JSON."""
    parser = argparse.ArgumentParser(description="The same run with PEFT.")
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--film-reviews", action="store_true", help="also accuracy by generation")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    run = load_run(arguments.run_file, arguments.overrides)
    source = setup.open_model(run)
    data = setup.open_data(run, source)
    held_out = setup.eval_batches(run, data)
    assert held_out is not None, "the run file names held-out rows"
    model = load_with_peft(run, source)
    report: dict[str, Any] = {"loss_before": held_out_loss(model, held_out())}
    began = time.monotonic()
    report["training_losses"] = train(run, model, source, data)
    report["training_seconds"] = time.monotonic() - began
    report["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report["loss"] = held_out_loss(model, held_out())
    if arguments.film_reviews:
        report["film_reviews"] = film_accuracy(model, source, data)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
