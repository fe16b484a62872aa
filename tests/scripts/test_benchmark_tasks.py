"""The cases of the task benchmark: each a run that can start, or skipped with its reason."""

import json
from pathlib import Path

import pytest
import task_cases
from benchmark_tasks import check_that_both_began_alike, means
from task_cases import CASES, make_inputs, settings_of

from qlora_trainer.config.read import check_values


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_run_that_can_start(name, tmp_path):
    run = check_values(settings_of(CASES[name], tmp_path, 5), name=name)
    assert (run.task, run.train.max_steps) == (CASES[name].task, 5)


def test_every_task_but_the_causal_one_has_a_case():
    assert {case.task for case in CASES.values()} == {
        "sequence-classification", "token-classification", "question-answering", "seq2seq-lm",
        "image-classification",
    }  # fmt: skip


def test_a_case_that_is_not_there_says_what_is_missing_and_what_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(task_cases, "CACHE", tmp_path)
    assert CASES["pictures"].missing() == (
        ".cache/data/fashion and .cache/models/dinov2-small cannot be found here; made by "
        "assets_images.py"
    )
    (tmp_path / "data" / "fashion").mkdir(parents=True)
    assert "dinov2" in CASES["pictures"].missing()
    assert CASES["pictures-resnet"].missing() is None, "a random model needs no files"


def test_random_bases_are_made_and_said_to_be_random(tmp_path):
    make_inputs(CASES["pictures-resnet"], tmp_path)
    make_inputs(CASES["pictures"], tmp_path / "none")
    assert CASES["pictures-resnet"].weights == "random"
    assert (tmp_path / "base" / "model.safetensors").is_file()
    assert not Path(tmp_path / "none").exists()


def test_inputs_are_copies_without_dropout_and_with_excerpts(tmp_path, monkeypatch):
    monkeypatch.setattr(task_cases, "CACHE", tmp_path / "cache")
    model, data = (tmp_path / "cache" / name for name in ("models/minilm", "data/disfl-qa"))
    for folder in (model, data):
        folder.mkdir(parents=True)
    (model / "config.json").write_text('{"hidden_dropout_prob": 0.1, "hidden_size": 8}')
    context = "One is here . Two goes . Rome is three . Four . Five ."
    answers = [{"text": ["Rome"], "answer_start": [context.index("Rome")]}, {"text": []}]
    rows = [json.dumps({"context": context, "answers": answer}) for answer in answers]
    for name in ("train.jsonl", "eval.jsonl"):
        (data / name).write_text("\n".join(rows))
    make_inputs(CASES["questions"], tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config == {"hidden_dropout_prob": 0.0, "hidden_size": 8}
    assert "0.1" in (model / "config.json").read_text(), "the cache stays as it is"
    (kept,) = map(json.loads, (tmp_path / "data" / "eval.jsonl").read_text().splitlines())
    assert kept["context"] == "Two goes . Rome is three . Four . "
    assert kept["context"][kept["answers"]["answer_start"][0] :].startswith("Rome")


def test_sides_that_began_otherwise_are_not_compared():
    run = {"ours": {"metrics": {"loss_before": 6.987}}, "peft": {"metrics": {"loss_before": 6.926}}}
    with pytest.raises(ValueError, match=r"ours 6\.987, PEFT 6\.926"):
        check_that_both_began_alike(run)
    run["peft"]["metrics"]["loss_before"] = 6.9871
    check_that_both_began_alike(run)


def test_figures_are_means_over_seeds():
    runs = [
        {"ours": {"metrics": {"f1_before": 0.1, "f1": ours}}, "peft": {"metrics": {"f1": 0.5}}}
        for ours in (0.4, 0.6)
    ]
    assert means(runs, "f1") == {"before": 0.1, "ours": 0.5, "peft": 0.5}
