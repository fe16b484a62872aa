from typing import Any

import pytest
import torch
from torch import nn

from qlora_trainer.errors import UserError
from qlora_trainer.tasks.causal_lm import CausalLM
from qlora_trainer.training.evaluate import evaluate
from tests.training.tiny import CPU, adapted_llama, batch


def test_metrics_do_not_depend_on_the_evaluations_micro_batch() -> None:
    model = adapted_llama()
    task = CausalLM.for_model(model)
    whole = batch(6, 10, seed=3)

    def score(size: int) -> dict[str, float]:
        parts = [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, 6, size)]
        return evaluate(model, parts, task=task, device=CPU)

    one, many = score(6), score(1)
    assert one["tokens"] == many["tokens"] == int((whole["labels"][:, 1:] != -100).sum())
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-6)
    assert one["token_accuracy"] == many["token_accuracy"]


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_put_back(training: bool) -> None:
    model = adapted_llama(dropout=0.5).train(training)
    task = CausalLM.for_model(model)
    scores = [evaluate(model, [batch(2, 8, 1)], task=task, device=CPU) for _ in range(2)]
    assert scores[0] == scores[1]  # no dropout inside
    assert model.training is training


def test_rows_without_trained_tokens_count_for_nothing() -> None:
    model = adapted_llama()
    task = CausalLM.for_model(model)
    good, empty = batch(2, 8, 1), batch(2, 8, 2)
    empty["labels"][:] = -100
    alone = evaluate(model, [good], task=task, device=CPU)
    assert evaluate(model, [empty, good], task=task, device=CPU) == alone
    with pytest.raises(UserError, match="nothing to score"):
        evaluate(model, [empty], task=task, device=CPU)


def test_a_held_out_loss_that_is_not_finite_stops() -> None:
    model = adapted_llama()
    task = CausalLM.for_model(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="held-out loss is nan"):
        evaluate(model, [batch(2, 8, 1)], task=task, device=CPU)


class SmallMemory(nn.Module):
    def __init__(self, inner: nn.Module, rows: int) -> None:
        super().__init__()
        self.inner, self.rows = inner, rows

    def forward(self, x: torch.Tensor) -> Any:
        if x.shape[0] > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.inner(x)


def test_out_of_memory_halves_the_batch_aloud_and_changes_no_result() -> None:
    model = adapted_llama()
    task = CausalLM.for_model(model)
    batches = [batch(5, 10, 1), batch(4, 10, 2)]
    roomy = evaluate(model, batches, task=task, device=CPU)
    model.model.norm = SmallMemory(model.model.norm, rows=2)
    said: list[str] = []
    tight = evaluate(model, batches, task=task, device=CPU, say=said.append)
    assert tight["tokens"] == roomy["tokens"]
    assert tight["loss"] == pytest.approx(roomy["loss"], rel=1e-6)
    assert tight["token_accuracy"] == roomy["token_accuracy"]
    assert len(said) == 2  # 5 rows, then 3; the second batch is cut at once
    model.model.norm.rows = 0
    with pytest.raises(UserError, match="single sequence of 10 tokens"):
        evaluate(model, batches, task=task, device=CPU, say=said.append)
