"""A training run is foreseen, refused where it cannot fit, and compared with what it took."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.memory.gpus import read_gpu
from qlora_trainer.run.forecast import forecast_run, shape_of_data
from qlora_trainer.run.foresee import read_model_config, run_shape
from qlora_trainer.run.measure import measure_run
from qlora_trainer.run.train import train
from qlora_trainer.training import setup
from tests.run.conftest import Lines

Make = Callable[..., RunConfig]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_first_step_takes_what_was_foreseen_and_the_folder_says_so(
    make_run: Make, accumulation: int
) -> None:
    told = Lines()
    result = train(
        make_run(train={"max_steps": 2, "gradient_accumulation_steps": accumulation}),
        reporter=told,
    )
    memory = json.loads((result.folder / "memory.json").read_text())
    assert abs(memory["compared"]["error"]) < 0.005
    assert memory["predicted"]["live_bytes"] >= memory["measured"]["first_step_live_bytes"]
    assert json.loads((result.folder / "result.json").read_text())["memory"] == memory
    on_disk = memory["predicted"]["disk_peak_bytes"]
    written = sum(f.stat().st_size for f in result.folder.glob("states/*/*.safetensors"))
    assert 0 < written < on_disk["saved states"] + 2**20
    assert on_disk["encoded rows"] > 0
    said = [line.split(":")[0] for line in told.lines if line.startswith(("memory", "disk"))]
    assert said == ["memory", "disk", "memory"]


@pytest.mark.parametrize("mask_free", [True, False])
def test_a_first_step_of_packed_rows_takes_what_was_foreseen(
    make_run: Make, mask_free: bool
) -> None:
    packed = {"packing": True, "mask_free_packing": mask_free, "max_seq_len": 256}
    steps = {"max_steps": 1, "micro_batch_size": 2, "loss_chunk_tokens": 16, "activations": "keep"}
    result = train(make_run(data=packed, train=steps), reporter=Lines())
    memory = json.loads((result.folder / "memory.json").read_text())
    assert abs(memory["compared"]["error"]) < 0.005
    assert memory["predicted"]["live_bytes"] >= memory["measured"]["first_step_live_bytes"]


def test_the_data_tell_how_many_examples_share_a_row_and_how_long_held_out_ones_are(
    make_run: Make,
) -> None:
    run = make_run(data={"packing": True, "max_seq_len": 256})
    source = setup.open_model(run)
    data = setup.open_data(run, source)
    assert data.held_out is not None
    for key, most in (("rtx-3060-12gb", 256 // int(data.train.lengths.min())), ("rtx-2060-6gb", 2)):
        gpu = read_gpu(key)
        shape = run_shape(run, read_model_config(run), gpu)
        found = shape_of_data(run, shape, data, gpu)
        assert (found.packed, found.mask_free, found.seq_len) == (True, True, 256)
        assert most - 1 <= found.examples <= most
        assert found.longest_held_out == int(data.held_out.lengths.max()) < 256
    alone = run_shape(make_run(data={"packing": True, "eval_fraction": 0.0}), source.config, gpu)
    assert (shape.longest_held_out, alone.longest_held_out) == (None, 0)


def test_rehearsing_or_not_a_run_ends_with_the_same_bits(make_run: Make, tmp_path: Path) -> None:
    ends = []
    for choice in ("always", "never"):
        folder = str(tmp_path / choice)
        result = train(make_run(memory={"rehearse": choice}, output={"folder": folder}))
        files = {
            str(file.relative_to(folder)): file.read_bytes()
            for file in Path(folder).rglob("*.safetensors")
        }
        ends.append((files, result.metrics))
    assert ends[0] == ends[1]


def test_a_run_that_cannot_fit_is_refused_before_its_base_is_loaded(
    make_run: Make, tiny_model: Path, tmp_path: Path
) -> None:
    huge = tmp_path / "huge"
    shutil.copytree(tiny_model, huge)
    config = json.loads((huge / "config.json").read_text())
    config |= {"intermediate_size": 2**25, "hidden_size": 2**14, "head_dim": 2**12}
    (huge / "config.json").write_text(json.dumps(config))
    run = make_run(model={"source": str(huge)}, adapter={"target_modules": ["q_proj"]})
    with pytest.raises(UserError, match=r"must_fit=false(.|\n)*host memory: .* needed"):
        train(run)
    assert not (tmp_path / "run" / "run.yaml").exists()
    careless = run.model_copy(update={"memory": run.memory.model_copy(update={"must_fit": False})})
    told, source = Lines(), setup.open_model(careless)
    forecast_run(careless, source, setup.open_data(careless, source), told)
    assert any("goes on as memory.must_fit is off" in line for line in told.lines)


@pytest.mark.parametrize("packing", [False, True])
def test_measured_steps_stand_beside_the_prediction(make_run: Make, packing: bool) -> None:
    data = {"max_seq_len": 64, "packing": packing}
    compared = measure_run(make_run(data=data, train={"micro_batch_size": 2}))
    assert abs(compared.errors["allocated"]) < 0.005
    for part in ("base weights", "adapters", "optimizer states"):
        assert compared.predicted_by_component[part] == compared.measured_by_component[part] > 0
    assert torch.device(compared.device).type == "cpu"
    assert compared.to_json()["errors"] == compared.errors
