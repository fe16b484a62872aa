"""Where the answers of an export end."""

import json
from dataclasses import replace

import pytest
from transformers import GenerationConfig

from qlora_trainer.export.companions import add_stop_ids
from qlora_trainer.export.export import export_merged


def test_answers_end_where_training_taught_them_to(bench, tmp_path):
    source = bench.source()
    before = json.loads((source.base_folder / "generation_config.json").read_text())
    made = export_merged(
        replace(source, stop_ids=(7,)), tmp_path / "out", dtype="fp32", onto="original", proof=None
    )
    found = json.loads((made.folder / "generation_config.json").read_text())
    known = before.pop("eos_token_id", None)
    assert found.pop("eos_token_id") == [*([] if known is None else [known]), 7]
    assert found == before
    assert 7 in GenerationConfig.from_pretrained(made.folder).eos_token_id


@pytest.mark.parametrize(
    ("config", "known", "stops", "expected"),
    [
        ({"eos_token_id": 2, "bos_token_id": 1}, None, [5],
         {"bos_token_id": 1, "eos_token_id": [2, 5]}),
        ({"text_config": {"eos_token_id": 2}}, None, [5], {"eos_token_id": [2, 5]}),
        ({}, None, [5], {"eos_token_id": [5]}),
        ({"eos_token_id": 2}, {"eos_token_id": [3, 5], "top_p": 0.9}, [5, 6],
         {"eos_token_id": [3, 5, 6], "top_p": 0.9}),
    ],
)  # fmt: skip
def test_stop_ids_join_those_that_were_known(tmp_path, config, known, stops, expected):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    if known is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(known))
    add_stop_ids(tmp_path, stops)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == expected


@pytest.mark.parametrize("stops", [[], [2]])
def test_nothing_new_changes_no_file(tmp_path, stops):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    add_stop_ids(tmp_path, stops)
    assert not (tmp_path / "generation_config.json").exists()
