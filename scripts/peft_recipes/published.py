"""Two other published benchmarks: fms-acceleration's on an A100, PEFT's own on an L40S."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from peft_recipes.loading import build_skeleton, load_quantized, load_whole_then_move, model_config
from peft_recipes.recipe import CARD, GPUS, Recipe
from qlora_trainer.memory.attention import ANSWERS, attention_for
from qlora_trainer.memory.log import EMPTY_CACHE, RESET_PEAK
from qlora_trainer.memory.simulate import Trace, simulate
from qlora_trainer.memory.tracker import AllocationTracker


def _loss_of_transformers_4(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_kwargs: Any
) -> torch.Tensor:
    """Transformers 4.48: logits cast to fp32, then shifted into a copy (loss/loss_utils.py)."""
    wide = logits.float()
    shifted = wide[..., :-1, :].contiguous()
    targets = labels[..., 1:].contiguous()
    return F.cross_entropy(shifted.view(-1, vocab_size), targets.view(-1), ignore_index=-100)


def run_a100(recipe: Recipe) -> Trace:
    """fms-acceleration's benchmark: Hugging Face Trainer, bf16 autocast, flash attention 2.

    `meta` has no autocast: the head's input is cast to its weight's dtype as autocast would; what
    autocast does inside a layer does not reach the peak, which the logits make.
    """
    gpu = GPUS[recipe.gpu]
    flash = attention_for(gpu)
    skeleton = build_skeleton(
        model_config(recipe.model | {"seq_len": recipe.seq_len}), flash, torch.bfloat16
    )

    def program(tracker: AllocationTracker) -> None:
        tracker.set_phase("load")
        with tracker.component("base weights"):
            if recipe.quantization == "nf4":
                model = load_quantized(skeleton, tracker, torch.bfloat16, recipe.double_quant)
            else:
                model = load_whole_then_move(skeleton, tracker)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if recipe.norm_dtype == "float32":
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.data = parameter.data.float()
        model.lm_head.register_forward_pre_hook(
            lambda module, inputs: (inputs[0].to(module.weight.dtype),)
        )
        model.loss_function = _loss_of_transformers_4
        with tracker.component("adapters"):
            model = get_peft_model(model, _lora(recipe))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
        tracker.set_phase("setup")
        _trainer_steps(model, recipe, tracker, mask=False)

    return simulate(program, gpu, answers=ANSWERS)


def run_l40s(recipe: Recipe) -> Trace:
    """PEFT's method comparison: bf16 base, fp32 adapters, padded batches, nothing recomputed.

    Two steps make the optimizer's states; the cache is emptied just before the longest batch.
    """
    skeleton = build_skeleton(
        model_config(recipe.model | {"seq_len": recipe.seq_len}, use_cache=True),
        attention_for(GPUS[recipe.gpu]),
        torch.bfloat16,
    )

    def program(tracker: AllocationTracker) -> None:
        tracker.set_phase("load")
        with tracker.component("base weights"):
            model = load_whole_then_move(skeleton, tracker)
        with tracker.component("adapters"):
            model = get_peft_model(model, _lora(recipe))
        model.train()
        tracker.set_phase("setup")
        _trainer_steps(model, recipe, tracker, mask=True)

    return simulate(program, GPUS[recipe.gpu], answers=ANSWERS)


def _lora(recipe: Recipe) -> Any:
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        target_modules=list(recipe.targets),
    )


def _trainer_steps(model: Any, recipe: Recipe, tracker: AllocationTracker, *, mask: bool) -> None:
    """Steps of a loop that keeps the loss only, clips, and updates."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=True
    )

    def step(name: str, tokens: int) -> None:
        size = (recipe.batch_size, tokens)
        batch = {
            key: torch.empty(size, dtype=torch.int64, device=CARD)
            for key in ("input_ids", "labels", "attention_mask")
        }
        given = dict(batch)
        if not mask:  # packed: the mask is on the card and says nothing
            given.pop("attention_mask")
        tracker.set_phase(f"{name} forward")
        loss = model(**given).loss
        tracker.set_phase(f"{name} backward")
        loss.backward()
        del loss
        tracker.set_phase(f"{name} optimizer")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tracker.set_phase(f"{name} steady")

    step("warm-up", recipe.seq_len if not mask else 64)
    if mask:
        tracker.mark(EMPTY_CACHE)
    tracker.mark(RESET_PEAK)
    step("measured", recipe.seq_len)
    step("phased", recipe.seq_len)
