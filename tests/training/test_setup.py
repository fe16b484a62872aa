"""What only the machine can refuse is refused before the base is loaded."""

from pathlib import Path

import pytest
import torch

from qlora_trainer.config.read import check_values
from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.training.open import check_attention, open_model
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
