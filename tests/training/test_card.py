"""The model card tells each task's own way to load the adapter."""

import re

import pytest
import yaml

from qlora_trainer.tasks.catalogue import TASKS
from qlora_trainer.training.card import model_card


@pytest.mark.parametrize("task", TASKS)
def test_the_card_names_classes_that_exist_and_the_hubs_name_of_the_task(task: str) -> None:
    card = model_card(
        base_source="someone/model",
        revision="abc",
        settings={"task": task, "adapter": {"rank": 8}},
        metrics={"loss": 0.5},
        rows={"training": 3},
        versions={"torch": "2"},
    )
    header = yaml.safe_load(card.split("---")[1])
    assert header["pipeline_tag"].split("-")[-1] == TASKS[task].name.split("-")[-1].replace(
        "lm", "generation"
    )
    code = re.findall(r"```python\n(.*?)```", card, flags=re.S)[0]
    names: dict[str, object] = {}
    exec("\n".join(line for line in code.splitlines() if line.startswith("from ")), names)
    assert TASKS[task].auto_class.__name__ in names
    assert "someone/model" in code
