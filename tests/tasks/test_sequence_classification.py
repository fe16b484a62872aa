"""Losses are transformers' own, heads are trained, figures are told."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from qlora_trainer.base.load import build_weightless_base
from qlora_trainer.base.select import trained_heads
from qlora_trainer.base.spec import BaseSpec
from qlora_trainer.tasks.catalogue import task_kind
from qlora_trainer.tasks.kind import TaskInputs
from qlora_trainer.tasks.sequence_classification import KIND, SequenceClassification

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
CONFIGS = {"bert": tf.BertConfig, "llama": tf.LlamaConfig, "roberta": tf.RobertaConfig}


def config_of(name: str, **more: Any) -> Any:
    return CONFIGS[name](**SIZES, num_labels=3, **more)


def batch(problem: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 64, (4, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, 4:], mask[0, 4:] = 0, 0
    targets = {
        "single": torch.tensor([0, 2, 1, 2]),
        "multi": torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 1]]).float(),
        "regression": torch.tensor([0.5, -2.0, 1.0, 3.0]),
    }
    return {"input_ids": ids, "attention_mask": mask, "targets": targets[problem]}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("problem", ["single", "multi", "regression"])
def test_loss_is_transformers_own(name: str, problem: str) -> None:
    torch.manual_seed(0)
    kind = problem if problem == "regression" else f"{problem}_label_classification"
    config = config_of(name, problem_type=kind)
    config.num_labels = 1 if problem == "regression" else 3
    model = tf.AutoModelForSequenceClassification.from_config(config).eval()
    given = batch(problem)
    task = KIND.make_task(TaskInputs(model, {}))
    prepared = task.prepare(given)
    ours = task.loss_sum(model, prepared).detach() / task.loss_weight(prepared)
    theirs = model(
        given["input_ids"], given["attention_mask"], labels=given["targets"]
    ).loss.detach()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


def test_class_weights_count_as_cross_entropy_does() -> None:
    weights = torch.tensor([0.5, 1.0, 2.0])
    task = SequenceClassification("single", ("a", "b", "c"), weights)
    torch.manual_seed(0)
    model = tf.AutoModelForSequenceClassification.from_config(config_of("bert")).eval()
    prepared = task.prepare(batch("single"))
    every = torch.nn.functional.cross_entropy(
        model(prepared["input_ids"], prepared["attention_mask"]).logits,
        prepared["targets"],
        reduction="none",
    )
    expected = (every * weights[prepared["targets"]]).sum()
    found = task.loss_sum(model, prepared).detach()
    assert float(found) == pytest.approx(float(expected.detach()), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "heads"),
    [("bert", ["bert.pooler", "classifier"]), ("llama", ["score"]), ("roberta", ["classifier"])],
)
def test_heads_and_poolers_are_trained_and_never_quantized(name: str, heads: list[str]) -> None:
    model = build_weightless_base(config_of(name), KIND.auto_class, BaseSpec("nf4"))
    assert trained_heads(model) == heads
    for path in heads:
        inner = model.get_submodule(path).modules()
        assert all(not hasattr(module, "dense_weight") for module in inner)


def test_scores_report_and_picture(tmp_path: Path) -> None:
    task = SequenceClassification("single", ("bad", "good"))
    scores = task.score([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [0, 1, 1])
    assert scores.metrics["accuracy"] == pytest.approx(2 / 3)
    assert set(scores.metrics) | {"loss"} == set(task.metrics)
    assert "macro average" in scores.report
    scores.pictures["confusion.png"](tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    assert task.tell([[0.9, 0.1]], [None]) == [
        {"label": "bad", "score": 0.9, "probabilities": {"bad": 0.9, "good": 0.1}}
    ]


def test_several_labels_and_numbers_are_scored_and_told() -> None:
    many = SequenceClassification("multi", ("a", "b"))
    scores = many.score([[0.9, 0.8], [0.1, 0.7]], [[0, 1], [0]])
    assert scores.metrics["accuracy"] == 0.5
    assert many.tell([[0.9, 0.8], [0.1, 0.2]], [None, None])[1]["labels"] == []
    number = SequenceClassification("regression", ("value",))
    assert number.score([[1.0], [2.0]], [2.0, 4.0]).metrics["pearson"] == pytest.approx(1.0)
    assert number.tell([[1.5]], [None]) == [{"value": 1.5}]
    for task in (many, number):
        assert task.best_metric in task.metrics


def test_every_task_of_the_catalogue_has_its_own_name() -> None:
    assert task_kind("sequence-classification") is KIND
