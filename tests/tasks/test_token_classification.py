import pytest
import torch
import transformers as tf

from qlora_trainer.data.dataset import build_dataset
from qlora_trainer.data.read import DataSource
from qlora_trainer.errors import UserError
from qlora_trainer.tasks.catalogue import task_kind
from qlora_trainer.tasks.kind import EncoderInputs, TaskInputs
from qlora_trainer.tasks.task import ScoredTask, cut_rows, to_device
from qlora_trainer.tasks.token_classification import KIND, TokenClassification, weightless_batch
from tests.data.word_tokenizers import bert_like
from tests.tasks.tiny_words import TAGS, tagged_rows, tiny_bert_config, write_rows

SETTINGS = {"labels": None, "tag_scheme": "iob2", "stride": 4, "class_weights": "none"}


def opened(tmp_path, rows, *, max_seq_len=64, **settings):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    encoder = KIND.make_encoder(
        EncoderInputs(
            bert_like(), None, None, max_seq_len, "raise", {**SETTINGS, **settings},
            lambda: iter(rows),
        )
    )  # fmt: skip
    data = build_dataset(
        [DataSource(str(path))], encoder, max_seq_len=max_seq_len, cache_dir=tmp_path / "cache"
    )
    return encoder, data


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(TAGS)), "num_labels": len(TAGS)}
    return tf.BertForTokenClassification(tiny_bert_config(**labels)).eval()


def evaluated(task, model, encoder, data, size):
    predictions, sums = [], {}
    for start in range(0, len(data), size):
        rows = list(range(start, min(start + size, len(data))))
        found, told = task.evaluate_rows(model, task.prepare(encoder.collate(data, rows)))
        predictions += told
        sums = {name: sums.get(name, 0) + float(value) for name, value in found.items()}
    return sums, predictions


def test_the_loss_is_that_of_transformers(tmp_path, model):
    encoder, data = opened(tmp_path, tagged_rows(6))
    batch = encoder.collate(data, range(6))
    task = TokenClassification(tuple(TAGS))
    prepared = task.prepare(batch)
    expected = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss
    words = sum(len(row["tokens"]) for row in tagged_rows(6))
    assert task.loss_weight(prepared) == words
    torch.testing.assert_close(task.loss_sum(model, prepared) / words, expected)
    torch.testing.assert_close(task.evaluate(model, prepared)["loss"] / words, expected)


def test_class_weights_are_those_of_torch(tmp_path, model):
    encoder, data = opened(tmp_path, tagged_rows(6))
    inputs = TaskInputs(model, {**SETTINGS, "class_weights": "balanced"}, encoder, data)
    task = KIND.make_task(inputs)
    weights = task.class_weights
    tags = [tag for row in tagged_rows(6) for tag in row["tags"]]
    expected = [len(tags) / (4 * tags.count(tag)) if tag in tags else 1.0 for tag in TAGS]
    # As scikit-learn's "balanced" has it; a held-out word of a tag without words still counts.
    assert weights.tolist() == pytest.approx(expected)
    prepared = task.prepare(encoder.collate(data, range(6)))
    logits = model(prepared["input_ids"], prepared["attention_mask"]).logits.flatten(0, 1)
    twin = torch.nn.functional.cross_entropy(
        logits[prepared["loss_positions"]], prepared["loss_targets"], weights, reduction="sum"
    )
    torch.testing.assert_close(task.loss_sum(model, prepared), twin)


@pytest.mark.parametrize("max_seq_len", [64, 12])
def test_figures_do_not_depend_on_the_batch(tmp_path, model, max_seq_len):
    encoder, data = opened(tmp_path, tagged_rows(9), max_seq_len=max_seq_len)
    task = TokenClassification(tuple(TAGS))
    sums, predictions = evaluated(task, model, encoder, data, len(data))
    alone, one_by_one = evaluated(task, model, encoder, data, 1)
    assert sums == pytest.approx(alone, rel=1e-5)
    references = [data.reference(index) for index in range(len(data))]
    assert [row["tags"] for row in predictions] == [row["tags"] for row in one_by_one]
    scores = task.score(predictions, references)
    told = task.tell(predictions, references)
    assert [row["tokens"] for row in told] == [row["tokens"] for row in tagged_rows(9)]
    assert set(task.metrics) == {"loss", "accuracy", *scores.metrics}
    assert task.best_metric in scores.metrics
    parts = cut_rows(encoder.collate(data, range(len(data))), 2)
    assert sum(task.loss_weight(task.prepare(part)) for part in parts) == sum(
        len(reference["words"]) for reference in references
    )


def test_an_entity_across_windows_counts_whole(tmp_path):
    rows = [{"tokens": ["a"] * 9 + ["paris"] * 3 + ["b"] * 9,
             "tags": ["O"] * 9 + ["B-LOC", "I-LOC", "I-LOC"] + ["O"] * 9}]  # fmt: skip
    _, data = opened(tmp_path, rows, max_seq_len=12)
    references = [data.reference(index) for index in range(len(data))]
    assert len(references) > 2
    perfect = [{"tags": ref["tags"], "shares": [0.9] * len(ref["tags"])} for ref in references]
    task = TokenClassification(("O", "B-LOC", "I-LOC"))
    assert task.score(perfect, references).metrics["f1"] == 1.0
    (told,) = task.tell(perfect, references)
    assert told["entities"] == [
        {"type": "LOC", "text": "paris paris paris", "start": 9, "end": 12, "probability": 0.9}
    ]


def test_windows_of_equal_sentences_are_not_joined(tmp_path):
    rows = [tagged_rows(1)[0], tagged_rows(1)[0]]
    _, data = opened(tmp_path, rows)
    references = [data.reference(index) for index in range(2)]
    predictions = [{"tags": ref["tags"], "shares": [1.0] * len(ref["tags"])} for ref in references]
    assert len(TokenClassification(tuple(TAGS)).tell(predictions, references)) == 2


def test_labels_are_found_in_the_rows_or_listed(tmp_path):
    encoder, _ = opened(tmp_path, tagged_rows(3))
    assert encoder.labels == TAGS
    encoder, _ = opened(tmp_path, tagged_rows(3), labels=["PER", "LOC", "ORG"])
    assert encoder.labels == ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
    plain = [{"tokens": ["a"], "tags": ["O"]}]
    with pytest.raises(UserError, match="no training row marks an entity"):
        opened(tmp_path, plain)


def test_a_step_runs_without_weights():
    settings = {**SETTINGS, "labels": ["PER", "LOC"]}
    config = tiny_bert_config(**KIND.weightless_settings(settings))
    assert config.num_labels == 5
    with torch.device("meta"):
        model = tf.BertForTokenClassification(config)
    task = KIND.make_task(TaskInputs(model, settings))
    batch = weightless_batch(config, rows=2, tokens=16, padded=False, settings=settings)
    masked = weightless_batch(config, rows=2, tokens=16, padded=True, settings=settings)
    assert "attention_mask" in task.prepare(masked)
    assert "attention_mask" not in task.prepare(batch)
    prepared = to_device(task.prepare(batch), torch.device("meta"))
    assert task.loss_weight(prepared) == 32
    task.loss_sum(model, prepared).backward()
    assert model.classifier.weight.grad is not None


def test_the_catalogue_has_it():
    assert task_kind("token-classification") is KIND
    assert isinstance(TokenClassification(("O",)), ScoredTask)
