import traceback
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_trainer.errors import UserError
from qlora_trainer.lora.inject import adapter_parameters
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.training.optimizer import AdapterAdamW
from qlora_trainer.training.step import StepResult, gradient_norm, seed_random, train_step
from tests.training.tiny import CPU, adapted_llama, batch, optimizer_for, trained_values


class Kept:
    """Looks at a step before the optimizer moves: its gradients."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.gradients: dict[str, torch.Tensor] = {}

    def __call__(self, result: StepResult) -> bool:
        self.gradients = {
            name: p.grad.clone()
            for name, p in adapter_parameters(self.model).items()
            if p.grad is not None
        }
        return True


def one_step(parts: int, dtype: torch.dtype, **settings: Any) -> tuple[StepResult, Any, Any]:
    model = adapted_llama(dtype)
    for p in adapter_parameters(model).values():  # away from the zero start: all gradients live
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    task = CausalLM.for_model(model)
    whole = batch(8, 12, seed=4)
    size = 8 // parts
    window = [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, 8, size)]
    kept = Kept(model)
    result = train_step(
        model,
        [task.prepare(part) for part in window],
        task=task,
        optimizer=optimizer_for(model),
        learning_rate=1e-3,
        device=CPU,
        check=kept,
        **settings,
    )
    return result, kept.gradients, trained_values(model)


def test_eight_micro_batches_of_one_row_equal_one_of_eight_rows() -> None:
    one, one_gradients, one_values = one_step(1, torch.float32)
    many, many_gradients, many_values = one_step(8, torch.float32)
    assert one.trained_tokens == many.trained_tokens
    torch.testing.assert_close(one.loss, many.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(one.gradient_norm, many.gradient_norm, rtol=1e-5, atol=0)
    for name, gradient in one_gradients.items():
        torch.testing.assert_close(many_gradients[name], gradient, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(many_values[name], one_values[name], rtol=1e-4, atol=2e-5)


def test_loss_is_the_mean_over_trained_tokens_and_not_over_rows() -> None:
    model = adapted_llama()
    task = CausalLM.for_model(model)
    whole = batch(4, 12, seed=9)
    logits = model(input_ids=whole["input_ids"]).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, whole["labels"][:, 1:].flatten())
    parts = [{k: v[i : i + 1] for k, v in whole.items()} for i in range(4)]
    result = train_step(
        model,
        [task.prepare(part) for part in parts],
        task=task,
        optimizer=optimizer_for(model),
        learning_rate=1e-3,
        device=CPU,
    )
    torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-5, atol=1e-6)


def test_norm_clipping_and_update_equal_torchs_own() -> None:
    result, gradients, values = one_step(2, torch.float32, max_grad_norm=0.05)
    assert result.gradient_norm > 0.05
    model = adapted_llama()
    parameters = adapter_parameters(model)
    for p in parameters.values():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    reference = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.0)
    for name, p in parameters.items():
        p.grad = gradients[name]
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.05)
    reference.step()
    torch.testing.assert_close(result.gradient_norm, norm, rtol=1e-5, atol=0)
    for name, p in parameters.items():
        torch.testing.assert_close(values[name], p.detach(), rtol=1e-4, atol=1e-6)


def test_loss_scale_changes_neither_norm_nor_update() -> None:
    plain, _, values = one_step(2, torch.float32)
    scaled, gradients, scaled_values = one_step(2, torch.float32, loss_scale=1024.0)
    torch.testing.assert_close(scaled.gradient_norm, plain.gradient_norm, rtol=1e-5, atol=0)
    assert gradient_norm_of(gradients) > 500 * plain.gradient_norm
    for name, value in values.items():
        torch.testing.assert_close(scaled_values[name], value, rtol=1e-4, atol=1e-6)


def gradient_norm_of(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients.values()]))


def test_a_refused_step_moves_nothing_and_leaves_no_gradient() -> None:
    model = adapted_llama()
    task, optimizer = CausalLM.for_model(model), optimizer_for(model)
    before = trained_values(model)
    result = train_step(
        model,
        [task.prepare(batch(2, 8, 1))],
        task=task,
        optimizer=optimizer,
        learning_rate=1.0,
        device=CPU,
        check=lambda _: False,
    )
    assert not result.applied
    assert all(torch.equal(before[n], v) for n, v in trained_values(model).items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(tensor.any() for name, tensor, _ in optimizer.state_tensors())
    assert set(optimizer.steps.values()) == {0}


def test_bf16_gradients_have_their_norm_in_fp32() -> None:
    parameter = torch.nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    parameter.grad = torch.full_like(parameter, 0.0101)
    exact = parameter.grad.double().norm()
    assert gradient_norm([parameter]).item() == pytest.approx(exact.item(), rel=2e-4)


def test_a_window_without_trained_tokens_is_refused() -> None:
    model = adapted_llama()
    task = CausalLM.for_model(model)
    empty = batch(1, 8, 1)
    empty["labels"][:] = -100
    with pytest.raises(UserError, match="none of its tokens is trained"):
        train_step(
            model,
            [task.prepare(empty)],
            task=task,
            optimizer=optimizer_for(model),
            learning_rate=1.0,
            device=CPU,
        )


def test_dropout_is_a_pure_function_of_seed_step_and_micro_batch() -> None:
    def draw(*place: int) -> torch.Tensor:
        seed_random(*place)
        return torch.rand(4)

    torch.manual_seed(99)
    first = draw(1, 2, 3)
    torch.rand(7)
    assert torch.equal(first, draw(1, 2, 3))
    others = [draw(1, 2, 4), draw(1, 3, 3), draw(2, 2, 3), draw(3, 2, 1), draw(0, 0, 0)]
    assert not any(torch.equal(first, other) for other in others)


class OnlyTransformersMayAsk(TorchDispatchMode):
    """Answers one question (is this row unpacked?) that transformers asks; ours would raise."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            files = [frame.filename for frame in traceback.extract_stack()]
            assert any("masking_utils" in file for file in files), files[-4:]
            return True
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_runs_on_weightless_tensors_and_asks_no_value(
    kind: Any, dtype: torch.dtype
) -> None:
    model = adapted_llama(dtype, rank=64, dropout=0.1).to("meta")
    task = CausalLM.for_model(model)
    optimizer = AdapterAdamW(adapter_parameters(model), kind=kind)
    window = [task.prepare(batch(2, 8, seed)) for seed in (1, 2)]
    with OnlyTransformersMayAsk():
        result = train_step(
            model,
            window,
            task=task,
            optimizer=optimizer,
            learning_rate=1e-3,
            device=torch.device("meta"),
            loss_scale=8.0,
        )
    assert result.loss.is_meta
    assert set(optimizer.steps.values()) == {1}
