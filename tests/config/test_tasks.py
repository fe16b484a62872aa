"""Settings of single tasks: told once, refused where the task does not know them."""

from typing import Any, get_args

import pytest

from qlora_trainer.config.read import check_values
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
    ],
)
def test_a_setting_of_another_task_is_refused(task: str, given: Any, said: str) -> None:
    values = {**BASE, "task": task}
    for section, settings in given.items():
        values[section] = {**BASE.get(section, {}), **settings}
    with pytest.raises(UserError, match=said):
        check_values(values, name="run.yaml")


def test_a_run_file_without_a_task_is_as_before() -> None:
    run = check_values(dict(BASE), name="run.yaml")
    assert (run.task, run.evaluation.metric) == ("causal-lm", "auto")
