from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.errors import UserError
from qlora_trainer.lora.inject import adapted_layers, adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.training.checks import LearningChecks
from qlora_trainer.training.evaluate import evaluate
from qlora_trainer.training.loop import run_training
from qlora_trainer.training.plan import TrainingPlan
from qlora_trainer.training.step import train_step
from tests.training.tiny import (
    CPU,
    adapted_llama,
    batch,
    held_out,
    make_run,
    optimizer_for,
    tiny_llama,
)


def nf4_llama() -> Any:
    """Tiny Llama in bf16 with every linear layer of its decoder in NF4."""
    model = tiny_llama(torch.bfloat16)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            packed = NF4Linear.quantize(
                module.weight.detach(), None, compute_dtype=torch.bfloat16, device=CPU
            )
            setattr(model.model.get_submodule(parent), leaf, packed)
    inject_adapter(model, AdapterSpec(rank=4, alpha=8), dtype=torch.bfloat16, seed=1)
    return model


class Cut(nn.Module):
    """A module whose backward is lost, as a library's inference shortcut loses it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).detach()


def test_evaluating_then_training_again_gives_every_adapter_a_gradient_on_nf4() -> None:
    model = nf4_llama()
    task, optimizer = CausalLM.for_model(model), optimizer_for(model)
    seen: list[int] = []

    def count(_: object) -> bool:
        seen.append(sum(bool(p.grad is not None and p.grad.any()) for p in witnesses))
        return True

    witnesses = [layer.lora_B for layer in adapted_layers(model).values()]
    for step in range(3):
        train_step(
            model,
            [task.prepare(batch(2, 10, step))],
            task=task,
            optimizer=optimizer,
            learning_rate=1e-2,
            device=CPU,
            step=step,
            check=count,
        )
        evaluate(model, held_out()(), task=task, device=CPU)
    assert seen == [14, 14, 14]  # two layers of seven


def test_an_adapter_cut_off_from_the_loss_stops_the_run_by_name(tmp_path: Path) -> None:
    model = adapted_llama()
    mlp = model.model.layers[1].mlp
    mlp.gate_proj = Cut(mlp.gate_proj)
    before = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
    with pytest.raises(UserError, match=r"(?s)1 fault.*model\.layers\.1\.mlp\.gate_proj\.inner"):
        run_training(make_run(tmp_path, model, total_steps=2), TrainingPlan(2, 1e-3))
    assert all(torch.equal(before[n], p) for n, p in adapter_parameters(model).items())


def test_an_adapter_cut_off_by_an_evaluation_stops_the_next_step(tmp_path: Path) -> None:
    model = adapted_llama()

    evaluations: list[int] = []

    def break_it() -> None:
        evaluations.append(1)
        if len(evaluations) < 2:  # the first is before any step, and the first step is looked at
            return
        attention = model.model.layers[0].self_attn
        attention.v_proj = Cut(attention.v_proj)

    run = make_run(tmp_path, model, total_steps=4, eval_batches=held_out(break_it))
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.v_proj"):
        run_training(run, TrainingPlan(4, 1e-3, evaluate_every_steps=2))


def test_an_adapter_never_reached_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    model = adapted_llama()
    model.model.layers[0].spare = nn.Linear(8, 8)
    parent = model.model.layers[0]
    inject_adapter(
        parent, AdapterSpec(rank=2, alpha=2, target_modules=("spare",)), dtype=torch.float32, seed=0
    )
    for p in adapter_parameters(model).values():
        p.requires_grad_(True)
    lines: list[str] = []
    outcome = run_training(
        make_run(tmp_path, model, total_steps=3, lines=lines), TrainingPlan(3, 1e-3)
    )
    assert outcome.complete
    told = [line for line in lines if "did not run" in line]
    assert len(told) == 1
    assert told[0].endswith("model.layers.0.spare")


def test_an_adapter_that_was_updated_but_did_not_move_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)did not move.*14 faults|14 faults.*"):
        run_training(
            make_run(tmp_path, adapted_llama(), total_steps=2), TrainingPlan(2, learning_rate=0.0)
        )


def test_checks_look_at_the_factor_that_starts_at_zero() -> None:
    model = adapted_llama()
    checks = LearningChecks(model, print)
    checks.begin()
    model(input_ids=torch.ones(1, 3, dtype=torch.int64))
    for layer in adapted_layers(model).values():
        layer.lora_A.grad = torch.ones_like(layer.lora_A)
    with pytest.raises(UserError, match="got no gradient"):
        checks.require_gradients()
    for layer in adapted_layers(model).values():
        layer.lora_B.grad = torch.ones_like(layer.lora_B)
    checks.require_gradients()
