import numpy as np
import pytest
from transformers import BertConfig

from qlora_trainer.tasks.labels import balanced_weights, head_labels, known_names


def test_balanced_labels_count_alike_and_rows_one_on_average() -> None:
    counts = np.array([6, 2, 0, 4])
    weights = balanced_weights(counts).numpy()
    assert weights * counts == pytest.approx([4, 4, 0, 4])
    assert weights[2] == 1  # a held-out row of it still counts
    assert balanced_weights(np.zeros(2, np.int64)).tolist() == [1, 1]


def test_a_model_that_knows_the_labels_keeps_its_order() -> None:
    config = BertConfig(id2label={2: "a", 0: "c", 1: "b"})
    assert head_labels(config) == ("c", "b", "a")
    assert known_names(config, ["a", "b"]) == ["c", "b", "a"]
    assert known_names(config, ["a", "d"]) == ["a", "d"]
