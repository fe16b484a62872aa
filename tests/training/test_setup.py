"""What only the machine can refuse is refused before the base is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_trainer.config.read import check_values
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.training.open_data import head_settings
from qlora_trainer.training.open_model import check_attention, open_model
from qlora_trainer.training.setup import adapter_dtype


def a_run(**sections: dict[str, str]) -> RunConfig:
    settings = {"model": {"source": "m"}, "data": {"train": "d"}}
    return check_values(settings | sections)


def test_bf16_adapters_are_refused_where_auto_computes_in_fp16() -> None:
    run = a_run(adapter={"dtype": "bf16"})
    assert adapter_dtype(run, torch.bfloat16) == torch.bfloat16
    with pytest.raises(UserError, match=r"adapter.dtype = 'bf16': .* fp16 .* take 'auto'"):
        adapter_dtype(run, torch.float16)


def test_flash_attention_is_refused_where_auto_chose_the_cpu(tmp_path: Path) -> None:
    run = a_run(model={"source": str(tmp_path), "attention": "flash_attention_2"})
    if torch.cuda.is_available():
        pytest.skip("auto takes the GPU here")
    with pytest.raises(UserError, match=r"model.attention = 'flash_attention_2': .* cpu; .*'auto'"):
        open_model(run)


def test_flash_attention_is_refused_without_its_package() -> None:
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        pytest.skip("flash-attn is installed here")
    with pytest.raises(UserError, match=r"flash-attn .* pip install flash-attn"):
        check_attention("flash_attention_2", torch.device("cuda"))


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
def test_other_attention_runs_anywhere(attention: str) -> None:
    check_attention(attention, torch.device("cpu"))


@pytest.mark.parametrize(
    ("config", "problem", "labels"),
    [
        ({"id2label": {str(n): f"{n}" for n in range(11)}}, "single", [f"{n}" for n in range(11)]),
        ({"problem_type": "multi_label_classification", "id2label": {"1": "b", "0": "a"}}, "multi",
         ["a", "b"]),
        ({"problem_type": None}, "single", ["LABEL_0", "LABEL_1"]),
        ({"problem_type": "regression", "id2label": {"0": "LABEL_0"}}, "regression", None),
    ],
)  # fmt: skip
def test_a_heads_labels_are_read_without_the_models_own_code(
    tmp_path: Path, config: dict[str, Any], problem: str, labels: list[str] | None
) -> None:
    own_code = {"model_type": "its-own", "auto_map": {"AutoConfig": "configuration_own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps({**own_code, **config}))
    assert head_settings(tmp_path) == {"problem": problem, "labels": labels}


def test_a_head_without_its_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: there is no such file"):
        head_settings(tmp_path)
