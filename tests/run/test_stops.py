"""Where an answer ends."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qlora_trainer.run.stops import learned_stop_ids


@pytest.mark.parametrize(
    ("end_of_turn", "stops"),
    [("<|im_end|>", ["<|im_end|>"]), ("<|endoftext|>", ["<|endoftext|>"]), (".", []), ("", [])],
)
def test_an_answer_ends_where_the_runs_answers_did(
    smollm2: Path, tmp_path: Path, end_of_turn: str, stops: list[str]
) -> None:
    """Whatever the tokenizer's EOS is: a base taught to chat keeps `<|endoftext|>`."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    (tmp_path / "data.json").write_text(json.dumps({"end_of_turn": end_of_turn}))
    assert tokenizer.convert_ids_to_tokens(learned_stop_ids(tmp_path, tokenizer)) == stops


def test_a_folder_that_tells_nothing_of_its_answers_adds_no_end(
    smollm2: Path, tmp_path: Path
) -> None:
    assert learned_stop_ids(tmp_path, AutoTokenizer.from_pretrained(smollm2)) == []
