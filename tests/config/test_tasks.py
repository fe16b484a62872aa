"""Settings of single tasks: told once, refused where the task does not know them."""

from pathlib import Path
from typing import Any, get_args

import pytest

from qlora_trainer.config.read import check_values, read_run_file
from qlora_trainer.config.tasks import TaskName, TaskSettings, tasks_of
from qlora_trainer.errors import UserError
from qlora_trainer.tasks.catalogue import TASKS

BASE = {"model": {"source": "m"}, "data": {"train": "rows.jsonl"}}


def test_the_run_file_and_the_catalogue_name_the_same_tasks() -> None:
    assert set(TASKS) == set(get_args(TaskName))


def test_every_setting_says_who_knows_it() -> None:
    for name in TaskSettings.model_fields:
        assert set(tasks_of(name)) <= set(get_args(TaskName))
        assert tasks_of(name)


@pytest.mark.parametrize(
    ("task", "given", "said"),
    [
        ("causal-lm", {"task_settings": {"labels": ["a"]}}, "task_settings.labels.*causal-lm"),
        ("seq2seq-lm", {"task_settings": {"stride": 7}}, "token-classification, question-answ"),
        ("question-answering", {"data": {"packing": True}}, "data.packing = True.*only causal-lm"),
        ("token-classification", {"data": {"loss_on": "last"}}, "data.loss_on = 'last'"),
        (
            "seq2seq-lm",
            {"data": {"train": {"path": "rows.jsonl", "format": "alpaca"}}},
            r"data.train.0.format = 'alpaca'.*'seq2seq-lm'.*data.train.0.columns",
        ),
        (
            "sequence-classification",
            {"data": {"eval": ["a.jsonl", {"path": "b.jsonl", "format": "text"}]}},
            r"data.eval.1.format = 'text'",
        ),
    ],
)
def test_a_setting_of_another_task_is_refused(task: str, given: Any, said: str) -> None:
    values = {**BASE, "task": task}
    for section, settings in given.items():
        values[section] = {**BASE.get(section, {}), **settings}
    with pytest.raises(UserError, match=said):
        check_values(values, name="run.yaml")


def test_a_format_is_refused_where_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "task: seq2seq-lm\nmodel: {source: m}\ndata:\n  train:\n  - a.jsonl\n"
        "  - path: b.jsonl\n    format: messages\n"
    )
    with pytest.raises(UserError, match=r"run.yaml:7: data.train.1.format = 'messages'"):
        read_run_file(file)
    file.write_text(file.read_text().replace("format: messages", "format: auto"))
    assert [source.format for source in read_run_file(file).data.train] == ["auto", "auto"]


def test_a_run_file_without_a_task_is_as_before() -> None:
    run = check_values(dict(BASE), name="run.yaml")
    assert (run.task, run.evaluation.metric) == ("causal-lm", "auto")
