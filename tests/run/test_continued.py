"""Going on from a finished adapter: its values, its labels, what it forgets, what is refused."""

import gc
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_trainer.config.read import check_values
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.lora.layer import LowRankLayer
from qlora_trainer.run.continued import open_earlier
from qlora_trainer.run.evaluate import predict_file
from qlora_trainer.run.report import Reporter
from qlora_trainer.run.rescore import changed_rows, prove_saved, require_same_metrics
from qlora_trainer.run.train import train
from qlora_trainer.training.environment import always_alike
from qlora_trainer.training.processes import ALONE
from tests.tasks.tiny_texts import labelled_rows, tiny_encoder_folder, write_rows

Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    place = tmp_path_factory.mktemp("continued")
    model = tiny_encoder_folder(place / "model")

    def make(name: str, rows: list[dict[str, Any]], **adapter: Any) -> RunConfig:
        values: dict[str, Any] = {
            "task": "sequence-classification",
            "model": {"source": str(model), "device": "cpu"},
            "adapter": {"rank": 4, **adapter},
            "data": {
                "train": str(write_rows(place / f"{name}.jsonl", rows)), "eval_fraction": 0.25,
                "max_seq_len": 32, "cache_folder": str(place / "cache"),
            },
            "train": {"max_steps": 2, "micro_batch_size": 8, "gradient_accumulation_steps": 1},
            "output": {"folder": str(place / name)},
        }  # fmt: skip
        return check_values(values, name="test")

    return make


@pytest.fixture(scope="module")
def first(make: Make) -> Path:
    return train(make("first", labelled_rows(40))).folder


def test_new_data_starts_where_the_old_ended_and_forgetting_is_a_figure(
    make: Make, first: Path
) -> None:
    rows = [row for row in labelled_rows(40, seed=5) if row["label"] != "bad"]
    result = train(make("second", rows, init_from=str(first)))
    earlier = json.loads((result.folder / "earlier.json").read_text())
    ended = json.loads((first / "result.json").read_text())["metrics"]
    assert {name: earlier["before"][name] for name in ("loss", "accuracy")} == {
        name: ended[name] for name in ("loss", "accuracy")
    }
    assert earlier["after"]["loss"] != earlier["before"]["loss"]
    labels = json.loads((result.folder / "adapter" / "config.json").read_text())["id2label"]
    assert sorted(labels.values()) == ["bad", "good", "middling"]


def test_another_shape_is_refused_by_name(make: Make, first: Path) -> None:
    with pytest.raises(UserError, match="rank = 8: the adapter has 4"):
        train(make("other", labelled_rows(40), init_from=str(first), **{"rank": 8}))


@pytest.mark.parametrize(
    ("adapter", "named"),
    [
        (
            {"alpha_pattern": {"query": 64}},
            r"alpha_pattern = .*(?s:.*)query: rank 4, scaled by 16; ",
        ),
        ({"rslora": True}, r"rslora = True: the adapter has False"),
    ],
)
def test_another_scaling_of_some_modules_is_refused_by_name(
    make: Make, first: Path, adapter: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        train(make("scaled", labelled_rows(40), init_from=str(first), **adapter))


def test_earlier_rows_are_scored_on_the_device_of_this_run(
    make: Make, first: Path, tmp_path: Path
) -> None:
    earlier = tmp_path / "earlier"
    shutil.copytree(first, earlier)
    text = (earlier / "run.yaml").read_text()
    (earlier / "run.yaml").write_text(text.replace("device: cpu", "device: cuda:99"))
    run = make("here", labelled_rows(40), init_from=str(earlier))
    found = open_earlier(run, Reporter(), ALONE)
    assert found is not None
    assert found.source.device == torch.device("cpu")


def test_prompts_are_refused_by_a_task_that_has_none(first: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--examples: .*sequence-classification, which has no pr"):
        predict_file(first, "rows.jsonl", tmp_path / "out.jsonl", examples="rows.jsonl")


def test_what_is_no_adapter_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a finished run nor an adapter"):
        train(make("none", labelled_rows(40), init_from=str(tmp_path)))


@pytest.mark.parametrize("inside", ["", "adapter", "../first/adapter"])
def test_a_restart_never_discards_the_adapter_it_goes_on_from(
    make: Make, first: Path, inside: str
) -> None:
    run = make("first", labelled_rows(40), init_from=str(first / inside))
    with pytest.raises(UserError, match=r"adapter\.init_from = .* lies in output\.folder"):
        train(run, restart=True)
    assert (first / "adapter" / "adapter_model.safetensors").is_file()
    assert (first / "result.json").is_file()


def test_a_restart_that_cannot_read_the_earlier_rows_discards_nothing(
    make: Make, first: Path, tmp_path: Path
) -> None:
    earlier, kept = tmp_path / "earlier", tmp_path / "kept"
    shutil.copytree(first, earlier)
    shutil.copytree(first, kept)
    text = (earlier / "run.yaml").read_text()
    (earlier / "run.yaml").write_text(text.replace("first.jsonl", "gone.jsonl"))
    run = make("again", labelled_rows(40), init_from=str(earlier))
    run = run.model_copy(update={"output": run.output.model_copy(update={"folder": str(kept)})})
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        train(run, restart=True)
    assert (kept / "result.json").is_file()


def test_a_head_that_scores_otherwise_once_saved_is_refused() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    few, many = {"f1": 0.5, "rows": 100.0}, {"f1": 0.5, "rows": 1e6}
    assert require_same_metrics(few, few, cpu) == 0.0
    assert require_same_metrics(few, {**few, "f1": 0.53}, cuda) == pytest.approx(0.03)
    for trained, saved, device in (
        (few, {**few, "f1": 0.5 + 1e-9}, cpu),
        (few, {}, cpu),
        (few, {**few, "f1": 0.54}, cuda),
        (many, {**many, "f1": 0.5003}, cuda),
        (few, {**few, "rows": 99.0}, cuda),
    ):
        with pytest.raises(UserError, match="not the model that was trained"):
            require_same_metrics(trained, saved, device)
    with pytest.raises(UserError, match=r"another prediction: rows.jsonl:3: 'good' -> 'bad'"):
        require_same_metrics(few, {**few, "f1": 0.6}, cuda, ["rows.jsonl:3: 'good' -> 'bad'"])


class _CountsModels(Reporter):
    """How many adapted layers this process holds when the proof is told."""

    said = ""
    layers = -1

    def say(self, line: str) -> None:
        if "fresh process" in line:
            self.said = line
            self.layers = _adapted_layers_held()


def _adapted_layers_held() -> int:
    return sum(issubclass(type(one), LowRankLayer) for one in gc.get_objects())


def test_the_trained_model_is_let_go_of_before_a_fresh_process_loads_another(make: Make) -> None:
    gc.collect()
    of_other_tests, told = _adapted_layers_held(), _CountsModels()
    result = train(make("let-go", labelled_rows(40)), reporter=told)
    assert told.layers == of_other_tests
    assert json.loads((result.folder / "result.json").read_text())["proof"] == told.said


def test_what_cannot_be_scored_again_is_said_and_no_fault(first: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(first, folder)
    (folder / "environment.json").unlink()
    said = prove_saved(folder, {"f1": 0.5}, torch.device("cpu"))
    assert re.search(r"not proven: .*could not be scored(?s:.*)environment\.json", said)


def test_figures_in_percent_and_losses_have_their_own_tolerance() -> None:
    cuda = torch.device("cuda")
    trained = {"bleu": 30.0, "exact_match": 40.0, "loss": 2.0, "rows": 100.0}
    one_row_flipped = {**trained, "bleu": 30.8, "exact_match": 41.0, "loss": 2.001}
    assert require_same_metrics(trained, one_row_flipped, cuda) == pytest.approx(1.0)
    for name, value in (("bleu", 34.0), ("exact_match", 44.0), ("loss", 2.2)):
        with pytest.raises(UserError, match=name):
            require_same_metrics(trained, {**trained, name: value}, cuda)


def test_a_run_that_went_on_otherwise_is_compared_with_a_tolerance() -> None:
    begun = {"device": "cpu", "threads": 1, "evaluation": {"micro_batch_size": 8}}
    assert always_alike(begun)
    assert always_alike({**begun, "resumed": [begun]})
    for other in ({"threads": 2}, {"device": "T4"}, {"evaluation": {"micro_batch_size": 4}}):
        assert not always_alike({**begun, "resumed": [begun, {**begun, **other}]})
    cpu = torch.device("cpu")
    trained = {"f1": 0.5, "rows": 100.0}
    assert require_same_metrics(trained, {**trained, "f1": 0.51}, cpu, alike=False) > 0


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ({"label": "a", "score": 0.5}, {"label": "a", "score": 0.501}, None),
        ({"label": "a", "score": 0.5}, {"label": "b", "score": 0.5}, "r:1: 'a' -> 'b'"),
        ({"label": "a", "top": [["a", 0.6]]}, {"label": "a", "top": [["b", 0.6]]}, None),
        ({"labels": ["a"]}, {"labels": []}, "r:1: ['a'] -> []"),
        ({"value": 1.0}, {"value": 1.001}, None),
        ({"value": 1.0}, {"value": 1.1}, "r:1: 1 -> 1.1"),
        ({"tags": ["O", "B-X"], "entities": []}, {"tags": ["O", "O"]},
         "r:1: ['O', 'B-X'] -> ['O', 'O']"),
        ({"answer": "Rome", "probability": 0.5}, {"answer": "", "probability": 0.5},
         "r:1: 'Rome' -> ''"),
        ({"prediction": "Haus"}, {"prediction": "Maus"}, "r:1: 'Haus' -> 'Maus'"),
        ({"prediction": "a" * 99}, {"prediction": "b"}, f"r:1: '{'a' * 56}... -> 'b'"),
    ],
)  # fmt: skip
def test_rows_with_another_prediction_are_named(
    before: dict[str, Any], after: dict[str, Any], line: str | None
) -> None:
    same = {"label": "x"}
    changed = changed_rows([same, before, same], [same, after, same], ["r:0", "r:1", "r:2"])
    assert changed == ([] if line is None else [line])


def test_what_is_not_the_same_is_named_by_the_fresh_process(first: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(first, folder)
    kept = folder / "best-predictions.json"
    predictions = json.loads(kept.read_text())
    metrics = json.loads((first / "result.json").read_text())["best_evaluation"]
    assert len(predictions) == metrics["rows"]
    least = min(range(3), key=predictions[1].__getitem__)
    predictions[1] = [float(label == least) for label in range(3)]
    kept.write_text(json.dumps(predictions))
    said = prove_saved(folder, metrics, torch.device("cpu"))
    assert re.search(r"another prediction for 1 row: \S*first.jsonl\S*: '\w+' -> '\w+'$", said)
