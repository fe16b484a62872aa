"""Runs that released versions left: each must still resume, score, answer and export.

`scripts/release_run.py` made them, each once, with the version its folder is named after.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qlora_trainer import (
    UserError,
    generate,
    held_out_metrics,
    load_run,
    load_trained,
    train,
)
from qlora_trainer.run.export import export_run
from qlora_trainer.training.log import read_metrics
from qlora_trainer.training.state import FORMAT_VERSION

KEPT = sorted((Path(__file__).resolve().parent / "releases").iterdir())


@pytest.fixture(params=KEPT, ids=lambda folder: folder.name)
def kept(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a kept run, with its paths starting from here."""
    place = Path(shutil.copytree(request.param, tmp_path / "kept"))
    for file in (place / "run" / "run.yaml", place / "run" / "adapter" / "adapter_config.json"):
        file.write_text(file.read_text().replace("/RELEASE", str(place)))
    monkeypatch.chdir(place)
    return place


def train_lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]


def interrupt(run: Path) -> list[float]:
    """Make the run what a kill after step 2 leaves; the losses it logged to its end."""
    losses = [line["loss"] for line in train_lines(run)]
    for name in ("adapter", "adapter-last", "states/step-00000004"):
        shutil.rmtree(run / name, ignore_errors=True)
    (run / "result.json").unlink()
    return losses


def test_every_claim_here_is_tried_on_a_release() -> None:
    assert KEPT != []


def test_an_interrupted_run_goes_on_to_the_end_it_would_have_had(kept: Path) -> None:
    expected = load_file(kept / "run" / "adapter" / "adapter_model.safetensors")
    logged = train_lines(kept / "run")
    losses = interrupt(kept / "run")
    result = train(load_run("run.yaml"))
    assert result.outcome.complete
    lines = train_lines(kept / "run")
    assert lines[:2] == logged[:2], "begun anew: a resumed run keeps what was logged, with its time"
    # Another processor may round otherwise; another formula would be far off.
    assert [r["loss"] for r in lines] == pytest.approx(losses, rel=1e-3)
    ended = load_file(result.adapter / "adapter_model.safetensors")
    assert ended.keys() == expected.keys()
    for name, values in expected.items():
        assert (ended[name] - values).norm() <= 1e-3 * values.norm(), name


def test_a_finished_run_still_scores_answers_and_exports(kept: Path, tmp_path: Path) -> None:
    recorded = json.loads((kept / "run" / "result.json").read_text())["metrics"]["loss"]
    trained = load_trained("run")
    assert held_out_metrics(trained)["loss"] == pytest.approx(recorded, rel=1e-3)
    assert len(generate(trained, ["1 plus 1 is"], max_new_tokens=4)) == 1
    export_run(kept / "run", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_a_state_of_a_newer_version_is_refused_with_the_way_out(kept: Path) -> None:
    interrupt(kept / "run")
    state = kept / "run" / "states" / "step-00000002"
    trainer = json.loads((state / "trainer.json").read_text())
    assert trainer["format_version"] <= FORMAT_VERSION
    (state / "trainer.json").write_text(json.dumps({**trainer, "format_version": 1_000}))
    manifest = json.loads((state / "manifest.json").read_text())
    content = (state / "trainer.json").read_bytes()
    manifest["trainer.json"] = {
        "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()
    }  # fmt: skip
    (state / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"newer version .*state format 1000.*update the package"):
        train(load_run("run.yaml"))
