"""What only a card can show: the run trains there, states are paged, 4 bit is 4 bit."""

import json
from pathlib import Path

import pytest
import torch

from qlora_trainer import check, held_out_metrics, load_trained, train
from qlora_trainer.base.quantize import dequantize_nf4, quantize_nf4
from qlora_trainer.config.read import check_values
from qlora_trainer.run.budget import choose_card

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


def test_a_run_on_the_card_learns_and_scores_the_same_when_loaded(
    smollm2: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n} and {n} is", "completion": f" {2 * n}."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = check_values(
        {
            "model": {"source": str(smollm2), "device": "cuda"},
            "adapter": {"rank": 64},
            "data": {
                "train": str(tmp_path / "rows.jsonl"),
                "eval_fraction": 0.2,
                "max_seq_len": 64,
                "cache_folder": str(tmp_path / "cache"),
            },
            "train": {"max_steps": 8, "micro_batch_size": 4, "learning_rate": 1e-3},
            "output": {"folder": str(tmp_path / "run")},
        }
    )
    assert check(run).train.rows == 32
    result = train(run)
    assert result.metrics["loss"] < result.metrics["loss_before"]
    again = held_out_metrics(load_trained(result.folder))
    assert again["loss"] == pytest.approx(result.metrics["loss"], rel=5e-3)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_on_the_card(broken: float) -> None:
    weight = torch.randn(64, 64, dtype=torch.bfloat16)
    weight[3, 5] = broken
    with pytest.raises(ValueError, match="not finite"):
        quantize_nf4(weight.cuda())


def test_nf4_on_the_card_has_the_codes_of_the_cpu() -> None:
    weight = torch.randn(256, 512, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    here, there = quantize_nf4(weight), quantize_nf4(weight.cuda())
    assert torch.equal(here.codes, there.codes.cpu())
    shape = ((256, 512), 64, torch.float32)
    values = dequantize_nf4(there, *shape)
    torch.testing.assert_close(values.cpu(), dequantize_nf4(here, *shape))


def test_the_card_foreseen_is_the_one_that_the_device_names() -> None:
    for number in range(torch.cuda.device_count()):
        name, total = torch.cuda.get_device_name(number), torch.cuda.mem_get_info(number)[1]
        card = choose_card(None, None, device=f"cuda:{number}")
        assert (card.gpu.name, card.gpu.memory_bytes) == (name, total)
