"""A whole run with `train.compile`, and one where nothing can compile."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.run.check import check
from qlora_trainer.run.evaluate import held_out_metrics, load_trained
from qlora_trainer.run.train import train

Make = Callable[..., RunConfig]

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def test_a_compiled_run_trains_and_a_plain_process_scores_it_the_same(make_run: Make) -> None:
    result = train(make_run(train={"compile": True}, data={"packing": True}))
    assert result.metrics["loss"] < result.metrics["loss_before"]
    again = held_out_metrics(load_trained(result.folder))
    assert again["loss"] == pytest.approx(result.metrics["loss"], rel=2e-3)


def test_without_a_compiler_nothing_is_begun(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    run = make_run(train={"compile": True})
    for start in (check, train):
        with pytest.raises(UserError, match=r"train.compile = true: .*set train.compile: false"):
            start(run)
    assert not (tmp_path / "cache").exists()
    assert not any((tmp_path / "run").glob("*.yaml"))
