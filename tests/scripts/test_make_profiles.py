"""What fits where: every run file is one that starts, and its prediction is what is foreseen."""

import json

import pytest
import torch
from make_profiles import CARDS, FITS, LENGTHS, MODELS, RUNS, differences, foresee_length
from transformers import AutoModelForCausalLM

from qlora_trainer.config.read import read_run_file
from qlora_trainer.memory.gpus import read_gpu
from qlora_trainer.run.foresee import read_model_config, run_for_model

# as the hub counts the tensors of each checkpoint
PUBLISHED_PARAMETERS = {
    "gemma-2-9b": 9_241_705_984,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "phi-4": 14_659_507_200,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-30b-a3b": 30_532_122_624,
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
}
RUN_FILES = sorted(RUNS.glob("*/*.yaml"))


def cells():
    """Every cell of the table: model, card, longest length or None."""
    rows = json.loads(FITS.read_text())["rows"]
    return [(model, card, rows[model]["cells"][card]) for model in rows for card in CARDS]


@pytest.mark.parametrize("model", sorted(path.stem for path in MODELS.glob("*.json")))
def test_a_model_profile_has_the_published_number_of_parameters(model):
    config = read_model_config(run_for_model(str(MODELS / f"{model}.json")))
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in built.parameters()) == PUBLISHED_PARAMETERS[model]


def test_every_cell_has_its_run_file_and_every_run_file_its_cell():
    fitting = {f"{card}/{model}" for model, card, length in cells() if length is not None}
    assert fitting == {f"{file.parent.name}/{file.stem}" for file in RUN_FILES}
    assert fitting == {f"{p.parent.name}/{p.stem}" for p in RUNS.glob("*/*.json")}
    assert {model for model, _, _ in cells()} == {path.stem for path in MODELS.glob("*.json")}


def test_every_run_file_can_start_and_says_what_its_cell_and_its_prediction_say():
    lengths = {f"{card}/{model}": length for model, card, length in cells()}
    for file in RUN_FILES:
        run = read_run_file(file)
        written = json.loads(file.with_suffix(".json").read_text())
        model = json.loads((MODELS / f"{file.stem}.json").read_text())
        assert run.data.max_seq_len == lengths[f"{file.parent.name}/{file.stem}"]
        assert run.data.max_seq_len == written["max_seq_len"] <= model["max_position_embeddings"]
        assert run.model.source == written["model"] == model["_name_or_path"]
        predicted = written["predicted"]
        assert predicted["verdict"] == "fits"
        assert predicted["total_bytes"] <= 0.95 * read_gpu(file.parent.name).usable_bytes


def test_a_larger_card_never_takes_less():
    found = {(model, card): length or 0 for model, card, length in cells()}
    for model in PUBLISHED_PARAMETERS:
        row = [found[model, card] for card in CARDS]
        assert row == sorted(row), model


@pytest.mark.parametrize("name", ["rtx-2060-6gb/tinyllama-1.1b", "rtx-4060-8gb/llama-3.2-1b"])
def test_a_prediction_is_what_is_foreseen_now(name):
    assert differences(RUNS / f"{name}.yaml") == []


def test_the_next_longer_length_does_not_fit():
    [length] = [n for model, card, n in cells() if (model, card) == ("llama-3.2-1b", CARDS[0])]
    longer = LENGTHS[LENGTHS.index(length) + 1]
    assert foresee_length("llama-3.2-1b", read_gpu(CARDS[0]), longer).verdict != "fits"


def test_a_changed_prediction_is_found(tmp_path):
    card = tmp_path / "rtx-2060-6gb"
    card.mkdir()
    for suffix in ("yaml", "json"):
        text = (RUNS / card.name / f"tinyllama-1.1b.{suffix}").read_text()
        changed = text.replace('"total_bytes": ', '"total_bytes": 1')
        (card / f"tinyllama-1.1b.{suffix}").write_text(changed)
    [line] = differences(card / "tinyllama-1.1b.yaml")
    assert line.startswith("rtx-2060-6gb/tinyllama-1.1b.yaml: total_bytes = 1")
