"""PEFT's side of the task benchmark starts where ours starts, and learns what ours learns."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from peft_task_twin import as_linear4bit, train_with_peft

from qlora_trainer.base.nf4 import NF4Linear
from qlora_trainer.config.read import check_values
from qlora_trainer.run.train import train
from tests.data.word_tokenizers import bert_like
from tests.tasks.tiny_words import question_rows, tiny_bert_config, write_rows


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_computes_with_our_bits(double_quant: bool) -> None:
    torch.manual_seed(0)
    ours = NF4Linear.quantize(
        torch.randn(96, 64), torch.randn(96), compute_dtype=torch.bfloat16,
        device=torch.device("cpu"), double_quant=double_quant,
    )  # fmt: skip
    theirs = as_linear4bit(ours)
    found = []
    for mode in (False, True):  # evaluating first must not re-pack what is trained through
        theirs.train(mode)
        with torch.set_grad_enabled(mode):
            x = torch.ones(3, 64, dtype=torch.bfloat16, requires_grad=mode)
            assert torch.equal(theirs(x), ours(x))
    for layer in (ours, theirs):
        x = torch.ones(3, 64, dtype=torch.bfloat16, requires_grad=True)
        layer(x).sum().backward()
        found.append(x.grad)
    assert found[0] is not None
    assert torch.equal(found[0], found[1])


def test_rows_that_bitsandbytes_reads_otherwise_on_a_cpu_are_refused() -> None:
    odd = NF4Linear.quantize(
        torch.randn(32, 96), None, compute_dtype=torch.float32, device=torch.device("cpu")
    )
    with pytest.raises(ValueError, match="96 columns"):
        as_linear4bit(odd)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's
def test_both_sides_begin_alike_and_learn_alike(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = tiny_bert_config(hidden_size=64, intermediate_size=64)
    tf.BertModel(config).save_pretrained(tmp_path / "base")
    bert_like().save_pretrained(tmp_path / "base")
    values = {
        "task": "question-answering",
        "model": {"source": str(tmp_path / "base"), "device": "cpu",
                  "compute_dtype": "fp32"},
        "adapter": {"rank": 4},
        "data": {"train": str(write_rows(tmp_path / "rows.jsonl", question_rows(48))),
                 "eval_fraction": 0.25, "max_seq_len": 48, "cache_folder": str(tmp_path / "cache")},
        "train": {"max_steps": 8, "micro_batch_size": 4, "gradient_accumulation_steps": 2,
                  "learning_rate": 0.01},
        "output": {"folder": str(tmp_path / "run")},
    }  # fmt: skip
    run = check_values(values, name="twin")
    ours, peft = train(run).metrics, train_with_peft(run)
    theirs = peft["metrics"]
    assert theirs["loss_before"] == pytest.approx(ours["loss_before"], rel=1e-6)
    assert theirs["loss"] < 0.9 * theirs["loss_before"]
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-3)
    assert 0 < peft["trained_parameters"] < peft["parameters"]
