"""The runs measured on a T4: scripts/measure.py of fitcheck-llm 0.3.1 (MIT), line by line."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

from peft_recipes.loading import build_skeleton, load_quantized, load_whole_then_move, model_config
from peft_recipes.recipe import CARD, DTYPES, GPUS, Recipe
from qlora_trainer.memory.attention import ANSWERS
from qlora_trainer.memory.log import RESET_PEAK
from qlora_trainer.memory.simulate import Trace, simulate
from qlora_trainer.memory.tracker import AllocationTracker


def run_t4(recipe: Recipe) -> Trace:
    """measure.py of fitcheck-llm, line by line."""
    dtype = DTYPES[recipe.compute_dtype]
    skeleton = build_skeleton(
        model_config(recipe.model | {"seq_len": recipe.seq_len}), recipe.attention, dtype
    )

    def program(tracker: AllocationTracker) -> None:
        tracker.set_phase("load")
        with tracker.component("base weights"):
            if recipe.quantization == "nf4":
                model = load_quantized(skeleton, tracker, dtype, recipe.double_quant)
            else:
                model = load_whole_then_move(skeleton, tracker)
            model.config.use_cache = False
            if recipe.quantization != "none":
                # PEFT 0.20 empties the cache in here, and the measured runs kept what loading had
                # reserved: inferred from the rows, not documented. The four NF4 rows of
                # SmolLM2-135M come out within 2 MiB if the loader's warm-up segment and four of
                # 20 MiB outlive this call, and 14 to 66 MiB too low if they do not.
                model = prepare_model_for_kbit_training(
                    model, use_gradient_checkpointing=recipe.gradient_checkpointing
                )
        with tracker.component("adapters"):
            model = get_peft_model(
                model,
                LoraConfig(
                    r=recipe.rank,
                    lora_alpha=2 * recipe.rank,
                    lora_dropout=0.0,
                    bias="none",
                    task_type="CAUSAL_LM",
                    target_modules=list(recipe.targets),
                ),
            )
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            model.enable_input_require_grads()
        model.train()
        tracker.set_phase("setup")
        optimizer, batch = _prepare(model, recipe)
        _train(model, optimizer, batch, tracker)

    return simulate(program, GPUS[recipe.gpu], answers=ANSWERS)


def _prepare(model: Any, recipe: Recipe) -> tuple[Any, torch.Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    # foreach is what torch.optim chooses by itself on CUDA
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=True)
    batch = torch.empty((recipe.batch_size, recipe.seq_len), dtype=torch.int64, device=CARD)
    return optimizer, batch


def _train(model: Any, optimizer: Any, batch: torch.Tensor, tracker: AllocationTracker) -> None:
    def step(name: str) -> None:
        tracker.set_phase(f"{name} zero_grad")
        optimizer.zero_grad(set_to_none=True)
        tracker.set_phase(f"{name} forward")
        out = model(input_ids=batch, labels=batch)
        tracker.set_phase(f"{name} backward")
        out.loss.backward()
        tracker.set_phase(f"{name} optimizer")
        optimizer.step()

    step("warm-up")
    tracker.set_phase("between")
    tracker.mark(RESET_PEAK)
    step("measured")
    tracker.set_phase("after")
    step("phased")
