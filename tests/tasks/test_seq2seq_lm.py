import json

import pytest
import torch
from transformers import BartConfig, T5Config, T5ForConditionalGeneration

from qlora_trainer.base.dtype import compute_dtype_for
from qlora_trainer.data.dataset import build_dataset
from qlora_trainer.data.read import DataSource
from qlora_trainer.errors import UserError
from qlora_trainer.lora.inject import adapter_parameters, inject_adapter
from qlora_trainer.lora.spec import AdapterSpec
from qlora_trainer.tasks.kind import EncoderInputs, TaskInputs
from qlora_trainer.tasks.linear_cross_entropy import CACHE_ELEMENTS
from qlora_trainer.tasks.seq2seq_lm import KIND, weightless_batch
from qlora_trainer.tasks.task import ScoredTask
from qlora_trainer.training.optimizer import AdapterAdamW
from qlora_trainer.training.step import train_step
from tests.data.pair_tokenizers import t5_like

CPU = torch.device("cpu")
SETTINGS = {"prefix": "", "max_target_len": 24, "num_beams": 1}
PAIRS = [
    ("The capital of France", "Die Hauptstadt von Frankreich"),
    ("Save and continue editing", "Sichern und weiter bearbeiten"),
    ("Paris", "Paris"),
    ("Save", "Sichern"),
]
CONFIG = {
    "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "dropout_rate": 0.0,
}  # fmt: skip


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(3)
    return T5ForConditionalGeneration(T5Config(**CONFIG))


def inputs(**changes) -> EncoderInputs:
    values = {
        "tokenizer": t5_like(), "processor": None, "config": T5Config(**CONFIG),
        "max_seq_len": 30, "over_length": "raise", "settings": SETTINGS,
        "training_rows": lambda: iter(()),
    }  # fmt: skip
    return EncoderInputs(**{**values, **changes})


def encoded(tmp_path, encoder):
    path = tmp_path / "pairs.jsonl"
    rows = [json.dumps({"source": source, "target": target}) for source, target in PAIRS]
    path.write_text("\n".join(rows))
    return build_dataset(
        [DataSource(str(path))], encoder, max_seq_len=30, cache_dir=tmp_path / "cache"
    )


def make_task(model, encoder=None, **changes):
    return KIND.make_task(TaskInputs(model, {**SETTINGS, **changes}, encoder))


def test_an_adapter_learns_to_translate_and_every_metric_shows_it(tmp_path):
    model, encoder = tiny_t5(), KIND.make_encoder(inputs())
    data = encoded(tmp_path, encoder)
    tied = ("shared", "lm_head", "encoder.embed_tokens", "decoder.embed_tokens")
    spec = AdapterSpec(rank=16, alpha=32, modules_to_save=tied)
    inject_adapter(model, spec, dtype=torch.float32, seed=1)
    task = make_task(model, encoder)
    assert isinstance(task, ScoredTask)
    assert task.loss.loss_path.chunked
    assert task.loss.slice_elements == CACHE_ELEMENTS
    elsewhere = KIND.make_task(TaskInputs(model, SETTINGS, encoder, on_cpu=False))
    assert elsewhere.loss.slice_elements is None
    batch = task.prepare(encoder.collate(data, [0, 1, 2, 3]))
    references = [encoder.reference(data, index) for index in range(4)]
    model.train()
    optimizer = AdapterAdamW(adapter_parameters(model), kind="adamw")

    def measured():
        sums, texts = task.evaluate_rows(model, batch)
        scores = task.score(texts, references)
        loss = float(sums["loss"]) / task.loss_weight(batch)
        return {"loss": loss, **scores.metrics}, scores.report

    before, _ = measured()
    assert model.training  # evaluation puts the mode back
    for step in range(60):
        train_step(
            model, [batch], task=task, optimizer=optimizer, learning_rate=1e-2, device=CPU,
            step=step,
        )  # fmt: skip
    after, report = measured()
    assert after["loss"] < 0.25 * before["loss"]
    for name in ("bleu", "chrf", "rouge1", "rougeL", "exact_match"):
        assert after[name] > before[name], name
    assert set(after) | {"token_accuracy"} == set(task.metrics)
    assert "search: greedy" in report
    assert "wanted:  Die Hauptstadt von Frankreich" in report


def test_beams_are_the_models_own_search(tmp_path):
    model, encoder = tiny_t5().eval(), KIND.make_encoder(inputs())
    data = encoded(tmp_path, encoder)
    task = make_task(model, encoder, num_beams=4, max_target_len=6)
    texts = task.predict(model, task.prepare(encoder.collate(data, [0, 1, 2, 3])))
    for index, text in enumerate(texts):
        own = model.generate(
            torch.tensor([data.input_ids(index).tolist()]), num_beams=4, max_new_tokens=6
        )
        assert text == encoder.tokenizer.decode(own[0], skip_special_tokens=True)
    assert "search: 4 beams" in task.score(texts, texts).report


def test_padding_beside_longer_rows_changes_no_text(tmp_path):
    model, encoder = tiny_t5().eval(), KIND.make_encoder(inputs())
    data = encoded(tmp_path, encoder)
    task = make_task(model, encoder)
    together = task.predict(model, task.prepare(encoder.collate(data, [0, 1, 2, 3])))
    alone = [
        task.predict(model, task.prepare(encoder.collate(data, [index])))[0] for index in range(4)
    ]
    assert together == alone


def test_predictions_need_no_targets(tmp_path):
    model, encoder = tiny_t5().eval(), KIND.make_encoder(inputs(labelled=False))
    data = encoded(tmp_path, encoder)
    task = make_task(model, encoder)
    texts = task.predict(model, task.prepare(encoder.collate(data, [2, 0])))
    assert task.tell(texts, [None, None]) == [{"prediction": text} for text in texts]


def test_the_loss_runs_without_weights():
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(**CONFIG))
    inject_adapter(model, AdapterSpec(rank=4, alpha=8), dtype=torch.float32)
    task = make_task(model)
    batch = task.prepare(
        weightless_batch(model.config, rows=3, tokens=12, padded=False, settings=SETTINGS)
    )
    assert task.loss_weight(batch) == 3 * 24
    moved = {name: tensor.to("meta") for name, tensor in batch.items()}
    task.loss_sum(model.train(), moved).backward()


def test_targets_longer_than_the_models_positions_are_refused():
    limited = BartConfig(max_position_embeddings=16)
    with pytest.raises(UserError, match=r"task_settings\.max_target_len = 24: the model knows 16"):
        KIND.make_encoder(inputs(config=limited))


@pytest.mark.parametrize("family", ["t5", "mt5", "umt5"])
def test_t5_is_refused_in_fp16(family):
    with pytest.raises(UserError, match="overflow in fp16"):
        compute_dtype_for("fp16", "cuda", family, (8, 0), cpu_bf16=True)
