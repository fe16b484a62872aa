import pytest
import torch
import transformers as tf

from qlora_trainer.data.dataset import build_dataset
from qlora_trainer.data.read import DataSource
from qlora_trainer.tasks.catalogue import task_kind
from qlora_trainer.tasks.kind import EncoderInputs, TaskInputs
from qlora_trainer.tasks.question_answering import KIND, QuestionAnswering, weightless_batch
from qlora_trainer.tasks.task import ScoredTask, cut_rows, to_device
from tests.data.word_tokenizers import bert_like
from tests.tasks.tiny_words import question_rows, tiny_bert_config, write_rows

SETTINGS = {"stride": 4, "max_answer_len": 30, "null_threshold": 0.0}


def opened(tmp_path, rows, *, max_seq_len=64, config=None, labelled=True, **settings):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    encoder = KIND.make_encoder(
        EncoderInputs(
            bert_like(), None, config or tiny_bert_config(), max_seq_len, "raise",
            {**SETTINGS, **settings}, lambda: iter(rows), labelled,
        )
    )  # fmt: skip
    data = build_dataset(
        [DataSource(str(path))], encoder, max_seq_len=max_seq_len, cache_dir=tmp_path / "cache"
    )
    return encoder, data


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tf.BertForQuestionAnswering(tiny_bert_config()).eval()


def test_the_loss_is_that_of_transformers(tmp_path, model):
    """Rows of one length: transformers lets padding take part in its softmax, we do not."""
    encoder, data = opened(tmp_path, [question_rows(1)[0], question_rows(9)[8]])
    assert len(set(data.lengths)) == 2
    task = QuestionAnswering()
    for index in range(2):
        batch = encoder.collate(data, [index])
        start, end = batch["answer"].T
        expected = model(batch["input_ids"], token_type_ids=batch["token_type_ids"],
                         start_positions=start, end_positions=end).loss  # fmt: skip
        prepared = task.prepare({**batch, "row": torch.tensor([index])})
        assert task.loss_weight(prepared) == 1
        assert not {"row", "attention_mask"} & prepared.keys()
        torch.testing.assert_close(task.loss_sum(model, prepared), expected)


@pytest.mark.parametrize("max_seq_len", [64, 16])
def test_figures_do_not_depend_on_the_batch(tmp_path, model, max_seq_len):
    rows = question_rows(12)
    encoder, data = opened(tmp_path, rows, max_seq_len=max_seq_len)
    task = QuestionAnswering()
    sums, predictions = task.evaluate_rows(
        model, task.prepare(encoder.collate(data, range(len(data))))
    )
    alone, one_by_one = 0.0, []
    for index in range(len(data)):
        found, told = task.evaluate_rows(model, task.prepare(encoder.collate(data, [index])))
        alone += float(found["loss"])
        one_by_one += told
    assert float(sums["loss"]) == pytest.approx(alone, rel=1e-5)
    references = [data.reference(index) for index in range(len(data))]
    told = task.tell(predictions, references)
    assert [answer["id"] for answer in told] == [row["id"] for row in rows]
    again = task.tell(one_by_one, references)
    assert [answer["answer"] for answer in told] == [answer["answer"] for answer in again]
    for answer, row in zip(told, rows, strict=True):
        if answer["answer"]:
            assert row["context"][answer["start"] : answer["end"]] == answer["answer"]
    assert set(task.score(predictions, references).metrics) == set(task.metrics) - {"loss"}
    parts = [task.prepare(part) for part in cut_rows(encoder.collate(data, range(len(data))), 3)]
    assert sum(task.loss_weight(part) for part in parts) == len(data)


class Fixed(torch.nn.Module):
    """Says given scores."""

    def __init__(self, start, end):
        super().__init__()
        self.start, self.end = start, end

    def forward(self, **inputs):
        return tf.modeling_outputs.QuestionAnsweringModelOutput(
            start_logits=self.start, end_logits=self.end
        )


def test_spans_are_the_best_ones_by_exhaustive_search(tmp_path):
    encoder, data = opened(tmp_path, question_rows(6), labelled=False)
    batch = encoder.collate(data, range(6))
    generator = torch.Generator().manual_seed(0)
    shape = batch["input_ids"].shape
    start, end = (torch.randn(shape, generator=generator) for _ in range(2))
    task = QuestionAnswering(max_answer_tokens=3)
    told = task.predict(Fixed(start, end), task.prepare(batch))
    for row in range(6):
        offsets = batch["offsets"][row].tolist()
        inside = [n for n, (a, _) in enumerate(offsets) if a >= 0]
        every = sorted(
            (float(start[row, a] + end[row, b]), offsets[a][0], offsets[b][1])
            for a in inside for b in inside if a <= b < a + 3
        )[::-1]  # fmt: skip
        assert [span[:2] for span in told[row]["spans"]] == [list(s[1:]) for s in every[:5]]
        assert told[row]["spans"][0][2] == pytest.approx(every[0][0], rel=1e-5)
        assert told[row]["null"] == pytest.approx(float(start[row, 0] + end[row, 0]), rel=1e-5)


def windows(*pairs):
    """Predictions of one question's windows: no answer's score, and one span's."""
    context = "zoe lives in paris"
    reference = {"record": "r", "id": None, "question": "?", "context": context,
                 "answers": ["paris"], "starts": [13]}  # fmt: skip
    predictions = [{"null": null, "spans": [[13, 18, score]]} for null, score in pairs]
    return predictions, [{**reference, "window": number} for number in range(len(pairs))]


@pytest.mark.parametrize(
    ("pairs", "threshold", "answer"),
    [
        ([(1.0, 2.0)], 0.0, "paris"),
        ([(3.0, 2.0)], 0.0, ""),
        ([(3.0, 2.0)], 1.5, "paris"),
        ([(9.0, -4.0), (1.0, 2.0)], 0.0, "paris"),  # one window that holds it is enough
        ([(9.0, -4.0), (8.0, 2.0)], 0.0, ""),
    ],
)
def test_no_answer_must_score_more_in_every_window(pairs, threshold, answer):
    (told,) = QuestionAnswering(30, threshold).tell(*windows(*pairs))
    assert told["answer"] == answer
    assert told["start"] == (13 if answer else None)
    assert 0 < told["probability"] < 1


def test_a_window_without_a_span_is_no_answer():
    _, references = windows((1.0, 2.0))
    (told,) = QuestionAnswering().tell([{"null": 1.0, "spans": []}], references)
    assert told["answer"] == ""
    assert told["no_answer_probability"] == 1.0


def test_equal_questions_are_not_joined():
    predictions, references = windows((1.0, 2.0))
    assert len(QuestionAnswering().tell(predictions * 2, references * 2)) == 2


def test_the_report_says_what_was_asked_and_said():
    scores = QuestionAnswering().score(*windows((1.0, 2.0)))
    assert scores.metrics["exact_match"] == 100
    assert "right:   paris\nsaid:    paris" in scores.report


def test_a_step_runs_without_weights():
    config = tiny_bert_config()
    with torch.device("meta"):
        model = tf.BertForQuestionAnswering(config)
    task = KIND.make_task(TaskInputs(model, SETTINGS))
    batch = weightless_batch(config, rows=2, tokens=16, padded=False, settings=SETTINGS)
    masked = weightless_batch(config, rows=2, tokens=16, padded=True, settings=SETTINGS)
    assert "attention_mask" in task.prepare(masked)
    assert "attention_mask" not in task.prepare(batch)
    prepared = to_device(task.prepare(batch), torch.device("meta"))
    assert task.loss_weight(prepared) == 2
    task.loss_sum(model, prepared).backward()
    assert model.qa_outputs.weight.grad is not None


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "electra"])
def test_other_encoders_are_given_what_they_take(tmp_path, kind):
    """DistilBERT knows no token types, RoBERTa but one."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    configs = {
        "distilbert": tf.DistilBertConfig(vocab_size=200, dim=32, hidden_dim=48, n_layers=1,
                                          n_heads=2),
        "roberta": tf.RobertaConfig(vocab_size=200, type_vocab_size=1, **small),
        "electra": tf.ElectraConfig(vocab_size=200, embedding_size=16, **small),
    }  # fmt: skip
    model = KIND.auto_class.from_config(configs[kind]).eval()
    encoder, data = opened(tmp_path, question_rows(4), config=configs[kind])
    batch = encoder.collate(data, range(4))
    assert ("token_type_ids" in batch) == (kind == "electra")
    task = KIND.make_task(TaskInputs(model, SETTINGS, encoder, data))
    assert torch.isfinite(task.loss_sum(model, task.prepare(batch)))


def test_the_catalogue_has_it():
    assert task_kind("question-answering") is KIND
    assert isinstance(QuestionAnswering(), ScoredTask)
