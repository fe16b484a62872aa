"""The cases of the task benchmark: each a run that can start, or skipped with its reason."""

from pathlib import Path

import benchmark_tasks
import pytest
from benchmark_tasks import CASES, make_model, settings_of

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
    monkeypatch.setattr(benchmark_tasks, "CACHE", tmp_path)
    assert CASES["pictures"].missing() == (
        ".cache/data/fashion and .cache/models/dinov2-small cannot be found here; made by "
        "assets_images.py"
    )
    (tmp_path / "data" / "fashion").mkdir(parents=True)
    assert "dinov2" in CASES["pictures"].missing()
    assert CASES["pictures-resnet"].missing() is None, "a random model needs no files"


def test_random_bases_are_made_and_said_to_be_random(tmp_path):
    make_model(CASES["pictures-resnet"], tmp_path)
    make_model(CASES["pictures"], tmp_path / "none")
    assert CASES["pictures-resnet"].weights == "random"
    assert (tmp_path / "base" / "model.safetensors").is_file()
    assert not Path(tmp_path / "none").exists()
