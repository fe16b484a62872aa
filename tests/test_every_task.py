"""Every task's whole run: gate, profile, train, kill, resume, evaluate, predict, export, reload.

Tiny random models of the real architectures and a few rows; the command that trains is a real
process and is really killed. What it ends with was scored again by a fresh process (or the resumed
run would have failed), and what is exported opens with plain transformers.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml

from qlora_trainer.config.read import read_run_file
from qlora_trainer.memory.gpus import read_gpu
from qlora_trainer.run.check import check
from qlora_trainer.run.evaluate import evaluate_run, predict_file
from qlora_trainer.run.export import export_run
from qlora_trainer.run.foresee import foresee_run
from qlora_trainer.run.train import train
from tests.data.pair_tokenizers import SENTENCES, t5_like
from tests.run.conftest import Lines
from tests.tasks.tiny_texts import (
    labelled_rows,
    tiny_decoder_folder,
    tiny_encoder_folder,
    write_rows,
)
from tests.tasks.tiny_words import question_rows, tagged_rows, tiny_bert_folder


@dataclass(frozen=True)
class Case:
    """One task on one tiny model.

    Attributes:
        task: As in the run file.
        model: Fills a folder with the base.
        data: Fills a folder with rows and returns what `data.train` names.
        auto_class: Opens the export.
        metric: One that must be among the figures.
        said: A key of every prediction.
    """

    task: str
    model: Callable[[Path], Path]
    data: Callable[[Path], Path]
    auto_class: Any
    metric: str
    said: str


def tiny_t5(folder: Path) -> Path:
    torch.manual_seed(3)
    config = tf.T5Config(
        vocab_size=90, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    tf.T5ForConditionalGeneration(config).save_pretrained(folder)
    t5_like().save_pretrained(folder)
    return folder


def tiny_vit(folder: Path) -> Path:
    torch.manual_seed(3)
    config = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        patch_size=8, image_size=32,
    )  # fmt: skip
    tf.ViTForImageClassification(config).save_pretrained(folder)
    tf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def prompts(folder: Path) -> Path:
    rows = [{"prompt": row["text"], "completion": f" {row['label']}"} for row in labelled_rows(32)]
    return write_rows(folder / "prompts.jsonl", rows)


def pairs(folder: Path) -> Path:
    rows = [
        {"source": f"{source} {number}", "target": target}
        for number in range(6)
        for source, target in zip(SENTENCES[:4], SENTENCES[1:4] + SENTENCES[:1], strict=True)
    ]
    return write_rows(folder / "pairs.jsonl", rows)


def pictures(folder: Path) -> Path:
    from tests.tasks.test_image_classification import NAMES, picture

    for number, name in enumerate(NAMES):
        (folder / "pictures" / name).mkdir(parents=True)
        for index in range(8):
            path = folder / "pictures" / name / f"{index}.png"
            picture(name, 10 * number + index).save(path)
    return folder / "pictures"


CASES = {
    "causal": Case(
        "causal-lm", tiny_decoder_folder, prompts, tf.AutoModelForCausalLM, "loss", "prediction",
    ),
    "text-encoder": Case(
        "sequence-classification", tiny_encoder_folder,
        lambda folder: write_rows(folder / "rows.jsonl", labelled_rows(32)),
        tf.AutoModelForSequenceClassification, "accuracy", "label",
    ),
    "text-decoder": Case(
        "sequence-classification", tiny_decoder_folder,
        lambda folder: write_rows(folder / "rows.jsonl", labelled_rows(32)),
        tf.AutoModelForSequenceClassification, "macro_f1", "label",
    ),
    "entities": Case(
        "token-classification", tiny_bert_folder,
        lambda folder: write_rows(folder / "rows.jsonl", tagged_rows(32)),
        tf.AutoModelForTokenClassification, "f1", "entities",
    ),
    "questions": Case(
        "question-answering", tiny_bert_folder,
        lambda folder: write_rows(folder / "rows.jsonl", question_rows(32)),
        tf.AutoModelForQuestionAnswering, "f1", "answer",
    ),
    "translation": Case(
        "seq2seq-lm", tiny_t5, pairs, tf.AutoModelForSeq2SeqLM, "loss", "prediction",
    ),
    "pictures": Case(
        "image-classification", tiny_vit, pictures, tf.AutoModelForImageClassification,
        "accuracy", "label",
    ),
}  # fmt: skip


def kill_after_a_state(run_file: Path, folder: Path) -> None:
    """Begin the run in a process of its own and kill it once a state stands."""
    with subprocess.Popen(
        [sys.executable, "-m", "qlora_trainer", "train", str(run_file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        end = time.monotonic() + 300
        while not list(folder.glob("states/*/trainer.json")) and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.02)
        if process.poll() is not None and not list(folder.glob("states/*")):
            assert process.stderr is not None
            pytest.fail(process.stderr.read())
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_is_killed_resumed_scored_exported_and_reloaded(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    (tmp_path / "data").mkdir()
    rows = case.data(tmp_path / "data")
    settings = {
        "task": case.task,
        "model": {"source": str(case.model(tmp_path / "base")), "device": "cpu"},
        "adapter": {"rank": 4, "layers": {"last": 1}},
        "data": {
            "train": str(rows), "eval_fraction": 0.25, "max_seq_len": 48,
            "cache_folder": str(tmp_path / "cache"),
        },
        "train": {"max_steps": 6, "micro_batch_size": 4, "gradient_accumulation_steps": 1,
                  "learning_rate": 0.01},
        "evaluation": {"every_steps": 3, "early_stopping_patience": 5},
        "output": {"folder": str(tmp_path / "run"), "save_every_steps": 1},
    }  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    run = read_run_file(file)
    report = check(run)
    assert report.train.rows > 10
    assert len(report.samples) == 3
    foreseen = foresee_run(run, read_gpu("rtx-3060-12gb"))
    assert foreseen.fits
    kill_after_a_state(file, tmp_path / "run")
    told = Lines()
    result = train(run, reporter=told)
    assert result.outcome.complete
    assert case.metric in result.metrics
    proven = any("by a fresh process: the same figures" in line for line in told.lines)
    assert proven == (case.task != "causal-lm")  # which predicts nothing and has no head
    again = evaluate_run(tmp_path / "run")
    found = again.evaluation.metrics
    assert {key: found[key] for key in found if key in result.metrics} == {
        key: value for key, value in result.metrics.items() if key in found
    }
    predict_file(tmp_path / "run", str(rows), tmp_path / "said.jsonl")
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert all(case.said in record for record in said)
    export_run(tmp_path / "run", tmp_path / "merged", dtype="fp32", onto="dequantized")
    case.auto_class.from_pretrained(tmp_path / "merged")
